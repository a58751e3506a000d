// Kernel sums by direct evaluation of every pair: n^2 a row. For who asks, and as a second witness in tests.
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
    // A tiny temperature's inverse may overflow T; times a difference of 0 it would be NaN.
    per_value_ = static_cast<T>(std::min(row.scale.per_distance, double(std::numeric_limits<T>::max())));
  }

  void ranks(T* out) {
    for (int j = 0; j < row_.n; ++j) {
      V sum{};
      for (int k = 0; k < row_.n; k += lanes) {
        const V t = (row_.values[j] - load_at(row_.values, k)) * per_value_, z = decay(t);
        sum += load_at(row_.weights, k) * (select(t < V{}, z, splat<T>(1)) / (T(1) + z));
      }
      out[j] = static_cast<T>(total(sum));
    }
  }

  // See cross_total() in ../row.h. j itself apart: what cancels must not leave a rounding error behind.
  double cross_total(const double* ranks, double weight) {
    double result = 0;
    for (int j = 0; j < row_.n; ++j) {
      Sum logs, below;
      for (int k = 0; k < row_.n; k += lanes) {
        const V v = load_at(row_.values, k), w = load_at(row_.weights, k), z = decay((row_.values[j] - v) * per_value_);
        V log1p{};
        for (int m = kSeriesDegree<T> - 1; m >= 0; --m) log1p = (log1p + T(series<T>().softplus[m])) * z;
        logs.add(select(lane_numbers<ivec_t<T>>() + k == ivec_t<T>{} + j, V{}, w * log1p));
        const V half = splat<T>(0.5);
        below.add(select(v < row_.values[j], w, select(v == row_.values[j], w * half, V{})));
      }
      const double w = row_.weights[j];
      result += w * (logs.total() + w * kLog2 + 2 * row_.position(j) * (below.total() - weight * ranks[j]));
    }
    return result;
  }

  // l itself is left out, as in the scan: it cancels, but contracted to a fused multiplication its rounding would stay,
  // where all other slopes are 0.
  void pullback(const T* r, T* out) {
    const ivec_t<T> iota = lane_numbers<ivec_t<T>>();
    for (int l = 0; l < row_.n; ++l) {
      V sum{};
      for (int j = 0; j < row_.n; j += lanes) {
        const V z = decay((row_.values[l] - load_at(row_.values, j)) * per_value_), q = T(1) + z;
        const V term = (r[l] * load_at(row_.weights, j) - row_.weights[l] * load_at(r, j)) * (z / (q * q));
        sum += select(iota + j == ivec_t<T>{} + l, V{}, term);
      }
      out[l] = static_cast<T>(total(sum));
    }
  }

 private:
  using V = vec_t<T>;
  static constexpr int lanes = lanes_v<T>;
  static V load_at(const T* p, int k) { return PCOH_ISA::load(p + k); }
  static V decay(V t) { return exp_nonpositive<T>(select(t < V{}, t, -t)); }
  static double total(V v) {
    Sum sum;
    sum.add(v);
    return sum.total();
  }

  T per_value_ = 0;  // 1 / temperature
  Row<T> row_{};
};

}  // namespace pcoherence::PCOH_ISA
