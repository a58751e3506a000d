// Kernel sums on a grid: spread, convolve, gather, as in csrc/cpu/grid.h, whose formulas these are. Positions are in
// units of the bin width. Additions happen in an order that the launch alone decides: no float atomics.
#pragma once

#include "layout.h"
#include "tables.h"

namespace pcoherence::cuda {

// Up to this many bins, threads keep moments in registers, a window of bins at a time: a pass over the row costs an
// element 15 operations a bin. Beyond, a warp takes elements apart into lanes: about 250 operations an element, however
// many bins there are.
template <class T>
inline constexpr int kRegisterBins = sizeof(T) == 4 ? 16 : 8;

template <class T, class G>
class Grid {
 public:
  static constexpr double unit = kBinWidth;

  // Memory for rows of up to `bins` bins, besides what spread_by_lanes() takes.
  static constexpr std::int64_t bytes(std::int64_t bins) { return bins * (4 * order * sizeof(T) + 2 * 8) + 6 * 16; }
  // What spread_by_lanes() needs at least.
  static constexpr std::int64_t lane_bytes(int threads) { return threads * sizeof(T) + 16; }

  // row.values: codes of the layout.
  PCOH_DEVICE Grid(G& g, const Row<T>& row, const Layout<T>& layout, const DeviceTables<T>& tables, Arena arena)
      : g_(g), row_(row), tables_(tables), bins_(layout.bins), places_(layout.places), arena_(arena) {
    if (bytes(bins_) + lane_bytes(g.threads()) <= arena_.fast_left())
      memory_ = g.in_fast(row.values) ? Memory::all_fast : Memory::grid_fast;
    moments_ = arena_.take<T>(bins_ * order);
    residual_moments_ = arena_.take<T>(bins_ * order);
    field_ = arena_.take<T>(bins_ * order);
    residual_field_ = arena_.take<T>(bins_ * order);
    below_ = arena_.take<double>(bins_);
    mass_ = arena_.take<double>(bins_);
    with_weights(row, [this](auto weight) { spread(weight, moments_); });
  }

  // out[j] = sum_k w_k sigmoid(s_j - s_k)
  PCOH_APART void ranks(T* out) {
    sum_far_moments();
    convolve(tables_.sigmoid, moments_, field_);
    if (has_far()) {
      each(g_, bins_, [=, this](int b) { field_[b * order] += T(below_[first_near(b)]); });
      g_.sync();
    }
    in_memory(out, [&]<Memory memory>(Constant<memory>) { gather_ranks<memory>(out); });
  }

  // See ../row.h. Moments against coefficients, no gather; then, by the order of bins, the rest. After ranks().
  PCOH_APART double cross_total(const double* ranks, double weight) {
    g_.sync();  // the field of the ranks has been read
    convolve(tables_.softplus, moments_, field_);
    double sum = 0;
    for (int i = g_.thread(); i < bins_ * order; i += g_.threads()) sum += double(moments_[i]) * double(field_[i]);
    // Weights of bins as whole numbers, whose sum does not depend on the order of additions.
    auto* share = reinterpret_cast<unsigned long long*>(mass_);
    each(g_, bins_, [=](int b) { share[b] = 0; });
    g_.sync();
    const double parts = double(1ull << 60) / weight;
    with_weights(row_, [&](auto w) {
      each(g_, row_.n, [&](int k) {
        g_.add(&share[row_.cells.local(row_.values[k]).bin],
               static_cast<unsigned long long>(double(w(k)) * parts + 0.5));
      });
    });
    g_.sync();
    const double per_part = 1 / parts;
    const auto own = [=](int b) { return double(share[b]) * per_part; };
    running_sums(g_, bins_, own, [this](int b, double before) { below_[b] = before; });
    g_.sync();
    double rest = 0;
    with_weights(row_, [&](auto w) {
      each(g_, row_.n, [&](int k) {
        const int b = row_.cells.local(row_.values[k]).bin;
        rest += double(w(k)) * double(row_.place(k)) * (below_[b] + own(b) / 2 - weight * ranks[k]);
      });
    });
    return total(g_, sum + 2 * unit * rest);
  }

  // out[l] = r_l sum_k w_k slope(s_l - s_k) - w_l sum_j r_j slope(s_l - s_j); out may be r.
  PCOH_APART void pullback(const T* r, T* out) {
    spread([r](int k) { return r[k]; }, residual_moments_);
    convolve(tables_.slope, moments_, field_);
    convolve(tables_.slope, residual_moments_, residual_field_);
    const T* both = g_.in_fast(r) ? out : r;
    in_memory(both, [&]<Memory memory>(Constant<memory>) { gather_pulls<memory>(r, out); });
  }

