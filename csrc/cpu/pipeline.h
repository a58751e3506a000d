// The loss and its gradient, a block of anchors at a time (docs/mathematics.rst).
#pragma once

#include <cstdint>

#include "cloud.h"

namespace pcoherence {

// Anchors of a block, at most. Every block reads all candidates again: 128 were a third slower than 512 (measured).
inline constexpr std::int64_t kMaxBlock = 512;

template <class T>
struct Weighting {
  const T* coefficients = nullptr;  // [m] of L_i in the total, or null: ones
  const T* candidates = nullptr;    // [n], or [m, n] with `by_anchor`, or null: ones
  bool by_anchor = false;
  const std::int64_t* self = nullptr;  // [m] candidate excluded, -1 for none, or null

  std::int64_t excluded(std::int64_t i) const { return self != nullptr ? self[i] : -1; }
  double coefficient(std::int64_t i) const { return coefficients != nullptr ? double(coefficients[i]) : 1.0; }
};

// Gradients are written, not added to; null where not wanted.
template <class T>
struct Results {
  T* losses = nullptr;               // [m]
  T* gradient_anchors = nullptr;     // [m, width]; of everything, where the candidates are the anchors; [m, n] of
                                     // distances that are given
  T* gradient_candidates = nullptr;  // [n, width]
  double total = 0;
};

// From features.
template <class T>
Status coherence(const Options& options, const GivenPoints<T>& student, const GivenPoints<T>& teacher,
                 const Weighting<T>& weights, Results<T>& results, Runtime<T>& runtime);

// From distances [m, n].
template <class T>
Status coherence_from_distances(const Options& options, const T* student, const T* teacher, std::int64_t m,
                                std::int64_t n, const Weighting<T>& weights, Results<T>& results, Runtime<T>& runtime);

// values, out: [rows, n]; weights: [rows or 1, n] or null; upstream [rows, n] or null (then ranks, not gradients).
template <class T>
Status soft_ranks(const T* values, const T* weights, bool weights_per_row, const T* upstream, T* out, std::int64_t rows,
                  std::int64_t n, double temperature, Method method, Runtime<T>& runtime);

}  // namespace pcoherence
