// Kernel sums on a grid (docs/mathematics.rst): spread, convolve, gather.
//
// With x, y the local coordinates in [-1, 1] of two points whose bins differ by D, the kernel is the polynomial
//   kernel(width * (D + (x - y) / 2)) = sum_qr table[D][r][q] x^q y^r
// so that a bin needs only its moments M_r = sum_k w_k y_k^r, and R_j is a polynomial in x_j whose
// coefficients are a small matrix product away. x^0 = 1: counts are exact.
// Where bins are many, those that hold nobody are left out: a far point costs its own bin, not the way to it.
#pragma once

#include "../tables.h"
#include "core.h"

namespace pcoherence::PCOH_ISA {

// Where bins are few, registers hold them: an element finds its coefficients by a permutation instead of gathering
// them, and where they are very few it adds its powers to every bin, masked, instead of scattering them.
template <class T>
struct FewBins {
  static constexpr int most = 0, most_masked = 0;
};
#if defined(PCOH_AVX512)
template <>
struct FewBins<float> {
  static constexpr int order = GridOrder<float>::order;
  static constexpr int most = 32;        // two registers for each coefficient
  static constexpr int most_masked = 6;  // with more, masks take as long as scattering (measured)

  // moments [bins, order]; bin, x, v: [n]
  static void spread(const std::int32_t* bin, const float* x, const float* v, int n, int bins, float* moments) {
    // Of three bins 24 registers hold the sums.
    for (int b = 0; b < bins;) {
      const int left = bins - b, together = left % 3 == 0 || left > 4 ? 3 : left >= 2 ? 2 : 1;
      float* to = moments + b * order;
      if (together == 3)
        spread_to<3>(bin, x, v, n, b, to);
      else if (together == 2)
        spread_to<2>(bin, x, v, n, b, to);
      else
        spread_to<1>(bin, x, v, n, b, to);
      b += together;
    }
  }

  // What evaluates the polynomials of one field [bins, order]; a register holds 16 of the bins.
  template <int registers>
  class Field {
   public:
    Field(const float* field, int bins) {
      alignas(64) float columns[order][16 * registers] = {};
      for (int b = 0; b < bins; ++b)
        for (int q = 0; q < order; ++q) columns[q][b] = field[b * order + q];
      for (int q = 0; q < order; ++q)
        for (int i = 0; i < registers; ++i) column_[q][i] = load(columns[q] + 16 * i);
    }
    vec_t<float> at(index_t<float> bin, vec_t<float> x) const {
      vec_t<float> value = of(order - 1, bin);
      for (int q = order - 2; q >= 0; --q) value = value * x + of(q, bin);
      return value;
    }

   private:
    vec_t<float> of(int q, index_t<float> bin) const {
      const auto which = reinterpret_cast<__m512i>(bin);
      if constexpr (registers == 1)
        return _mm512_permutexvar_ps(which, column_[q][0]);
      else
        return _mm512_permutex2var_ps(column_[q][0], which, column_[q][1]);
    }
    vec_t<float> column_[order][registers];
  };

 private:
  template <int together>
  static void spread_to(const std::int32_t* bin, const float* x, const float* v, int n, int first, float* moments) {
    __m512 sum[together][order];
    for (auto& terms : sum)
      for (auto& term : terms) term = _mm512_setzero_ps();
    for (int k = 0; k < n; k += 16) {
      const __m512i own = _mm512_loadu_si512(bin + k);
      const __m512 at = _mm512_loadu_ps(x + k);
      __m512 power = _mm512_loadu_ps(v + k);
      __mmask16 here[together];
      for (int i = 0; i < together; ++i) here[i] = _mm512_cmpeq_epi32_mask(own, _mm512_set1_epi32(first + i));
      for (int q = 0; q < order; ++q) {
        for (int i = 0; i < together; ++i) sum[i][q] = _mm512_mask_add_ps(sum[i][q], here[i], sum[i][q], power);
        power = _mm512_mul_ps(power, at);
      }
    }
    for (int i = 0; i < together; ++i)
      for (int q = 0; q < order; ++q) moments[i * order + q] = _mm512_reduce_add_ps(sum[i][q]);
  }
};
#endif

// The bins of a row's elements, and where in them they lie. It lives in the workspace.
template <class T>
class Layout {
 public:
  int bins;                   // that are held; all that are laid where these are few
  const std::int32_t* bin;    // [n]
  const T* x;                 // [n], in [-1, 1]
  const std::int32_t* place;  // [bins] in the grid as it is laid, ascending

