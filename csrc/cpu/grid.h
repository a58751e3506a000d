// Kernel sums on a grid (docs/mathematics.rst): spread, convolve, evaluate.
//
// With x, y the local coordinates in [-1, 1] of two points whose bins differ by D, the kernel is the polynomial
//   kernel(width * (D + (x - y) / 2)) = sum_qr table[D][r][q] x^q y^r
// so that a bin needs only its moments M_r = sum_k w_k y_k^r, and R_j is a polynomial in x_j whose
// coefficients are a small matrix product away. x^0 = 1: counts are exact.
#pragma once

#include "../tables.h"
#include "few_bins.h"
#include "layout.h"

namespace pcoherence::PCOH_ISA {

template <class T>
class Grid {
 public:
  explicit Grid(Workspace& ws) : ws_(ws) {}

  void load(const Row<T>& row, const Layout<T>& layout) {
    row_ = row;
    bins_ = layout.bins;
    bin_ = layout.bin;
    x_ = layout.x;
    place_ = layout.place;
    moments_ = ws_.moments.need<T>(2 * std::size_t(bins_) * order);
    fields_ = ws_.fields.need<T>(2 * std::size_t(bins_) * order);
    residual_moments_ = moments_ + std::size_t(bins_) * order;
    residual_fields_ = fields_ + std::size_t(bins_) * order;
    spread(row_.weights, moments_);
  }

  // ranks[j] = sum_k w_k sigmoid(s_j - s_k)
  void ranks(T* out) {
    convolve(grid_table<T>(Kernel::sigmoid), moments_, fields_, Far::count);
    evaluate(fields_, out);
  }

  // See cross_total() in ../row.h. Moments against coefficients, no gather; then, by the order of bins, the rest.
  double cross_total(const double* ranks, double weight) {
    convolve(grid_table<T>(Kernel::softplus), moments_, fields_, Far::nothing);
    const Core<T> core;
    const double total = sum_each(core, bins_ * order, [&](int i) { return double(moments_[i]) * double(fields_[i]); });
    constexpr int replicas = 4;  // an addition need not wait for the one before
    auto* below = ws_.mass.need<double>(std::size_t(bins_) * replicas);
    std::fill_n(below, bins_ * replicas, 0.0);
    for (int k = 0; k < row_.n; k += replicas)
      for (int i = 0; i < replicas; ++i) below[bin_[k + i] * replicas + i] += double(row_.weights[k + i]);
    double before = 0;
    for (int b = 0; b < bins_; ++b) {  // in place: what is written has been read
      double own = 0;
      for (int i = 0; i < replicas; ++i) own += below[b * replicas + i];
      below[b] = before + own / 2;
      before += own;
    }
    const double rest = sum_each(core, row_.n, [&](int k) {
      return double(row_.weights[k]) * row_.position(k) * (below[bin_[k]] - weight * ranks[k]);
    });
    return total + 2 * rest;
  }

  // out[l] = r_l sum_k w_k slope(s_l - s_k) - w_l sum_j r_j slope(s_l - s_j)
  void pullback(const T* r, T* out) {
    const auto& table = grid_table<T>(Kernel::slope);
    spread(r, residual_moments_);
    convolve(table, moments_, fields_, Far::nothing);
    convolve(table, residual_moments_, residual_fields_, Far::nothing);
    with_evaluator([&](const auto& of) {
      const auto own = of(fields_), pulled = of(residual_fields_);
      for (int l = 0; l < row_.n; l += lanes)
        store(out + l, PCOH_ISA::load(r + l) * own(l) - PCOH_ISA::load(row_.weights + l) * pulled(l));
    });
  }

 private:
  using V = vec_t<T>;
  using Octet = typename Simd<T>::octet;
  static constexpr int lanes = lanes_v<T>;
  static constexpr int order = GridOrder<T>::order;
  static constexpr int parts = order / 8;

  // One value for each term of a bin's polynomial.
  struct Terms {
    Octet part[parts] = {};

    static Terms load(const T* p) {
      Terms t;
      for (int i = 0; i < parts; ++i) t.part[i] = load_as<Octet>(p + 8 * i);
      return t;
    }
    void store(T* p) const {
      for (int i = 0; i < parts; ++i) PCOH_ISA::store(p + 8 * i, part[i]);
    }
    void add(const Terms& other) {
      for (int i = 0; i < parts; ++i) part[i] += other.part[i];
    }
  };
  // What kernel(t) is where t is beyond reach on the far left of a point: 0 or 1.
  enum class Far { nothing, count };

