// Kernel sums by recurrences along the sorted row, as in csrc/cpu/scan.h, whose formulas these are. Positions are in
// units of the temperature; everything in float64, for any element type.
//
// Every thread owns a contiguous chunk of the sorted row. A power z^m carries C_m = sum_{k <= i} w_k z_ik^m from one
// element to the next; a chunk maps the carry C to D^m C + C', D = exp(-(its length)), so that chunks are chained by a
// scan over threads, and then every chunk is walked with the right carry.
#pragma once

#include "sort.h"
#include "tables.h"

namespace pcoherence::cuda {

template <class T, class G>
class Scan {
 public:
  static constexpr double unit = 1.0;

  static constexpr std::int64_t bytes(std::int64_t n, int threads) {
    return n * (sizeof(T) + 4 + 3 * 8) + threads * (kRow + 1 + 1) * 8 + kWarp * kRow * 8 + 8 * 16;
  }

  PCOH_DEVICE Scan(G& g, const Row<T>& row, const DeviceTables<T>& tables, Arena arena)
      : g_(g), row_(row), tables_(tables), n_(row.n) {
    carry_ = arena.take<double>(g.threads() * kRow);
    of_warp_ = arena.take<double>(g.warps() * kRow);
    decay_ = arena.take<double>(g.threads());
    s_ = arena.take<T>(n_);
    items_ = arena.take<std::int32_t>(n_);
    steps_ = arena.take<double>(n_);
    up_ = arena.take<double>(n_);
    down_ = arena.take<double>(n_);
    each(g, n_, [&](int k) {
      s_[k] = row.values[k];
      items_[k] = k;
    });
    sort(g, s_, items_, n_);
    each(g, n_, [&](int i) { steps_[i] = i == 0 ? 0.0 : std::exp(double(s_[i - 1]) - double(s_[i])); });
    g.sync();
  }

  PCOH_APART void ranks(T* out) {
    const auto w = [this](int k) { return double(row_.weight(k)); };
    sweep(w, tables_.sigmoid_series, false, -1.0, up_);
    running_sums(
        g_, n_, [&](int i) { return w(items_[i]); },
        [&](int i, double count) { out[items_[i]] = static_cast<T>(count + 0.5 * w(items_[i]) + up_[i]); });
  }

  // See ../row.h. Of log(1 + exp(-|t|)) every pair counts from its upper end, twice; k = j once.
  PCOH_APART double cross_total(const double* ranks, double weight) {
    const auto w = [this](int k) { return double(row_.weight(k)); };
    sweep(w, tables_.softplus_series, false, 0.0, up_);
    double sum = 0;
    running_sums(
        g_, n_, [&](int i) { return w(items_[i]); },
        [&](int i, double below) {
          const double own = w(items_[i]), rest = below + own / 2 - weight * ranks[items_[i]];
          sum += own * (2 * up_[i] + own * kLog2 + 2 * double(s_[i]) * rest);
        });
    return total(g_, sum);
  }

  // out may be r.
  PCOH_APART void pullback(const T* r, T* out) {
    g_.sync();  // r may have been written by others
    sweep([this](int k) { return double(row_.weight(k)); }, tables_.sigmoid_series, true, 1.0, up_);
    sweep([r](int k) { return double(r[k]); }, tables_.sigmoid_series, true, 1.0, down_);
    g_.sync();
    each(g_, n_, [&](int i) {
      const int j = items_[i];
      out[j] = static_cast<T>(double(r[j]) * up_[i] - double(row_.weight(j)) * down_[i]);
    });
  }

 private:
  static constexpr int kPart = 8;         // powers treated together: what registers hold without spilling
  static constexpr int kRow = kPart + 1;  // of carry_: one more, so that threads' rows start in different banks
  static_assert(kSeriesDegree<T> % kPart == 0, "a power series is treated in parts");

  // out[i] = sum_m c_m (up_m(i) + sign * down_m(i)) in sorted order, the element itself left out
  template <class W>
  PCOH_DEVICE void sweep(W weight, const double* series, bool derivative, double sign, double* out) {
    const Chunk own = chunk(g_, n_);
    for (int i = own.begin; i < own.end; ++i) out[i] = 0;
    for (int power = 0; power < kSeriesDegree<T>; power += kPart) {
      double c[kPart];
      PCOH_UNROLL
      for (int m = 0; m < kPart; ++m)  // slope(t) = -sum_m m c_m z^m: the exact derivative of what gives the ranks
        c[m] = series[power + m] * (derivative ? -double(power + m + 1) : 1.0);
      walk<false>(weight, power, c, 1.0, out);
      if (sign != 0) walk<true>(weight, power, c, sign, out);
    }
  }

