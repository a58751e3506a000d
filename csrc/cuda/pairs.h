// Kernel sums by direct evaluation of every pair: n^2 a row. For small n, and as a second witness in tests.
// Positions are in units of the temperature.
#pragma once

#include "../soft_ranks.h"
#include "group.h"
#include "tables.h"

namespace pcoherence::cuda {

template <class T, class G>
class Pairs {
 public:
  static constexpr double unit = 1.0;

  static constexpr std::int64_t bytes(std::int64_t n) { return 3 * (n * sizeof(T) + 16); }

  PCOH_DEVICE Pairs(G& g, const Row<T>& row, const DeviceTables<T>&, Arena arena) : g_(g), n_(row.n) {
    s_ = arena.take<T>(n_);
    w_ = arena.take<T>(n_);
    out_ = arena.take<T>(n_);
    each(g, n_, [&](int k) {
      s_[k] = row.values[k];
      w_[k] = row.weight(k);
    });
    g.sync();
  }

  PCOH_APART void ranks(T* out) {
    each(g_, n_, [=, this](int j) {
      const T s = s_[j];
      out[j] = sum([=, this](int k) { return w_[k] * sigmoid(s - s_[k]); });
    });
  }

  // See ../row.h. j itself apart: what cancels must not leave a rounding error behind.
  PCOH_APART double cross_total(const double* ranks, double weight) {
    double result = 0;
    each(g_, n_, [&](int j) {
      const T s = s_[j];
      const double w = w_[j];
      const T logs = sum([=, this](int k) { return j == k ? T(0) : w_[k] * softplus(-std::abs(s - s_[k])); });
      double below = 0;
      for (int k = 0; k < n_; ++k) below += s_[k] < s ? double(w_[k]) : s_[k] == s ? double(w_[k]) / 2 : 0.0;
      result += w * (double(logs) + w * kLog2 + 2 * double(s) * (below - weight * ranks[j]));
    });
    return total(g_, result);
  }

  // out may be r. l itself is left out: it cancels, but contracted to a fused multiplication its rounding would stay,
  // where all other slopes are 0.
  PCOH_APART void pullback(const T* r, T* out) {
    g_.sync();  // r may have been written by others
    each(g_, n_, [=, this](int l) {
      const T s = s_[l], own = r[l], w = w_[l];
      out_[l] = sum([=, this](int j) { return j == l ? T(0) : (own * w_[j] - w * r[j]) * slope(s - s_[j]); });
    });
    g_.sync();
    each(g_, n_, [=, this](int l) { out[l] = out_[l]; });
  }

 private:
  // Four sums: an addition need not wait for the one before, and a quarter of the terms rounds less.
  template <class F>
  PCOH_DEVICE T sum(F term) const {
    T part[4] = {};
    int k = 0;
    for (; k + 4 <= n_; k += 4) {
      PCOH_UNROLL
      for (int i = 0; i < 4; ++i) part[i] += term(k + i);
    }
    for (; k < n_; ++k) part[0] += term(k);
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  G& g_;
  const int n_;
  T *s_, *w_, *out_;  // [n]
};

}  // namespace pcoherence::cuda
