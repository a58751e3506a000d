// Features of one network, made ready for distances by products.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../distances.h"
#include "rows.h"
#include "runtime.h"
#include "team.h"

namespace pcoherence {

template <class T>
struct GivenPoints {
  const T* anchors;     // [m, width]
  const T* candidates;  // [n, width], or null: the anchors themselves
  std::int64_t m, n, width;
  Metric metric;
};

// For metrics from products: x -> (x / |x| if cosine, x otherwise), minus a common centre, times a power of two.
// Neither changes the order of distances; together they keep the products from cancelling and from overflowing.
// For cityblock the features stay as they are.
template <class T>
class Cloud {
 public:
  explicit Cloud(const GivenPoints<T>& input);

  // Before anything else, of both networks at once: what one core does of each takes a tenth of a small batch.
  static void prepare(Cloud& student, Cloud& teacher, Runtime<T>& runtime, Team& team);

  const T* anchors() const { return anchors_; }
  const T* candidates() const { return candidates_; }
  const GivenPoints<T>& input() const { return input_; }
  MetricTraits traits() const { return pcoherence::traits(input_.metric); }
  bool same() const { return input_.candidates == nullptr; }

  // A distance in the given metric = unit() * the distance that distances() gives.
  double unit() const { return unit_; }

  // block [rows, padded(n)]: first the products of all rows, then, row by row, in parallel and in place or not, the
  // distances.
  void products(T* block, std::int64_t begin, std::int64_t rows, Runtime<T>& runtime) const;
  // All of them at once, where the candidates are the anchors: the upper triangle, mirrored. block [padded(n),
  // padded(n)]
  void symmetric_products(T* block, Runtime<T>& runtime) const;
  // `order_only`: anything with the order of the distances will do. `near`: see RowKernels::finish_distances.
  void distances(T* products, T* row, std::int64_t anchor, bool order_only, std::vector<std::int32_t>* near) const;

  // Differences of the points as given, in the units of the prepared features: for pairs too near for those.
  Point<T> anchor(std::int64_t i) const { return {input_.anchors + i * input_.width, length(anchor_lengths_, i)}; }
  Point<T> candidate(std::int64_t j) const {
    return {given_candidates() + j * input_.width, length(lengths_of_candidates(), j)};
  }
  double scale() const { return scale_; }
  const T* given_candidates() const { return same() ? input_.anchors : input_.candidates; }
  const double* anchor_lengths() const { return data_or_null(anchor_lengths_); }
  const double* candidate_lengths() const { return data_or_null(lengths_of_candidates()); }

  // How a gradient w.r.t. distances becomes V (docs/mathematics.rst): see AnchorRow::chain.
  double chain() const { return traits().chain; }
  bool chain_root() const { return traits().root; }

  // gradient [rows, width] w.r.t. prepared features -> w.r.t. the input features, in place.
  void pull_anchors(T* gradient) const { pull(gradient, input_.anchors, anchor_lengths_, input_.m); }
  void pull_candidates(T* gradient) const { pull(gradient, given_candidates(), lengths_of_candidates(), input_.n); }

 private:
  void choose_centre();
  void prepare_points(Runtime<T>& runtime);
  void find_duplicates();
  void pull(T* gradient, const T* given, const std::vector<double>& lengths, std::int64_t rows) const;

  static const double* data_or_null(const std::vector<double>& of) { return of.empty() ? nullptr : of.data(); }
  const std::vector<double>& lengths_of_candidates() const { return same() ? anchor_lengths_ : candidate_lengths_; }
  static double length(const std::vector<double>& lengths, std::int64_t i) {
    return lengths.empty() ? 1.0 : lengths[i];
  }

  GivenPoints<T> input_;
  T *anchors_ = nullptr, *candidates_ = nullptr;        // [m, width], [n, width]
  std::vector<double> anchor_norms_, candidate_norms_;  // [padded(m)], [padded(n)]: squared; the latter empty if same()
  std::vector<double> anchor_lengths_, candidate_lengths_;  // cosine: |x| as given, infinite for 0; else empty
  std::vector<double> centre_;                              // [width]
  double scale_ = 1;                                        // power of two that features were multiplied by
  double unit_ = 1;
  std::vector<std::pair<std::uint64_t, std::int32_t>> hashes_;     // [n] of candidates; empty once they are compared
  std::vector<std::pair<std::int32_t, std::int32_t>> duplicates_;  // (candidate, an earlier identical one)
};

}  // namespace pcoherence