  // Neighbours are added to different replicas of the bins, so that an addition need not wait for the one before.
  static constexpr int kReplicas = 8;
  // Sums of so many elements are rounded in float32, 64 or 128 to a lane or replica: of weights that are no whole
  // numbers more would lose digits.
  static constexpr int kPart = 1024;
  // Up to here adding the replicas of a part takes less than half as long as its elements.
  static constexpr int kBinsInParts = 64;
  // Replicas of so many bins take 256 KiB in float64, and stay in the L2 cache. With more neighbours hardly ever meet.
  static constexpr int kReplicatedBins = 512;

  // out[b][q] = sum over k in bin b of v_k x_k^q.
  void spread(const T* v, T* out) {
    const int n = row_.n, cells = bins_ * order;
    if (bins_ > kReplicatedBins) return spread_replicated<1, double>(0, n, v, out);
    if (bins_ > kBinsInParts) return spread_replicated<kReplicas, double>(0, n, v, out);
    const int part = sizeof(T) == 8 ? n : kPart;
    if (n <= part) return spread_part(0, n, v, out);
    double* sums = ws_.mass.need<double>(cells);
    std::fill_n(sums, cells, 0.0);
    for (int begin = 0; begin < n; begin += part) {
      spread_part(begin, std::min(n, begin + part), v, out);
      for (int i = 0; i < cells; ++i) sums[i] += double(out[i]);
    }
    for (int i = 0; i < cells; ++i) out[i] = static_cast<T>(sums[i]);
  }

  // Of elements from begin to end.
  void spread_part(int begin, int end, const T* v, T* out) {
    if constexpr (FewBins<T>::most_masked > 0) {
      if (bins_ <= FewBins<T>::most_masked) {
        FewBins<T>::spread(bin_ + begin, x_ + begin, v + begin, end - begin, bins_, out);
        return;
      }
    }
    spread_replicated<kReplicas, T>(begin, end, v, out);
  }

  // Added up as Sum: T or double.
  template <int replicas, class Sum>
  void spread_replicated(int begin, int end, const T* v, T* out) {
    using Eight = typename Simd<Sum>::octet;
    constexpr int width = replicas * order;  // of a bin
    Sum* sums = ws_.partial_sums.need<Sum>(std::size_t(bins_) * width);
    std::memset(sums, 0, sizeof(Sum) * bins_ * width);
    each_terms(begin, end, v, [&](std::int32_t bin, int i, int q, Octet terms) {
      Sum* cell = sums + std::size_t(bin) * width + (i % replicas * order + q);
      if constexpr (sizeof(Sum) == sizeof(double))
        PCOH_ISA::store(cell, load_as<Eight>(cell) + widened(terms));
      else
        PCOH_ISA::store(cell, load_as<Eight>(cell) + terms);
    });
    for (int b = 0; b < bins_; ++b)
      for (int q = 0; q < order; q += 8) {
        const Sum* cell = sums + std::size_t(b) * width + q;
        Eight sum = load_as<Eight>(cell);
        for (int i = 1; i < replicas; ++i) sum += load_as<Eight>(cell + i * order);
        PCOH_ISA::store(out + std::size_t(b) * order + q, __builtin_convertvector(sum, Octet));
      }
  }

  // f(bin, i, q, terms) for every element, the i-th of its vector: 8 of its terms v x^q, from q on.
  template <class F>
  void each_terms(int begin, int end, const T* v, F&& f) const {
    const std::int32_t* bin = bin_;  // copies, which no store can change
    const T* local = x_;
    for (int k = begin; k < end; k += lanes) {
      const V x = PCOH_ISA::load(local + k);
      V term = PCOH_ISA::load(v + k);
      for (int q = 0; q < order; q += 8) {
        V c[8];
        for (V& terms : c) {
          terms = term;
          term *= x;
        }
        transpose(c);
        for (int i = 0; i < lanes; ++i) f(bin[k + i], i, q, octet(c[i % 8], i / 8));
      }
    }
  }

  // field[b] = sum over bins b' within reach of table[b - b'] applied to moments[b'], and the far field.
  void convolve(const GridTable<T>& table, const T* moments, T* field, Far far) {
    constexpr int reach = GridTable<T>::bins_in_reach;
    const T* sums = near_fields(table, moments);
    double count = 0;  // sum of M_0 of all bins below reach
    for (int b = 0, begin = 0; b < bins_; ++b) {
      for (; place_[begin] < place_[b] - reach; ++begin) count += double(moments[std::size_t(begin) * order]);
      const T* pair = sums + 2 * std::size_t(b) * order;
      Terms sum = Terms::load(pair);
      sum.add(Terms::load(pair + order));
      if (far == Far::count) sum.part[0][0] += T(count);
      sum.store(field + std::size_t(b) * order);
    }
  }

