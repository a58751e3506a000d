// Kernel sums on a grid: spread, convolve, gather, as in csrc/cpu/grid.h, whose formulas these are. Positions are in
// units of the bin width. Additions happen in an order that the launch alone decides: no float atomics.
#pragma once

#include "layout.h"
#include "tables.h"

namespace pcoherence::cuda {

// Up to this many bins of a row in slow memory, threads keep moments in registers, a window of bins at a time: a pass
// over the row costs an element 15 operations a bin, but loads neighbours together. Of rows in fast memory, and beyond,
// elements are first ordered by their bins: about 110 operations an element, however many bins there are.
template <class T>
inline constexpr int kRegisterBins = sizeof(T) == 4 ? 16 : 8;

template <class T, class G>
class Grid {
 public:
  static constexpr double unit = kBinWidth;

  // Memory for rows of up to `bins` bins, besides the order of their elements.
  static constexpr std::int64_t bytes(std::int64_t bins) {
    return bins * (4 * order * sizeof(T) + 2 * 8 + 2 * 4) + 4 + 5 * 16;
  }
  static constexpr std::int64_t items_bytes(std::int64_t n) { return n * (n > kNarrow ? 4 : 2) + 16; }

  // row.values: codes of the layout.
  PCOH_DEVICE Grid(G& g, const Row<T>& row, const Layout<T>& layout, const DeviceTables<T>& tables, Arena arena)
      : g_(g), row_(row), tables_(tables), bins_(layout.bins), has_far_(bins_ > reach || layout.places != nullptr) {
    const bool wide = row.n > kNarrow, fast = g.in_fast(row.values);
    const std::int64_t left = arena.fast_left();
    if (bytes(bins_) <= left && !wide)
      memory_ = bytes(bins_) + items_bytes(row.n) <= left && fast ? Memory::all_fast : Memory::grid_fast;
    moments_ = arena.take<T>(4 * bins_ * order);
    residual_moments_ = moments_ + bins_ * order;
    field_ = residual_moments_ + bins_ * order;
    residual_field_ = field_ + bins_ * order;
    below_ = arena.take<double>(bins_);
    mass_ = arena.take<double>(bins_);
    places_ = arena.take<int>(bins_);
    const int* held = layout.places;
    each(g, bins_, [=, this](int b) { places_[b] = held != nullptr ? held[b] : b; });
    starts_ = arena.take<int>(bins_ + 1);
    items_ = {arena.take<std::uint16_t>(wide ? 2 * std::int64_t(row.n) : row.n), wide};
    ordered_ = fast || bins_ > kRegisterBins<T>;
    if (ordered_) in_memory(row.values, [this]<Memory memory>(Constant<memory>) { order_elements<memory>(); });
    with_weights(row, [this](auto weight) { spread(weight, moments_); });
  }

  // out[j] = sum_k w_k sigmoid(s_j - s_k)
  PCOH_APART void ranks(T* out) {
    sum_far_moments();
    convolve<1>(tables_.sigmoid);
    if (has_far_) {
      each(g_, bins_, [=, this](int b) { field_[b * order] += T(below_[first_within(places_, b, reach)]); });
      g_.sync();
    }
    in_memory(out, [&]<Memory memory>(Constant<memory>) { gather_ranks<memory>(out); });
  }

  // See ../row.h. Moments against coefficients, no gather; then, by the order of bins, the rest. After ranks(), and the
  // last that is asked for.
  PCOH_APART double cross_total(const double* ranks, double weight) {
    g_.sync();  // the field of the ranks has been read
    convolve<1>(tables_.softplus);
    double sum = 0;
    for (int i = g_.thread(); i < bins_ * order; i += g_.threads()) sum += double(moments_[i]) * double(field_[i]);
    weigh_bins();
    const auto own = [this](int b) { return mass_[b]; };
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
    convolve<2>(tables_.slope);
    const T* both = g_.in_fast(r) ? out : r;
    in_memory(both, [&]<Memory memory>(Constant<memory>) { gather_pulls<memory>(r, out); });
  }

 private:
  static constexpr int order = GridOrder<T>::order;
  static constexpr int reach = DeviceGrid<T>::reach;
  static constexpr int packed = 16 / sizeof(T);  // terms of one load

  static PCOH_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  // Up to this many elements 16 bits number them.
  static constexpr int kNarrow = 1 << 16;
  // Numbers of elements.
  struct Items {
    std::uint16_t* narrow;  // [n]
    bool wide;              // int in its place

    PCOH_DEVICE int operator[](int i) const { return wide ? reinterpret_cast<const int*>(narrow)[i] : narrow[i]; }
    PCOH_DEVICE void put(int i, int k) const {
      if (wide)
        reinterpret_cast<int*>(narrow)[i] = k;
      else
        narrow[i] = static_cast<std::uint16_t>(k);
    }
  };

  // What is in fast memory: the row and all of the grid, the grid but for the order, or who knows.
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

