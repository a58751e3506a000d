// What a call asks for: every option once, as the kernels see it.
// The names match pcoherence/spec.py; tests compare the two lists.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

namespace pcoherence {

enum class Metric { euclidean, sqeuclidean, cosine, cityblock };
enum class Scale { anchor, batch, none };
enum class Objective { mse, l1, huber, cross_entropy, spearman };
enum class Method { automatic, grid, scan, pairs };

inline constexpr std::array<std::string_view, 4> kMetricNames{"euclidean", "sqeuclidean", "cosine", "cityblock"};
inline constexpr std::array<std::string_view, 3> kScaleNames{"anchor", "batch", "none"};
inline constexpr std::array<std::string_view, 5> kObjectiveNames{"mse", "l1", "huber", "cross_entropy", "spearman"};
inline constexpr std::array<std::string_view, 4> kMethodNames{"auto", "grid", "scan", "pairs"};

// Position of `name` in `names`, or -1.
template <std::size_t N>
constexpr int find_name(const std::array<std::string_view, N>& names, std::string_view name) {
  for (std::size_t i = 0; i < N; ++i)
    if (names[i] == name) return static_cast<int>(i);
  return -1;
}

struct LossSpec {
  Objective objective = Objective::mse;
  Scale scale = Scale::anchor;
  Method method = Method::automatic;
  double temperature = 0.1;
  double teacher_temperature = 0.0;  // 0: hard mid-ranks

  bool soft_teacher() const { return teacher_temperature > 0.0; }
};

}  // namespace pcoherence
