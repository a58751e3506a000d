// Kernel sums by recurrences along the sorted row (docs/mathematics.rst). s: values in units of the temperature.
//
// With z = exp(-(s_j - s_k)), k below j: sigmoid(s_j - s_k) = 1 + sum_m c_m z^m, and every power decays from one
// sorted position to the next:  up_m(j) = e^m (w_{j-1} + up_m(j - 1)),  down_m(j) = e'^m (w_{j+1} + down_m(j + 1)),
// e = exp(-(s_j - s_{j-1})), e' = exp(-(s_{j+1} - s_j)). All in float64, for any element type. j itself is left out: in
// the pullback it cancels, and must not leave a rounding error behind where all other slopes are 0.
#pragma once

#include "../tables.h"
#include "core.h"
#include "sort.h"

namespace pcoherence::PCOH_ISA {

template <class T>
class Scan {
 public:
  explicit Scan(Workspace& ws) : ws_(ws) {}

  void load(const Row<T>& row) {
    const int n = row.n;
    row_ = row;
    items_ = argsort(row.values, n, ws_);
    steps_ = ws_.steps.need<double>(n + lanes_v<double>);
    steps_[0] = 0;
    for (int i = 1; i < n; ++i) steps_[i] = -row.temperatures(items_[i - 1].index, items_[i].index);
    for (int i = n; i < n + lanes_v<double>; ++i) steps_[i] = 0;
    for (int i = 0; i < n; i += lanes_v<double>) store(steps_ + i, exp_nonpositive<double>(PCOH_ISA::load(steps_ + i)));
  }

  void ranks(T* out) {
    const Coefficients c = coefficients(series<T>().sigmoid, false);
    double* total = ws_.up.need<double>(row_.n);
    sweep(row_.weights, c, c, -1.0, total);
    double count = 0;
    for (int i = 0; i < row_.n; ++i) {
      const auto j = items_[i].index;
      const double w = row_.weights[j];
      out[j] = static_cast<T>(count + 0.5 * w + total[i]);
      count += w;
    }
  }

  // See cross_total() in ../row.h. Of log(1 + exp(-|t|)) every pair counts from its upper end, twice; k = j once.
  double cross_total(const double* ranks, double weight) {
    const Coefficients c = coefficients(series<T>().softplus, false);
    const Coefficients none{};
    double* logs = ws_.up.need<double>(row_.n);
    sweep(row_.weights, c, none, 1.0, logs);
    double total = 0, below = 0;
    for (int i = 0; i < row_.n; ++i) {
      const auto j = items_[i].index;
      const double w = row_.weights[j];
      total += w * (2 * logs[i] + w * kLog2 + 2 * row_.position(j) * (below + w / 2 - weight * ranks[j]));
      below += w;
    }
    return total;
  }

  void pullback(const T* r, T* out) {
    const Coefficients c = coefficients(series<T>().sigmoid, true);
    double* a = ws_.up.need<double>(row_.n);
    double* b = ws_.down.need<double>(row_.n);
    sweep(row_.weights, c, c, 1.0, a);
    sweep(r, c, c, 1.0, b);
    for (int i = 0; i < row_.n; ++i) {
      const auto j = items_[i].index;
      out[j] = static_cast<T>(double(r[j]) * a[i] - double(row_.weights[j]) * b[i]);
    }
  }

 private:
  static constexpr int parts = kSeriesDegree<T> / 8;
  static_assert(kSeriesDegree<T> % 8 == 0, "a power series is held in vectors of eight");

  // One value for each power z^1, z^2, ...
  struct Coefficients {
    dvec part[parts] = {};
  };

  // slope(t) = -sum_m m c_m z^m: the exact derivative of the sum that gives the ranks.
  static Coefficients coefficients(const double* series, bool derivative) {
    Coefficients c;
    for (int m = 0; m < kSeriesDegree<T>; ++m) c.part[m / 8][m % 8] = series[m] * (derivative ? -(m + 1) : 1);
    return c;
  }

  static Coefficients powers(double z) {
    const double z2 = z * z, z4 = z2 * z2;
    Coefficients c;
    c.part[0] = dvec{z, z2, z, z2, z, z2, z, z2} * dvec{1, 1, z2, z2, 1, 1, z2, z2} * dvec{1, 1, 1, 1, z4, z4, z4, z4};
    for (int i = 1; i < parts; ++i) c.part[i] = c.part[i - 1] * (z4 * z4);
    return c;
  }

  static double dot(const Coefficients& a, const Coefficients& b) {
    dvec sum{};
    for (int i = 0; i < parts; ++i) sum += a.part[i] * b.part[i];
    return sum_lanes(sum);
  }

  // out[i] = sum_m up_c_m up_m(i) + sign * sum_m down_c_m down_m(i), in sorted order
  void sweep(const T* v, const Coefficients& up_c, const Coefficients& down_c, double sign, double* out) {
    Coefficients acc{};
    out[0] = 0;
    for (int i = 1; i < row_.n; ++i) {
      const Coefficients e = powers(steps_[i]);
      const double weight = v[items_[i - 1].index];
      for (int p = 0; p < parts; ++p) acc.part[p] = e.part[p] * (acc.part[p] + weight);
      out[i] = dot(acc, up_c);
    }
    acc = {};
    for (int i = row_.n - 2; i >= 0; --i) {
      const Coefficients e = powers(steps_[i + 1]);
      const double weight = v[items_[i + 1].index];
      for (int p = 0; p < parts; ++p) acc.part[p] = e.part[p] * (acc.part[p] + weight);
      out[i] += sign * dot(acc, down_c);
    }
  }

  Workspace& ws_;
  Row<T> row_{};
  const SortItem<T>* items_ = nullptr;
  double* steps_ = nullptr;  // [n] exp(-(s_(i) - s_(i-1)))
};

}  // namespace pcoherence::PCOH_ISA