  // One direction and kPart powers. Downwards is upwards along the reversed row; a chunk stays whose it is.
  template <bool down, class W>
  PCOH_APART void walk(W weight, int power, const double (&c)[kPart], double sign, double* out) {
    const Chunk own = chunk(g_, n_);
    const int thread = down ? g_.threads() - 1 - g_.thread() : g_.thread();  // place in the chain
    const int count = own.end - own.begin;
    const auto at = [&](int i) { return down ? own.end - 1 - i : own.begin + i; };
    const auto step = [&](int i) {  // exp(-(distance to the element before))
      const int j = down ? at(i) + 1 : at(i);
      return j < n_ ? steps_[j] : 0.0;
    };
    double carry[kPart] = {}, decay = 1;
    for (int i = 0; i < count; ++i) {
      const double e = step(i), w = weight(items_[at(i)]);
      decay *= e;
      double z = raised(e, power);
      PCOH_UNROLL
      for (int m = 0; m < kPart; ++m) {
        z *= e;
        carry[m] = z * carry[m] + w;
      }
    }
    PCOH_UNROLL
    for (int m = 0; m < kPart; ++m) carry_[thread * kRow + m] = carry[m];
    decay_[thread] = decay;
    chain(power);
    PCOH_UNROLL
    for (int m = 0; m < kPart; ++m) carry[m] = carry_[thread * kRow + m];
    for (int i = 0; i < count; ++i) {
      const double e = step(i), w = weight(items_[at(i)]);
      double z = raised(e, power), sum = 0;
      PCOH_UNROLL
      for (int m = 0; m < kPart; ++m) {
        z *= e;
        carry[m] *= z;
        sum += c[m] * carry[m];
        carry[m] += w;
      }
      out[at(i)] += sign * sum;
    }
    g_.sync();  // carry_ and decay_ are free again
  }

  // carry_[t] from what chunk t adds to what comes into it: lane m of every warp goes through the warp's chunks for
  // power m, then lane m of each warp through the warps before.
  PCOH_APART void chain(int power) {
    g_.sync();
    const int m = g_.lane(), first = g_.warp() * kWarp;
    if (m < kPart) {
      double in = 0;
      for (int t = first; t < first + kWarp; ++t) {
        double& cell = carry_[t * kRow + m];
        const double added = cell;
        cell = in;
        in = raised(decay_[t], power + m + 1) * in + added;
      }
      of_warp_[g_.warp() * kRow + m] = in;
    }
    if (m == kPart) {
      double all = 1;
      for (int t = first; t < first + kWarp; ++t) all *= decay_[t];
      of_warp_[g_.warp() * kRow + kPart] = all;
    }
    g_.sync();
    if (m < kPart) {
      double in = 0;
      for (int w = 0; w < g_.warp(); ++w)
        in = raised(of_warp_[w * kRow + kPart], power + m + 1) * in + of_warp_[w * kRow + m];
      double passed = 1;
      for (int t = first; t < first + kWarp; ++t) {
        carry_[t * kRow + m] += raised(passed, power + m + 1) * in;
        passed *= decay_[t];
      }
    }
    g_.sync();
  }

  // x^p for 0 <= p <= kSeriesDegree
  static PCOH_DEVICE double raised(double x, int p) {
    double result = 1;
    for (; p > 0; p /= 2, x *= x)
      if (p % 2) result *= x;
    return result;
  }

  G& g_;
  const Row<T>& row_;
  const DeviceTables<T>& tables_;
  const int n_;
  T* s_;                               // [n] sorted positions
  std::int32_t* items_;                // [n] whose they are
  double *steps_, *up_, *down_;        // [n] exp(-(s_i - s_(i-1))); sums in sorted order
  double *carry_, *of_warp_, *decay_;  // [threads, kRow], [warps, kRow], [threads]
};

}  // namespace pcoherence::cuda
