// The gradient with respect to features, from that with respect to distances, a block of anchors at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cloud.h"
#include "team.h"

namespace pcoherence {

// Rows of S = V + V^T that are held at a time: products of more gain nothing.
inline constexpr std::int64_t kSumRows = 512;
// Of which a thread makes so many at a time: two cache lines of each row of V, read across.
inline constexpr std::int64_t kSumStrip = 32;

// Gradient w.r.t. features from blocks of V, by products: sum_j V_ij (x_i - c_j) for the anchors, and the
// opposite for the candidates; for cityblock sum_j V_ij sign(x_i - c_j). A whole V, `symmetric`, takes one product
// instead of two: with S = V + V^T both together are sum_j S_ij (x_i - x_j).
template <class T>
class FeatureGradient {
 public:
  // anchors [m, width], candidates [n, width]: where the gradients go, null where not wanted.
  FeatureGradient(const Cloud<T>& cloud, T* anchors, T* candidates, bool symmetric, Runtime<T>& runtime)
      : cloud_(cloud),
        runtime_(runtime),
        n_(cloud.input().n),
        width_(cloud.input().width),
        symmetric_(symmetric),
        anchors_(anchors),
        candidates_(candidates) {
    if (anchors != nullptr && cloud.same() && !symmetric) candidates_ = runtime.allocate(n_ * width_);
    if (anchors_ != nullptr) std::fill(anchors_, anchors_ + cloud.input().m * width_, T(0));
    if (candidates_ != nullptr) {
      std::fill(candidates_, candidates_ + n_ * width_, T(0));
      column_sums_.assign(n_, 0.0);
    }
  }

  // block [rows, padded(n)]: V; row_sums [rows]; near: pairs kept out of the products, by row.
  void add(T* block, const double* row_sums, std::int64_t begin, std::int64_t rows,
           const std::vector<std::vector<std::int32_t>>& near, Team& team) {
    if (!cloud_.traits().products) {
      add_signs(block, begin, rows, team);
      return;
    }
    // Pairs too near for products go first, and leave a zero in the block.
    std::vector<double> sums(row_sums, row_sums + rows);
    add_near(block, sums, begin, rows, near, team);
    const std::int64_t ld = padded(n_);
    if (symmetric_) {
      add_both(block, team);
      return;
    }
    if (anchors_ != nullptr) add_anchors(block, sums.data(), begin, rows);
    if (candidates_ != nullptr) {
      runtime_.accumulate_tn(candidates_, block, ld, cloud_.anchors() + begin * width_, rows, n_, width_);
      add_column_sums(block, rows, team);
    }
  }

  // After the last block.
  void finish() {
    if (candidates_ == nullptr) return;
    if (cloud_.traits().products) {
      const T* c = cloud_.candidates();
      for (std::int64_t j = 0; j < n_; ++j) {
        const T sum = static_cast<T>(column_sums_[j]);
        for (std::int64_t f = 0; f < width_; ++f)
          candidates_[j * width_ + f] = sum * c[j * width_ + f] - candidates_[j * width_ + f];
      }
    }
    if (cloud_.same())
      for (std::int64_t i = 0; i < n_ * width_; ++i) anchors_[i] += candidates_[i];
  }

 private:
  // Some rows of S at a time: they are multiplied while they are in the cache, and V is only read.
  void add_both(const T* block, Team& team) {
    const std::int64_t ld = padded(n_), most = std::min(ld, kSumRows);
    T* both = runtime_.allocate(most * ld);
    std::vector<double> sums(most);
    for (std::int64_t begin = 0; begin < n_; begin += most) {
      const std::int64_t end = std::min(ld, begin + most), rows = std::min(n_, end) - begin;
      team.run(runtime_, (end - begin + kSumStrip - 1) / kSumStrip, 1, [&](std::int64_t s, Workspace&) {
        const std::int64_t first = s * kSumStrip, last = std::min(end - begin, first + kSumStrip);
        kernels().of<T>().plus_transpose(block, ld, ld, begin + first, begin + last, both + first * ld);
        for (std::int64_t i = first; i < last; ++i) sums[i] = kernels().of<T>().sum_row(both + i * ld, n_);
      });
      add_anchors(both, sums.data(), begin, rows);
    }
  }

  void add_anchors(const T* block, const double* sums, std::int64_t begin, std::int64_t rows) {
    if (products_ == nullptr) products_ = runtime_.allocate(rows * width_);  // the first block is the largest
    runtime_.multiply_nn(products_, block, padded(n_), cloud_.candidates(), rows, n_, width_);
    const T* x = cloud_.anchors() + begin * width_;
    T* out = anchors_ + begin * width_;
    for (std::int64_t i = 0; i < rows; ++i) {
      const T sum = static_cast<T>(sums[i]);
      for (std::int64_t f = 0; f < width_; ++f)
        out[i * width_ + f] += sum * x[i * width_ + f] - products_[i * width_ + f];
    }
  }