 private:
  static constexpr int order = GridOrder<T>::order;
  static constexpr int reach = GridTable<T>::bins_in_reach;

  static PCOH_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  // What is in fast memory: the row and all of the grid, the grid alone, or who knows.
  enum class Memory { all_fast, grid_fast, any };
  template <Memory memory>
  using Constant = std::integral_constant<Memory, memory>;

  // f(what is known of the grid, and of row and p)
  template <class F>
  PCOH_DEVICE void in_memory(const T* p, F f) {
    if (memory_ == Memory::all_fast && g_.in_fast(p))
      f(Constant<Memory::all_fast>{});
    else if (memory_ != Memory::any)
      f(Constant<Memory::grid_fast>{});
    else
      f(Constant<Memory::any>{});
  }
  // Of the grid, of the row.
  template <Memory memory, class V>
  PCOH_DEVICE V* cell(V* p) const {
    return at<memory != Memory::any>(g_, p);
  }
  template <Memory memory, class V>
  PCOH_DEVICE V* element(V* p) const {
    return at<memory == Memory::all_fast>(g_, p);
  }

  // Where bin b is laid.
  PCOH_DEVICE int place(int b) const { return places_ == nullptr ? b : places_[b]; }
  // Whether there may be bins beyond reach of others.
  PCOH_DEVICE bool has_far() const { return bins_ > reach || places_ != nullptr; }
  // The first bin within reach of b.
  PCOH_DEVICE int first_near(int b) const {
    int c = b > reach ? b - reach : 0;
    if (places_ != nullptr)
      while (places_[c] < places_[b] - reach) ++c;
    return c;
  }

  template <Memory memory>
  PCOH_DEVICE void gather_ranks(T* out) {
    const T *codes = element<memory>(row_.values), *field = cell<memory>(field_);
    T* to = element<memory>(out);
    const Cells<T> cells = row_.cells;
    each(g_, row_.n, [=](int k) { to[k] = evaluate(field, cells.local(codes[k])); });
  }

  template <Memory memory>
  PCOH_DEVICE void gather_pulls(const T* r, T* out) {
    const T *codes = element<memory>(row_.values), *from = element<memory>(r);
    const T *field = cell<memory>(field_), *residual_field = cell<memory>(residual_field_);
    T* to = element<memory>(out);
    const Cells<T> cells = row_.cells;
    with_weights(row_, [&](auto weight) {
      each(g_, row_.n, [=](int k) {
        const Local<T> here = cells.local(codes[k]);
        to[k] = from[k] * evaluate(field, here) - weight(k) * evaluate(residual_field, here);
      });
    });
  }

  // out[b][q] = sum over k in bin b of value(k) x_k^q
  template <class V>
  PCOH_DEVICE void spread(V value, T* out) {
    g_.sync();  // value() may read what other threads wrote, and `out` may still be read
    in_memory(row_.values, [&]<Memory memory>(Constant<memory>) {
      if (bins_ <= kRegisterBins<T>)
        spread_in_registers<memory>(value, out);
      else
        spread_by_lanes<memory>(value, out);
    });
    g_.sync();
  }

  template <Memory memory, class V>
  PCOH_APART void spread_in_registers(V value, T* out) {
    constexpr int window = sizeof(T) == 4 ? 4 : 1;  // 32 registers of sums either way
    constexpr int sums = window * order;
    const T* codes = element<memory>(row_.values);
    const Cells<T> code = row_.cells;
    const int bins = bins_, n = row_.n, step = g_.threads();
    for (int start = 0; start < bins; start += window) {
      T sum[sums] = {};
      for (int k = g_.thread(); k < n; k += step) {
        const Local<T> here = code.local(codes[k]);
        const T own = value(k);
        T share[window], power = 1;
        unrolled<window>([&](auto b) { share[b] = here.bin == start + b ? own : T(0); });
        unrolled<order>([&](auto q) {
          unrolled<window>([&](auto b) { sum[b * order + q] += share[b] * power; });
          power *= here.x;
        });
      }
      total_by_lane(g_, sum);
      T* of_warp = reinterpret_cast<T*>(g_.scratch());
      if (g_.lane() < sums) of_warp[g_.warp() * sums + g_.lane()] = sum[0];
      g_.sync();
      const int i = g_.thread();
      if (i < sums && start * order + i < bins * order) {
        T all = of_warp[i];
        for (int w = 1; w < g_.warps(); ++w) all += of_warp[w * sums + i];
        out[start * order + i] = all;
      }
      g_.sync();
    }
  }

