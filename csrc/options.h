// What a call asks for: every option once, with the names of pcoherence/spec.py; tests compare the two lists.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

namespace pcoherence {

enum class Metric { euclidean, sqeuclidean, cosine, cityblock };
enum class Scale { anchor, none };
enum class Objective { mse, l1, huber, cross_entropy, spearman };
enum class Method { automatic, grid, scan, pairs };

inline constexpr std::array<std::string_view, 4> kMetricNames{"euclidean", "sqeuclidean", "cosine", "cityblock"};
inline constexpr std::array<std::string_view, 2> kScaleNames{"anchor", "none"};
inline constexpr std::array<std::string_view, 5> kObjectiveNames{"mse", "l1", "huber", "cross_entropy", "spearman"};
inline constexpr std::array<std::string_view, 4> kMethodNames{"auto", "grid", "scan", "pairs"};

// What is not said is the first name, or no number: ROW_OPTIONS of pcoherence/spec.py.
struct Options {
  Metric metric = Metric::euclidean, teacher_metric = Metric::euclidean;
  Scale scale = Scale::anchor;
  Objective objective = Objective::mse;
  Method method = Method::automatic;
  double temperature = 1;          // always said
  double teacher_temperature = 0;  // 0: hard mid-ranks
  double neighbourhood = 0;        // 0: weights as given

  constexpr bool soft_teacher() const { return teacher_temperature > 0; }
};

// The value of a name in `names`, which are in the order of the enumeration.
template <class Enum, std::size_t N>
Enum named(const std::array<std::string_view, N>& names, std::string_view name, std::string_view option) {
  for (std::size_t i = 0; i < N; ++i)
    if (names[i] == name) return static_cast<Enum>(i);
  throw std::invalid_argument(std::string(option) + ": unknown name '" + std::string(name) + "'");
}

// Whatever the program's locale is.
inline double number(std::string_view text, std::string_view option) {
  std::istringstream in{std::string(text)};
  in.imbue(std::locale::classic());
  double value = 0;
  in >> value;
  if (in.fail() || !in.eof())
    throw std::invalid_argument(std::string(option) + ": expected a number, got '" + std::string(text) + "'");
  return value;
}

struct Number {};  // in place of the names, for an option that is a double

// Calls f(name of the option, names that it knows, the field of `options`) for all that are packed.
template <class F>
void for_each_option(Options& options, F&& f) {
  f("scale", kScaleNames, options.scale);
  f("objective", kObjectiveNames, options.objective);
  f("method", kMethodNames, options.method);
  f("neighbourhood", Number{}, options.neighbourhood);
  f("metric", kMetricNames, options.metric);
  f("teacher_metric", kMetricNames, options.teacher_metric);
}

template <class Names, class Field>
void read(std::string_view option, const Names& names, std::string_view value, Field& field) {
  if constexpr (std::is_same_v<Names, Number>)
    field = number(value, option);
  else
    field = named<Field>(names, value, option);
}

// Of LossSpec.packed() in pcoherence/spec.py: "objective=l1,metric=cosine,teacher_metric=cosine". What is not named is
// as in Options.
inline Options unpacked(std::string_view packed, double temperature, double teacher_temperature) {
  if (!(temperature > 0))
    throw std::invalid_argument("temperature: expected a number > 0, got " + std::to_string(temperature));
  if (!(teacher_temperature >= 0))
    throw std::invalid_argument("teacher_temperature: expected 0 or more, got " + std::to_string(teacher_temperature));
  Options options;
  options.temperature = temperature;
  options.teacher_temperature = teacher_temperature;
  while (!packed.empty()) {
    const std::string_view part = packed.substr(0, packed.find(','));
    packed.remove_prefix(std::min(part.size() + 1, packed.size()));
    const std::size_t equals = part.find('=');
    const std::string_view name = part.substr(0, equals);
    bool known = false;
    for_each_option(options, [&](std::string_view option, const auto& names, auto& field) {
      if (option != name) return;
      known = equals != std::string_view::npos;
      if (known) read(option, names, part.substr(equals + 1), field);
    });
    if (!known) throw std::invalid_argument("options: unknown part '" + std::string(part) + "'");
  }
  if (!(options.neighbourhood >= 0))
    throw std::invalid_argument("neighbourhood: expected 0 or more, got " + std::to_string(options.neighbourhood));
  return options;
}

}  // namespace pcoherence