  // The sign convention of candidates_ until finish(): sum_i V_ij x_i, to be subtracted.
  void add_near(T* block, std::vector<double>& sums, std::int64_t begin, std::int64_t rows,
                const std::vector<std::vector<std::int32_t>>& near, Team& team) {
    std::vector<std::int64_t> start(rows + 1, 0);  // of an anchor's pairs among all
    for (std::int64_t i = 0; i < rows; ++i) start[i + 1] = start[i] + static_cast<std::int64_t>(near[i].size());
    if (start[rows] == 0) return;
    std::vector<T> pulls(start[rows]);
    const std::int64_t ld = padded(n_);
    team.run(runtime_, rows, 1, [&](std::int64_t i, Workspace&) {
      T* to = pulls.data() + start[i];
      for (const std::int32_t j : near[i]) {
        *to++ = block[i * ld + j];
        block[i * ld + j] = 0;
      }
      if (near[i].empty()) return;
      // Not by subtraction: of a pair that nearly coincides V is so large that nothing else would be left of the sum.
      if (!symmetric_) sums[i] = kernels().of<T>().sum_row(block + i * ld, n_);
      if (anchors_ != nullptr)
        kernels().of<T>().add_differences(
            anchors_ + (begin + i) * width_,
            {cloud_.anchor(begin + i), cloud_.given_candidates(), cloud_.candidate_lengths(), near[i].data(),
             pulls.data() + start[i], std::ssize(near[i]), width_, cloud_.scale()});
    });
    T* to = symmetric_ ? anchors_ : candidates_;
    if (to == nullptr) return;
    // By candidate, and there in the order of anchors: every sum keeps its order, whoever computes it.
    std::vector<std::int64_t> first(n_ + 1, 0);
    for (std::int64_t i = 0; i < rows; ++i)
      for (const std::int32_t j : near[i]) ++first[j + 1];
    for (std::int64_t j = 0; j < n_; ++j) first[j + 1] += first[j];
    std::vector<std::int64_t> next(first.begin(), first.end() - 1);
    std::vector<std::int32_t> anchor(start[rows]);
    std::vector<T> pulled(start[rows]);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::size_t k = 0; k < near[i].size(); ++k) {
        const std::int64_t at = next[near[i][k]]++;
        anchor[at] = static_cast<std::int32_t>(begin + i);
        pulled[at] = pulls[start[i] + static_cast<std::int64_t>(k)];
      }
    const double sign = symmetric_ ? 1 : -1;
    team.run(runtime_, n_, 1, [&](std::int64_t j, Workspace&) {
      if (first[j] < first[j + 1])
        kernels().of<T>().add_differences(
            to + j * width_,
            {cloud_.candidate(j), cloud_.input().anchors, cloud_.anchor_lengths(), anchor.data() + first[j],
             pulled.data() + first[j], first[j + 1] - first[j], width_, sign * cloud_.scale()});
    });
  }

  void add_column_sums(const T* block, std::int64_t rows, Team& team) {
    constexpr std::int64_t slice = 256;  // columns summed together, in registers and L1
    const std::int64_t ld = padded(n_);
    team.run(runtime_, (n_ + slice - 1) / slice, kGrain / slice, [&](std::int64_t s, Workspace&) {
      T sum[slice] = {};
      const std::int64_t begin = s * slice, count = std::min(slice, n_ - begin);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < count; ++j) sum[j] += block[i * ld + begin + j];
      for (std::int64_t j = 0; j < count; ++j) column_sums_[begin + j] += double(sum[j]);
    });
  }

  void add_signs(const T* block, std::int64_t begin, std::int64_t rows, Team& team) {
    const auto& accumulate = kernels().of<T>().accumulate_signs;
    const std::int64_t ld = padded(n_);
    const T* x = cloud_.anchors() + begin * width_;
    if (anchors_ != nullptr)
      team.run(runtime_, rows, 1, [&](std::int64_t i, Workspace&) {
        accumulate(anchors_ + (begin + i) * width_, x + i * width_, cloud_.candidates(), block + i * ld, 1, n_, width_);
      });
    if (candidates_ != nullptr)
      team.run(runtime_, n_, 1, [&](std::int64_t j, Workspace&) {
        accumulate(candidates_ + j * width_, cloud_.candidates() + j * width_, x, block + j, ld, rows, width_);
      });
  }

  const Cloud<T>& cloud_;
  Runtime<T>& runtime_;
  std::int64_t n_, width_;
  bool symmetric_;
  T* anchors_;             // [m, width]
  T* candidates_;          // [n, width]
  T* products_ = nullptr;  // [block rows, width]
  std::vector<double> column_sums_;
};

}  // namespace pcoherence