  template <Memory memory>
  PCOH_DEVICE Items items_of() const {
    return {element<memory>(items_.narrow), memory == Memory::any && items_.wide};
  }

  // The first bin no more than `most` bins before b.
  static PCOH_DEVICE int first_within(const int* places, int b, int most) {
    int c = b > most ? b - most : 0;
    while (places[c] < places[b] - most) ++c;
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
      if constexpr (memory != Memory::all_fast)
        if (!ordered_) return spread_in_registers<memory>(value, out);
      spread_in_order<memory>(value, out);
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

  template <Memory memory, class V>
  PCOH_DEVICE void spread_in_order(V value, T* out) {
    sum_in_order<memory, order>(
        [=](int k, T x, T(&sum)[order]) {
          T term = value(k);
          unrolled<order>([&](auto p) {
            sum[p] += term;
            term *= x;
          });
        },
        out);
  }

  // mass_[b]: the weights of bin b in float64. Moments and fields may be lost.
  PCOH_DEVICE void weigh_bins() {
    g_.sync();
    with_weights(row_, [&](auto weight) {
      in_memory(row_.values, [&]<Memory memory>(Constant<memory>) {
        if constexpr (memory != Memory::all_fast)
          if (!ordered_) {
            order_elements<memory>();
            g_.sync();
          }
        sum_in_order<memory, 1>([=](int k, T, double (&sum)[1]) { sum[0] += double(weight(k)); }, mass_);
      });
    });
    g_.sync();
  }

  // out [bins, count]: add(k, x_k, sum [count]) for the elements of each bin. They are neighbours in their order, and
  // `order` lanes add them up: those of 4 bins (64-bit: 2) at a time, because most bins may hold few. So that a full
  // bin does not keep its lanes busy while others have nothing to do, bins are cut at every 2^cut-th element: what
  // comes before the first cut of a bin goes to `out`, what follows a cut to a place of its own, from where it is
  // added.
  template <Memory memory, int count, class S, class Add>
  PCOH_APART void sum_in_order(Add add, S* out) {
    constexpr int parts = kWarp / order;
    const T* codes = element<memory>(row_.values);
    const Cells<T> code = row_.cells;
    const Items items = items_of<memory>();
    const int* starts = cell<memory>(starts_);
    const int cut = cut_of(row_.n), cuts = (row_.n - 1) >> cut, pieces = cuts + bins_;
    S* after_cut = reinterpret_cast<S*>(g_.scratch());  // [cuts, count]
    const auto bin_at = [=](int i) { return code.local(codes[items[i]]).bin; };
    const int part = g_.lane() / order, q = g_.lane() % order;
    for (int first = g_.warp() * parts; first < pieces; first += g_.warps() * parts) {
      const int i = first + part;
      int bin = 0, begin = 0, end = 0;
      if (i < pieces) {
        begin = (i + 1) << cut;
        bin = i < cuts ? bin_at(begin) : i - cuts;
        if (i >= cuts) begin = starts[bin];
        end = min_of(starts[bin + 1], ((begin >> cut) + 1) << cut);
      }
      S sum[count] = {};
      for (int j = begin + q; j < end; j += order) {
        const int k = items[j];
        add(k, code.local(codes[k]).x, sum);
      }
      total_by_lane<order>(g_, sum);
      if (i < pieces && q < count) (i < cuts ? after_cut + i * count : out + bin * count)[q] = sum[0];
    }
    g_.sync();
    each(g_, cuts * count, [=](int i) {
      int next = i / count;
      const int p = i % count, cut_at = (next + 1) << cut, bin = bin_at(cut_at);
      if (starts[bin] >= cut_at || starts[bin] < cut_at - (1 << cut)) return;  // not the first cut of the bin
      S all = out[bin * count + p];
      for (; (next + 1) << cut < starts[bin + 1]; ++next) all += after_cut[next * count + p];
      out[bin * count + p] = all;
    });
  }

  // The least power of two (its logarithm) that cuts n elements into no more pieces than there is memory for (128, in
  // float64 32). Of fewer than 64 elements, 8 a lane (4), the sum over lanes would cost more than the elements.
  static PCOH_DEVICE int cut_of(int n) {
    constexpr int most = kScratchBytes / (order * sizeof(T));
    int cut = 6;
    while ((n - 1) >> cut > most) ++cut;
    return cut;
  }

  // items_, starts_: a stable counting sort. Every warp counts the bins of its own part of the row, and then puts its
  // elements where those of the bins and warps before it end.
  template <Memory memory>
  PCOH_APART void order_elements() {
    static_assert(4 * order * sizeof(T) >= 32 * sizeof(int), "counters of 32 warps lie where moments and fields will");
    const T* codes = element<memory>(row_.values);
    const Cells<T> code = row_.cells;
    const int bins = bins_, warps = g_.warps();
    int* counts = reinterpret_cast<int*>(cell<memory>(moments_));  // [warps, bins]
    int* own = counts + g_.warp() * bins;
    const int lanes = g_.threads(), share = (row_.n + lanes - 1) / lanes * kWarp;
    const int begin = share * g_.warp(), end = min_of(begin + share, row_.n);
    for (int b = g_.lane(); b < bins; b += kWarp) own[b] = 0;
    g_.sync_warp();
    for (int k = begin + g_.lane(); k < end; k += kWarp) g_.add(own + code.local(codes[k]).bin, 1);
    g_.sync();
    number_bins(counts, cell<memory>(starts_));
    const Items items = items_of<memory>();
    const unsigned before = (1u << g_.lane()) - 1;
    for (int first = begin; first < end; first += kWarp) {
      const int k = first + g_.lane();
      const int bin = k < end ? code.local(codes[k]).bin : -1;
      const unsigned alike = g_.match(bin);
      const int place = bin < 0 ? 0 : own[bin] + ones(alike & before);
      if (bin >= 0) items.put(place, k);
      g_.sync_warp();
      if (bin >= 0 && alike >> g_.lane() == 1) own[bin] = place + 1;  // the last of its bin
      g_.sync_warp();
    }
  }

  // counts [warps, bins] of elements become how many come before those: in all bins before, and in the bin of the warps
  // before.
  PCOH_DEVICE void number_bins(int* counts, int* starts) {
    const int bins = bins_, warps = g_.warps();
    const auto counter = [=](int i) { return counts + i % warps * bins + i / warps; };  // by bins, then by warps
    running_sums(
        g_, bins * warps, [=](int i) { return *counter(i); },
        [=](int i, int before) {
          if (i % warps == 0) starts[i / warps] = before;
          *counter(i) = before;
        });
    if (g_.thread() == 0) starts[bins] = row_.n;
    g_.sync();
  }

  // below_[b]: sum over bins before b of the moments
  PCOH_APART void sum_far_moments() {
    if (!has_far_) return;
    running_sums(
        g_, bins_, [this](int b) { return double(moments_[b * order]); },
        [this](int b, double sum) { below_[b] = sum; });
    g_.sync();
  }

  // field[b] = sum over bins b' within reach of table[b - b'] applied to moments[b']; with 2 fields of the residual
  // moments, too.
  template <int fields>
  PCOH_DEVICE void convolve(const T* table) {
    if (memory_ == Memory::any)
      convolve<fields, Memory::any>(table);
    else
      convolve<fields, Memory::grid_fast>(table);
    g_.sync();
  }
  // A thread has half of a bin's terms: those that far bins contribute to, or the others.
  template <int fields, Memory memory>
  PCOH_APART void convolve(const T* table) {
    constexpr int own = order / 2, near = DeviceGrid<T>::near;
    T* moments = cell<memory>(moments_);
    const int* places = cell<memory>(places_);
    const int bins = bins_, size = bins * order;
    each(g_, 2 * bins, [=](int i) {
      const bool low = i < bins;
      const int b = low ? i : i - bins, q = low ? 0 : own, within = low ? reach : near, here = places[b];
      T sum[fields * own] = {};
      for (int c = first_within(places, b, within); c < bins; ++c) {
        const int difference = here - places[c];
        if (difference < -within) break;
        const T *rows = table + ((difference + reach) * order + q) * order, *m = moments + c * order;
        const auto add = [&]<int part>(std::integral_constant<int, part>) {
          unrolled<own / packed>([&](auto j) {
            constexpr int r = part * own + j * packed;
            Pack<T, packed> row[own];
            unrolled<own>([&](auto o) { row[o] = load<packed>(rows + o * order + r); });
            unrolled<fields>([&](auto f) {
              const Pack<T, packed> moment = load<packed>(m + f * size + r);
              unrolled<own>([&](auto o) {
                unrolled<packed>([&](auto k) { sum[f * own + o] += row[o].value[k] * moment.value[k]; });
              });
            });
          });
        };
        add(std::integral_constant<int, 0>{});
        if (difference <= near && difference >= -near) add(std::integral_constant<int, 1>{});
      }
      T* field = moments + 2 * size + b * order + q;
      unrolled<fields>([&](auto f) { unrolled<own>([&](auto o) { field[f * size + o] = sum[f * own + o]; }); });
    });
  }

  static PCOH_DEVICE T evaluate(const T* field, const Local<T>& here) {
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
  const bool has_far_;  // whether there may be bins beyond reach of others
  Memory memory_ = Memory::any;
  T *moments_, *residual_moments_, *field_, *residual_field_;  // [bins, order], one behind the other
  double *below_, *mass_;                                      // [bins]
  int* places_;                                                // [bins] where they are laid
  // Once ordered: elements in the order of their bins, and where each bin begins in it.
  bool ordered_ = false;
  Items items_;  // [n]
  int* starts_;  // [bins + 1]
};

}  // namespace pcoherence::cuda