  Layout(const Row<T>& row, Workspace& ws) {
    const int laid = static_cast<int>(row.scale.range / kBinWidth) + 1;
    auto* own_bin = ws.bins.need<std::int32_t>(row.n);
    T* own_x = ws.locals.need<T>(row.n);
    const double per_value = row.scale.per_distance / kBinWidth;
    if (laid <= FewBins<T>::most && per_value <= double(std::numeric_limits<T>::max())) {
      put(row, static_cast<T>(per_value), laid, own_bin, own_x);  // of few bins it is as exact as their differences are
    } else {
      put_in_double(row, per_value, laid, own_bin, own_x);
    }
    auto* own_place = ws.places.need<std::int32_t>(laid);
    if (laid > kDenseBins) {
      bins = leave_out_empty(own_bin, row.n, laid, own_place, ws);
    } else {
      bins = laid;
      for (int b = 0; b < laid; ++b) own_place[b] = b;
    }
    bin = own_bin;
    x = own_x;
    place = own_place;
  }

 private:
  using V = vec_t<T>;
  static constexpr int lanes = lanes_v<T>;
  // Up to here the bins cost less than finding out which of them are empty.
  static constexpr int kDenseBins = 128;

  struct Place {
    dvec bin, x;
  };

  static void put(const Row<T>& row, T per_value, int laid, std::int32_t* bin, T* x) {
    const V last = splat(T(laid - 1)), end = splat(T(laid));
    for (int k = 0; k < row.n; k += lanes) {
      // Only candidates of weight 0 can lie outside.
      const V t = vmin(vmax((load(row.values + k) - row.low) * per_value, V{}), end);
      const index_t<T> own = __builtin_convertvector(vmin(t, last), index_t<T>);
      store(bin + k, own);
      store(x + k, (t - __builtin_convertvector(own, V)) * T(2) - T(1));
    }
  }

  // The same in float64: a bin far from the lowest value resolves as much of its values as the first.
  static void put_in_double(const Row<T>& row, double per_value, int laid, std::int32_t* bin, T* x) {
    const dvec low = dvec{} + double(row.low), last = dvec{} + double(laid - 1), end = dvec{} + double(laid);
    const auto place_of = [&](dvec v) {
      const dvec t = vmin(vmax((v - low) * per_value, dvec{}), end);
      const dvec floor = vmin(widened(__builtin_convertvector(t, index_t<double>)), last);
      return Place{floor, (t - floor) * 2.0 - 1.0};
    };
    for (int k = 0; k < row.n; k += lanes) {
      const V v = load(row.values + k);
      if constexpr (sizeof(T) == 4) {
        const Place a = place_of(low_half(v)), b = place_of(high_half(v));
        store(bin + k, __builtin_convertvector(join(a.bin, b.bin), index_t<T>));
        store(x + k, join(a.x, b.x));
      } else {
        const Place a = place_of(v);
        store(bin + k, __builtin_convertvector(a.bin, index_t<T>));
        store(x + k, a.x);
      }
    }
  }

  // Numbers the bins that hold somebody anew, from the lowest on; `place` keeps where each of them was laid. Returns
  // how many there are.
  static int leave_out_empty(std::int32_t* bin, int n, int laid, std::int32_t* place, Workspace& ws) {
    constexpr int together = 64;  // most hold nobody: so many at a time are passed over
    typedef char Flags __attribute__((vector_size(together)));
    const int padded_laid = (laid + together - 1) / together * together;
    char* held = ws.held.need<char>(padded_laid);
    std::memset(held, 0, padded_laid);
    for (int k = 0; k < n; ++k) held[bin[k]] = 1;
    auto* number = ws.numbers.need<std::int32_t>(laid);
    std::int32_t count = 0;
    for (int first = 0; first < laid; first += together) {
      if (!any(load_as<Flags>(held + first))) continue;
      for (int b = first; b < std::min(laid, first + together); ++b) {
        number[b] = count;
        place[count] = b;  // kept if it is held
        count += held[b];
      }
    }
#pragma GCC ivdep
    for (int k = 0; k < n; ++k) bin[k] = number[bin[k]];
    return count;
  }
};

template <class T>
class Grid {
 public:
  explicit Grid(Workspace& ws) : ws_(ws) {}

