// Kernel sums by direct evaluation of every pair: n^2 a row. For small n, and as a second witness in tests.
#pragma once

#include "../tables.h"
#include "core.h"

namespace pcoherence::PCOH_ISA {

template <class T>
class Pairs {
 public:
  explicit Pairs(Workspace&) {}

  void load(const Row<T>& row) {
    row_ = row;
    v_ = row.values;
    w_ = row.weights;
    n_ = row.n;
    // A tiny temperature's inverse may overflow T; times a difference of 0 it would be NaN.
    per_value_ = static_cast<T>(std::min(row.scale.per_distance, double(std::numeric_limits<T>::max())));
  }

  void ranks(T* out) {
    for (int j = 0; j < n_; ++j) {
      V sum{};
      for (int k = 0; k < n_; k += lanes) {
        const V t = (v_[j] - load_at(v_, k)) * per_value_, z = decay(t);
        sum += load_at(w_, k) * (select(t < V{}, z, splat<T>(1)) / (T(1) + z));
      }
      out[j] = static_cast<T>(total(sum));
    }
  }

  // See cross_total() in ../row.h. j itself apart: what cancels must not leave a rounding error behind.
  double cross_total(const double* ranks, double weight) {
    double result = 0;
    for (int j = 0; j < n_; ++j) {
      Sum logs, below;
      for (int k = 0; k < n_; k += lanes) {
        const V v = load_at(v_, k), w = load_at(w_, k), z = decay((v_[j] - v) * per_value_);
        V log1p{};
        for (int m = kSeriesDegree<T> - 1; m >= 0; --m) log1p = (log1p + T(series<T>().softplus[m])) * z;
        logs.add(select(lane_numbers() + k == ivec_t<T>{} + j, V{}, w * log1p));
        const V half = splat<T>(0.5);
        below.add(select(v < v_[j], w, select(v == v_[j], w * half, V{})));
      }
      const double w = w_[j];
      result += w * (logs.total() + w * kLog2 + 2 * row_.position(j) * (below.total() - weight * ranks[j]));
    }
    return result;
  }

  // l itself is left out, as in the scan: it cancels, but contracted to a fused multiplication its rounding would stay,
  // where all other slopes are 0.
  void pullback(const T* r, T* out) {
    const ivec_t<T> iota = lane_numbers();
    for (int l = 0; l < n_; ++l) {
      V sum{};
      for (int j = 0; j < n_; j += lanes) {
        const V z = decay((v_[l] - load_at(v_, j)) * per_value_), q = T(1) + z;
        const V term = (r[l] * load_at(w_, j) - w_[l] * load_at(r, j)) * (z / (q * q));
        sum += select(iota + j == ivec_t<T>{} + l, V{}, term);
      }
      out[l] = static_cast<T>(total(sum));
    }
  }

 private:
  using V = vec_t<T>;
  static constexpr int lanes = lanes_v<T>;
  static ivec_t<T> lane_numbers() {
    ivec_t<T> iota{};
    for (int i = 0; i < lanes; ++i) iota[i] = i;
    return iota;
  }
  static V load_at(const T* p, int k) { return PCOH_ISA::load(p + k); }
  static V decay(V t) { return exp_nonpositive<T>(select(t < V{}, t, -t)); }
  static double total(V v) {
    Sum sum;
    sum.add(v);
    return sum.total();
  }

  int n_ = 0;
  T per_value_ = 0;  // 1 / temperature
  Row<T> row_{};
  const T *v_ = nullptr, *w_ = nullptr;
};

}  // namespace pcoherence::PCOH_ISA