  // Lane (e, q) of a warp adds value(k) x_k^q of the warp's every e-th element to a cell of its own: cells[warp][bin]
  // [lane], so that neither lanes nor banks collide. As many bins at a time as fit into fast memory.
  template <Memory memory, class V>
  PCOH_APART void spread_by_lanes(V value, T* out) {
    constexpr int elements = kWarp / order;
    const int lanes = g_.threads();  // of all warps together
    const std::int64_t fitting = arena_.fast_left() / (lanes * std::int64_t(sizeof(T)));
    const int window = fitting > bins_ ? bins_ : fitting > 1 ? static_cast<int>(fitting) : 1;
    Arena arena = arena_;
    T* cells = cell<memory>(arena.template take<T>(std::int64_t(window) * lanes));
    T* mine = cells + g_.warp() * window * kWarp + g_.lane();
    const T* codes = element<memory>(row_.values);
    const Cells<T> code = row_.cells;
    const int e = g_.lane() / order, q = g_.lane() % order;
    const int share = (row_.n + g_.warps() - 1) / g_.warps();
    const int begin = share * g_.warp(), end = min_of(begin + share, row_.n);
    for (int start = 0; start < bins_; start += window) {
      const int here = min_of(window, bins_ - start);
      for (int b = 0; b < here; ++b) mine[b * kWarp] = 0;
      for (int k = begin + e; k < end; k += elements) {
        const Local<T> own = code.local(codes[k]);
        const int b = own.bin - start;
        if (b >= 0 && b < here) mine[b * kWarp] += value(k) * power(own.x, q);
      }
      g_.sync();
      for (int i = g_.thread(); i < here * order; i += g_.threads()) {
        T sum = 0;
        for (int w = 0; w < g_.warps(); ++w)
          for (int j = 0; j < elements; ++j) sum += cells[(w * window + i / order) * kWarp + j * order + i % order];
        out[start * order + i] = sum;
      }
      g_.sync();
    }
  }

  // x^q without a branch
  static PCOH_DEVICE T power(T x, int q) {
    T p = 1;
    PCOH_UNROLL
    for (int bit = 1; bit < order; bit *= 2, x *= x) p *= q & bit ? x : T(1);
    return p;
  }

  // below_[b]: sum over bins before b of the moments
  PCOH_APART void sum_far_moments() {
    if (!has_far()) return;
    running_sums(
        g_, bins_, [this](int b) { return double(moments_[b * order]); },
        [this](int b, double sum) { below_[b] = sum; });
    g_.sync();
  }

  // field[b] = sum over bins b' within reach of table[b - b'] applied to moments[b']
  PCOH_APART void convolve(const T* table, const T* moments, T* field) {
    const int bins = bins_;
    each(g_, bins * order, [=, this](int i) {
      const int b = i / order, q = i % order;
      const int begin = b > reach ? b - reach : 0, end = min_of(b + reach + 1, bins), own = place(b);
      T even = 0, odd = 0;
      for (int c = begin; c < end; ++c) {
        const int difference = own - place(c);
        if (difference > reach || difference < -reach) continue;  // bins between are left out
        const T* m = moments + c * order;
        const T* rows = table + (difference + reach) * order * order + q;
        PCOH_UNROLL
        for (int r = 0; r < order; r += 2) {
          even += rows[r * order] * m[r];
          odd += rows[(r + 1) * order] * m[r + 1];
        }
      }
      field[i] = even + odd;
    });
    g_.sync();
  }

  static PCOH_DEVICE T evaluate(const T* field, const Local<T>& here) {
    constexpr int packed = 16 / sizeof(T);  // of one load
    const T* terms = field + here.bin * order;
    T value = 0;
    PCOH_UNROLL
    for (int p = order - packed; p >= 0; p -= packed) {
      const Pack<T, packed> c = load<packed>(terms + p);
      PCOH_UNROLL
      for (int q = packed - 1; q >= 0; --q) value = value * here.x + c.value[q];
    }
    return value;
  }

  G& g_;
  const Row<T>& row_;
  const DeviceTables<T>& tables_;
  const int bins_;
  const int* places_;  // [bins] or null; see Layout
  Arena arena_;
  Memory memory_ = Memory::any;
  T *moments_, *residual_moments_, *field_, *residual_field_;  // [bins, order]
  double *below_, *mass_;                                      // [bins]
};

}  // namespace pcoherence::cuda