  void load(const Row<T>& row) { load(row, Layout<T>(row, ws_)); }
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
    with_field(fields_, [&](const auto& own) {
      with_field(residual_fields_, [&](const auto& pulled) {
        for (int l = 0; l < row_.n; l += lanes)
          store(out + l, PCOH_ISA::load(r + l) * own(l) - PCOH_ISA::load(row_.weights + l) * pulled(l));
      });
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
    void add(const Terms& other, T factor) {
      for (int i = 0; i < parts; ++i) part[i] += other.part[i] * factor;
    }
  };
  // What kernel(t) is where t is beyond reach on the far left of a point: 0 or 1.
  enum class Far { nothing, count };

  // out[b][q] = sum over k in bin b of v_k x_k^q. Neighbours k go to different replicas of the bins, so that an
  // addition need not wait for the one before; many bins make such conflicts rare, and replicas dear.
  void spread(const T* v, T* out) {
    if constexpr (FewBins<T>::most_masked > 0) {
      if (bins_ <= FewBins<T>::most_masked) {
        FewBins<T>::spread(bin_, x_, v, row_.n, bins_, out);
        return;
      }
    }
    if (bins_ <= 512)
      spread_replicated<8>(v, out);
    else
      spread_replicated<1>(v, out);
  }

  template <int replicas>
  void spread_replicated(const T* v, T* out) {
    T* acc = replicas == 1 ? out : ws_.replicas.need<T>(std::size_t(bins_) * replicas * order);
    std::memset(acc, 0, sizeof(T) * bins_ * replicas * order);
    const std::int32_t* bin = bin_;  // a copy, which no store can change
    for (int k = 0; k < row_.n; k += lanes) {
      const V x = PCOH_ISA::load(x_ + k);
      V term = PCOH_ISA::load(v + k);
      for (int q = 0; q < order; q += 8) {
        V c[8];
        for (V& terms : c) {
          terms = term;
          term *= x;
        }
        transpose(c);  // into 8 terms of each element
        for (int i = 0; i < lanes; ++i) {
          T* cell = acc + std::size_t(bin[k + i]) * (replicas * order) + (i % replicas * order + q);
          PCOH_ISA::store(cell, load_as<Octet>(cell) + octet(c[i % 8], i / 8));
        }
      }
    }
    if constexpr (replicas > 1)
      for (int b = 0; b < bins_; ++b) {
        const T* cell = acc + std::size_t(b) * replicas * order;
        Terms sum = Terms::load(cell);
        for (int i = 1; i < replicas; ++i) sum.add(Terms::load(cell + i * order), T(1));
        sum.store(out + std::size_t(b) * order);
      }
  }

  // field[b] = sum over bins b' within reach of table[b - b'] applied to moments[b'], and the far field. A bin's
  // moments stay in registers while it gives to all others; even and odd r are added up apart, side by side.
  void convolve(const GridTable<T>& table, const T* moments, T* field, Far far) {
    constexpr int reach = GridTable<T>::bins_in_reach;
    constexpr int width = 2 * order, vectors = width / lanes;
    T* sums = ws_.replicas.need<T>(std::size_t(bins_) * width);
    std::memset(sums, 0, sizeof(T) * bins_ * width);
    for (int c = 0, begin = 0, end = 0; c < bins_; ++c) {
      while (place_[begin] < place_[c] - reach) ++begin;
      while (end < bins_ && place_[end] <= place_[c] + reach) ++end;
      const T* m = moments + std::size_t(c) * order;
      V factors[order / 2][vectors];  // of two rows of the table
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
    double count = 0;  // sum of M_0 of all bins below reach
    for (int b = 0, begin = 0; b < bins_; ++b) {
      for (; place_[begin] < place_[b] - reach; ++begin) count += double(moments[std::size_t(begin) * order]);
      Terms sum = Terms::load(sums + std::size_t(b) * width);
      sum.add(Terms::load(sums + std::size_t(b) * width + order), T(1));
      if (far == Far::count) sum.part[0][0] += T(count);
      sum.store(field + std::size_t(b) * order);
    }
  }

  // out[k] = the polynomial of element k's bin at its own local coordinate.
  void evaluate(const T* field, T* out) {
    with_field(field, [&](const auto& at) {
      for (int k = 0; k < row_.n; k += lanes) store(out + k, at(k));
    });
  }

  // f(at), at(k) being the values of a field for the elements from k on.
  template <class F>
  void with_field(const T* field, F&& f) const {
    if constexpr (FewBins<T>::most > 0) {
      const auto few = [&](const auto& terms) {
        f([&](int k) { return terms.at(load_as<index_t<T>>(bin_ + k), PCOH_ISA::load(x_ + k)); });
      };
      if (bins_ <= 16) return few(typename FewBins<T>::template Field<1>(field, bins_));
      if (bins_ <= FewBins<T>::most) return few(typename FewBins<T>::template Field<2>(field, bins_));
    }
    f([&](int k) {
      const V x = PCOH_ISA::load(x_ + k);
      V value{};
      for (int q = order - 8; q >= 0; q -= 8) {
        V c[8];
        for (int i = 0; i < 8; ++i) c[i] = rows_of(field + q, k + i);
        transpose(c);
        for (int i = 7; i >= 0; --i) value = value * x + c[i];
      }
      return value;
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