  // Of each bin the sum over even r, and that over odd r, side by side: [bins, 2, order]. A bin gives to those within
  // its reach, its moments made ready once, for two rows of the table at a time.
  const T* near_fields(const GridTable<T>& table, const T* moments) {
    constexpr int reach = GridTable<T>::bins_in_reach;
    constexpr int width = 2 * order, vectors = width / lanes;
    T* sums = ws_.partial_sums.need<T>(std::size_t(bins_) * width);
    std::memset(sums, 0, sizeof(T) * bins_ * width);
    for (int c = 0, begin = 0, end = 0; c < bins_; ++c) {
      while (place_[begin] < place_[c] - reach) ++begin;
      while (end < bins_ && place_[end] <= place_[c] + reach) ++end;
      const T* m = moments + std::size_t(c) * order;
      V factors[order / 2][vectors];
      for (int r = 0; r < order; r += 2)
        for (int i = 0; i < vectors; ++i)
          for (int l = 0; l < lanes; ++l) factors[r / 2][i][l] = m[r + (i * lanes + l) / order];
      for (int b = begin; b < end; ++b) {
        const T* rows = table.at(place_[b] - place_[c]);
        T* to = sums + std::size_t(b) * width;
        V sum[vectors];
        for (int i = 0; i < vectors; ++i) sum[i] = PCOH_ISA::load(to + i * lanes);
        for (int r = 0; r < order; r += 2)
          for (int i = 0; i < vectors; ++i) sum[i] += PCOH_ISA::load(rows + r * order + i * lanes) * factors[r / 2][i];
        for (int i = 0; i < vectors; ++i) PCOH_ISA::store(to + i * lanes, sum[i]);
      }
    }
    return sums;
  }

  // out[k] = the polynomial of element k's bin at its own local coordinate.
  void evaluate(const T* field, T* out) {
    with_evaluator([&](const auto& of) {
      const auto at = of(field);
      for (int k = 0; k < row_.n; k += lanes) store(out + k, at(k));
    });
  }

  // f(of): at = of(field) makes at(k), the values of a field for the elements from k on.
  template <class F>
  void with_evaluator(F&& f) const {
    if constexpr (FewBins<T>::most > 0) {
      const auto in_registers = [&]<int registers>(std::integral_constant<int, registers>) {
        f([&](const T* field) {
          return [this, terms = typename FewBins<T>::template Field<registers>(field, bins_)](int k) {
            return terms.at(load_as<index_t<T>>(bin_ + k), PCOH_ISA::load(x_ + k));
          };
        });
      };
      if (bins_ <= FewBins<T>::per_register) return in_registers(std::integral_constant<int, 1>{});
      if (bins_ <= FewBins<T>::most) return in_registers(std::integral_constant<int, 2>{});
    }
    f([&](const T* field) {
      return [this, field](int k) {
        const V x = PCOH_ISA::load(x_ + k);
        V value{};
        for (int q = order - 8; q >= 0; q -= 8) {
          V c[8];
          for (int i = 0; i < 8; ++i) c[i] = rows_of(field + q, k + i);
          transpose(c);
          for (int i = 7; i >= 0; --i) value = value * x + c[i];
        }
        return value;
      };
    });
  }

  // The first or second 8 values of a vector.
  static Octet octet(V v, int which) {
    if constexpr (sizeof(Octet) == sizeof(V))
      return v;
    else
      return which == 0 ? __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)
                        : __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  }

  // 8 coefficients of element k's bin; float: those of element k + 8 beside them.
  V rows_of(const T* field, int k) const {
    const auto a = load_as<Octet>(field + std::size_t(bin_[k]) * order);
    if constexpr (sizeof(T) == 8) {
      return a;
    } else {
      const auto b = load_as<Octet>(field + std::size_t(bin_[k + 8]) * order);
      return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }

  Workspace& ws_;
  Row<T> row_{};
  int bins_ = 0;
  const std::int32_t *bin_ = nullptr, *place_ = nullptr;  // [n], [bins]; see Layout
  const T* x_ = nullptr;                                  // [n]
  T *moments_ = nullptr, *residual_moments_ = nullptr;    // [bins, order]
  T *fields_ = nullptr, *residual_fields_ = nullptr;      // [bins, order]
};

}  // namespace pcoherence::PCOH_ISA
