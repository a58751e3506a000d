// One anchor's distances to all candidates: features made ready, products finished, or every difference.
#pragma once

#include "simd.h"

namespace pcoherence::PCOH_ISA {
namespace {

// ---------------------------------------------------------------- features

// A row in float64, 8 at a time, the rest one by one: body(f, x) with x a dvec, then tail(f, x) with x a double.
template <class T, class Body, class Tail>
void for_each_double(const T* x, std::int64_t width, Body&& body, Tail&& tail) {
  std::int64_t f = 0;
  for (; f + 8 <= width; f += 8) body(f, widened(load_as<typename Simd<T>::octet>(x + f)));
  for (; f < width; ++f) tail(f, double(x[f]));
}

template <class T>
void add_to(double* sum, const T* x, std::int64_t width) {
  for_each_double(
      x, width, [&](std::int64_t f, dvec v) { store(sum + f, load(sum + f) + v); },
      [&](std::int64_t f, double v) { sum[f] += v; });
}

template <class T>
double squared_distance_to(const T* x, const double* centre, std::int64_t width) {
  dvec sum{};
  double rest = 0;
  for_each_double(
      x, width,
      [&](std::int64_t f, dvec v) {
        const dvec diff = v - load(centre + f);
        sum += diff * diff;
      },
      [&](std::int64_t f, double v) { rest += (v - centre[f]) * (v - centre[f]); });
  return sum_lanes(sum) + rest;
}

template <class T>
double shift(T* out, const T* x, double length, const double* centre, double scale, std::int64_t width) {
  using Octet = typename Simd<T>::octet;
  const bool divide = length != 1;  // by the length, not times its inverse: x / |x| is +-1 in one dimension
  dvec sum{};
  double rest = 0;
  // + 0 turns -0 into 0, so that equal rows are equal bit by bit.
  for_each_double(
      x, width,
      [&](std::int64_t f, dvec v) {
        if (divide) v /= length;
        const Octet y = __builtin_convertvector((v - load(centre + f)) * scale, Octet) + T(0);
        store(out + f, y);
        const dvec wide = widened(y);
        sum += wide * wide;
      },
      [&](std::int64_t f, double v) {
        if (divide) v /= length;
        out[f] = static_cast<T>((v - centre[f]) * scale) + T(0);
        rest += double(out[f]) * double(out[f]);
      });
  return sum_lanes(sum) + rest;
}

// FNV-1a over 16 interleaved streams of 32-bit words, then over their results.
template <class T>
std::uint64_t hash_row(const T* x, std::int64_t width) {
  typedef std::uint32_t Words __attribute__((vector_size(64)));
  constexpr std::uint32_t prime = 16777619u;
  Words streams = Words{} + 2166136261u;
  const std::int64_t words = width * std::int64_t(sizeof(T) / 4);
  const char* p = reinterpret_cast<const char*>(x);
  std::int64_t i = 0;
  for (; i + 16 <= words; i += 16) streams = (streams ^ load_as<Words>(p + 4 * i)) * prime;
  std::uint32_t rest[16] = {};
  std::memcpy(rest, p + 4 * i, 4 * (words - i));
  streams = (streams ^ load_as<Words>(rest)) * prime;
  std::uint64_t h = 14695981039346656037ull;
  for (int l = 0; l < 16; ++l) h = (h ^ streams[l]) * 1099511628211ull;
  return h;
}

// ---------------------------------------------------------------- distances

template <class T>
void dot_products(T* out, const T* x, const T* others, std::int64_t n, std::int64_t width) {
  for (std::int64_t k = 0; k < n; ++k) {
    const T* other = others + k * width;
    vec_t<T> sum{};
    T rest = 0;
    std::int64_t f = 0;
    for (; f + lanes_v<T> <= width; f += lanes_v<T>) sum += load(x + f) * load(other + f);
    for (; f < width; ++f) rest += x[f] * other[f];
    Sum total;
    total.add(sum);
    out[k] = static_cast<T>(total.total()) + rest;
  }
}

template <class T>
double squared_distance(const Point<T>& a, const Point<T>& b, std::int64_t width) {
  const bool divide = a.length != 1 || b.length != 1;
  dvec sum{};
  double rest = 0;
  for_each_double(
      a.x, width,
      [&](std::int64_t f, dvec v) {
        const dvec u = widened(load_as<typename Simd<T>::octet>(b.x + f));
        const dvec diff = divide ? v / a.length - u / b.length : v - u;
        sum += diff * diff;
      },
      [&](std::int64_t f, double v) {
        const double diff = divide ? v / a.length - double(b.x[f]) / b.length : v - double(b.x[f]);
        rest += diff * diff;
      });
  return sum_lanes(sum) + rest;
}

// Whether differences in float32 times a power of two, and their squares, fit into it.
inline bool fits_float(double scale) { return std::abs(scale) < 1e30 && std::abs(scale) > 1e-30; }

// Sums of so many squares at most are rounded in float32: 4 to a lane and accumulator.
inline constexpr std::int64_t kFloatSquares = 256;
// Below this squares of single features may have been lost: float64 tells.
inline constexpr float kLeastSquare = 1e-28f;

// The same times `scale`^2, a power of two, for near pairs. Of points as they are given differences in float32 are
// exact to a unit, and so few squares add up to hardly more.
inline double near_square(const Point<float>& a, const Point<float>& b, std::int64_t width, double scale) {
  using V = vec_t<float>;
  if (fits_float(scale) && a.length == 1 && b.length == 1) {
    const V unit = splat(static_cast<float>(scale));
    const auto square = [&](std::int64_t f) {
      const V diff = (load(a.x + f) - load(b.x + f)) * unit;
      return diff * diff;
    };
    double total = 0;
    std::int64_t f = 0;
    while (f + 16 <= width) {
      V sum[4] = {};
      const std::int64_t end = std::min(width, f + kFloatSquares);
      for (; f + 64 <= end; f += 64)
        for (int i = 0; i < 4; ++i) sum[i] += square(f + 16 * i);
      for (; f + 16 <= end; f += 16) sum[0] += square(f);
      const V all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      total += sum_lanes(low_half(all) + high_half(all));
    }
    for (; f < width; ++f) {
      const double diff = double(a.x[f] - b.x[f]) * scale;
      total += diff * diff;
    }
    if (total >= kLeastSquare) return total;
  }
  return squared_distance(a, b, width) * (scale * scale);
}
inline double near_square(const Point<double>& a, const Point<double>& b, std::int64_t width, double scale) {
  return squared_distance(a, b, width) * (scale * scale);
}

// |a|^2 + |c_k|^2 and |a - c_k|^2 for one vector of candidates. The two norms nearly cancel the product where a and c
// are near: in float64 nothing of them is lost, and only the product itself is as rounded as float32 makes it.
struct Squares {
  vec_t<float> norms, square;
};
inline Squares squares(double anchor_norm, const double* norms, const float* products) {
  const vec_t<float> p = load(products);
  const dvec low = anchor_norm + load(norms), high = anchor_norm + load(norms + 8);
  return {join(low, high), join(low - 2.0 * low_half(p), high - 2.0 * high_half(p))};
}
struct WideSquares {
  dvec norms, square;
};
inline WideSquares squares(double anchor_norm, const double* norms, const double* products) {
  const dvec sum = anchor_norm + load(norms);
  return {sum, sum - 2.0 * load(products)};
}

// Candidates whose distances are finished together, before the near ones among them are measured: norms, products and
// distances (8 KiB in float32) are in the L1 cache still.
inline constexpr int kFinishedTogether = 512;
static_assert(kFinishedTogether % kRowPadding == 0);

// Of which a row is asked for so many before it is used: they lie anywhere, and memory takes as long as several.
inline constexpr int kAhead = 3;
template <class T>
void prefetch(const T* row, std::int64_t width) {
  constexpr std::int64_t line = 64 / sizeof(T), most = 16 * line;  // of longer rows the rest comes by itself
  for (std::int64_t f = 0; f < std::min(width, most); f += line) __builtin_prefetch(row + f);
}

// Distances of pairs too near for products, by differences; of candidates from begin to end, multiples of the lanes.
template <class T>
void measure_near(const DistanceRow<T>& a, std::int64_t begin, std::int64_t end, std::vector<std::int32_t>* near) {
  using V = vec_t<T>;
  std::int32_t found[kFinishedTogether];
  const T per_factor = 1 / a.factor;
  const auto numbers = lane_numbers<index_t<T>>();
  int count = 0;
  for (std::int64_t k = begin; k < end; k += lanes_v<T>) {
    // The bound again, from the distance: at the bound itself rounding may decide otherwise, and either is right.
    const V d = load(a.row + k), rough = a.root ? d * d : d * per_factor;
    const V norms = squares(a.anchor_norm, a.candidate_norms + k, a.products + k).norms;
    count +=
        keep_where<T>(rough < norms * Nearness<T>::distance, numbers + static_cast<std::int32_t>(k), found + count);
  }
  while (count > 0 && found[count - 1] >= a.n) --count;  // padding
  for (int i = 0; i < count; ++i) {
    const std::int32_t k = found[i];
    if (i + kAhead < count) prefetch(a.candidates + found[i + kAhead] * a.width, a.width);
    if (k == a.identical) continue;
    const T square = static_cast<T>(near_square(a.anchor, a.candidate(k), a.width, a.scale));
    a.row[k] = a.root ? std::sqrt(square) : square * a.factor;
    const T norms = static_cast<T>(a.anchor_norm + a.candidate_norms[k]);
    // Of roots the gradient at 0 is 0.
    const bool pulls = square > 0 || !a.root;
    if (near != nullptr && pulls && square < norms * Nearness<T>::gradient) near->push_back(k);
  }
}

template <class T>
void finish_distances(const DistanceRow<T>& a, std::vector<std::int32_t>* near) {
  using V = vec_t<T>;
  const std::int64_t size = padded(a.n);
  for (std::int64_t k = a.n; k < size; ++k) a.products[k] = 0;
  // Of candidates from begin to end; returns how many are near.
  const auto pass = [&](std::int64_t begin, std::int64_t end, auto&& from_square) {
    ivec_t<T> counted{};
    for (std::int64_t k = begin; k < end; k += lanes_v<T>) {
      const auto [norms, raw] = squares(a.anchor_norm, a.candidate_norms + k, a.products + k);
      const V square = select(raw < V{}, V{}, raw);  // keeps NaN
      counted -= square < norms * Nearness<T>::distance;
      store(a.row + k, from_square(square));
    }
    return static_cast<std::int64_t>(sum_lanes(counted));
  };
  for (std::int64_t begin = 0; begin < size; begin += kFinishedTogether) {
    const std::int64_t end = std::min(size, begin + kFinishedTogether);
    std::int64_t nearby = a.root ? pass(begin, end, [](V square) { return vsqrt(square); })
                                 : pass(begin, end, [&](V square) { return square * a.factor; });
    for (std::int64_t k = std::max(begin, a.n); k < end; ++k) a.row[k] = 0;
    if (begin <= a.identical && a.identical < end) {
      a.row[a.identical] = 0;
      --nearby;
    }
    if (nearby > 0) measure_near(a, begin, end, near);
  }
}

template <class T>
void cityblock_distances(T* row, const T* anchor, const T* candidates, std::int64_t n, std::int64_t width) {
  using V = vec_t<T>;
  for (std::int64_t k = 0; k < n; ++k) {
    const T* c = candidates + k * width;
    V sum{};
    std::int64_t f = 0;
    for (; f + lanes_v<T> <= width; f += lanes_v<T>) {
      const V diff = load(anchor + f) - load(c + f);
      sum += select(diff < V{}, -diff, diff);
    }
    double rest = 0;
    for (; f < width; ++f) rest += std::abs(double(anchor[f] - c[f]));
    Sum total;
    total.add(sum);
    row[k] = static_cast<T>(total.total() + rest);
  }
  for (std::int64_t k = n; k < padded(n); ++k) row[k] = 0;
}

// For `strip` vectors of features from f on.
template <int strip>
void add_float_differences(float* out, const PullRow<float>& a, std::int64_t f) {
  using V = vec_t<float>;
  V own[strip], sum[strip] = {};
  for (int i = 0; i < strip; ++i) own[i] = load(a.own.x + f + 16 * i);
  for (std::int64_t k = 0; k < a.count; ++k) {
    const float* other = a.others + a.index[k] * a.width + f;
    const V pull = splat(a.pull[k] * static_cast<float>(a.scale));
    for (int i = 0; i < strip; ++i) sum[i] += pull * (own[i] - load(other + 16 * i));
  }
  for (int i = 0; i < strip; ++i) store(out + f + 16 * i, load(out + f + 16 * i) + sum[i]);
}

// For all features from f on.
template <class T>
void add_wide_differences(T* out, const PullRow<T>& a, std::int64_t f) {
  using Octet = typename Simd<T>::octet;
  const bool divide = a.lengths != nullptr;
  const auto sum = [&](auto own, auto&& other) {
    decltype(own) result{};
    for (std::int64_t k = 0; k < a.count; ++k) {
      const auto x = other(a.others + a.index[k] * a.width);
      result += double(a.pull[k]) * (divide ? own / a.own.length - x / a.length(k) : own - x);
    }
    return result * a.scale;
  };
  for_each_double(
      a.own.x + f, a.width - f,
      [&](std::int64_t g, dvec own) {
        T* to = out + f + g;
        const dvec pulled = sum(own, [&](const T* x) { return widened(load_as<Octet>(x + f + g)); });
        store(to, load_as<Octet>(to) + __builtin_convertvector(pulled, Octet));
      },
      [&](std::int64_t g, double own) {
        out[f + g] += static_cast<T>(sum(own, [&](const T* x) { return double(x[f + g]); }));
      });
}

// The differences of what is given, which are exact to a unit; of directions, in float64.
template <class T>
void add_differences(T* out, const PullRow<T>& a) {
  std::int64_t f = 0;
  if constexpr (sizeof(T) == 4) {
    if (fits_float(a.scale) && a.lengths == nullptr) {
      for (; f + 128 <= a.width; f += 128) add_float_differences<8>(out, a, f);
      for (; f + 16 <= a.width; f += 16) add_float_differences<1>(out, a, f);
    }
  }
  add_wide_differences(out, a, f);
}

template <class T>
void accumulate_signs(T* out, const T* x, const T* others, const T* v, std::int64_t stride, std::int64_t count,
                      std::int64_t width) {
  using V = vec_t<T>;
  for (std::int64_t k = 0; k < count; ++k) {
    const T weight = v[k * stride];
    if (weight == 0) continue;
    const T* other = others + k * width;
    std::int64_t f = 0;
    for (; f + lanes_v<T> <= width; f += lanes_v<T>) {
      const V a = load(x + f), b = load(other + f), w = splat<T>(weight);
      store(out + f, load(out + f) + select(a > b, w, select(a < b, -w, V{})));
    }
    for (; f < width; ++f) out[f] += x[f] > other[f] ? weight : x[f] < other[f] ? -weight : T(0);
  }
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
