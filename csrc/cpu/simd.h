// Vectors of 64 bytes by compiler extension, lowered by the compiler to whatever the instruction set of this
// translation unit offers. Included once per instruction set, inside its namespace (see rows.inc).
#pragma once

namespace pcoherence::PCOH_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int lanes = 16;
  typedef float vec __attribute__((vector_size(64)));
  typedef std::int32_t ivec __attribute__((vector_size(64)));  // same lane count and width: masks, bit tricks
  typedef std::int32_t index __attribute__((vector_size(64)));
  typedef float octet __attribute__((vector_size(32)));  // 8 consecutive values of a bin's polynomial
};
template <>
struct Simd<double> {
  static constexpr int lanes = 8;
  typedef double vec __attribute__((vector_size(64)));
  typedef std::int64_t ivec __attribute__((vector_size(64)));
  typedef std::int32_t index __attribute__((vector_size(32)));
  typedef double octet __attribute__((vector_size(64)));
};

typedef double dvec __attribute__((vector_size(64)));

template <class T>
using vec_t = typename Simd<T>::vec;
template <class T>
using ivec_t = typename Simd<T>::ivec;
template <class T>
using index_t = typename Simd<T>::index;  // one 32-bit index per lane
template <class T>
inline constexpr int lanes_v = Simd<T>::lanes;

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class T>
inline vec_t<T> load(const T* p) {
  return load_as<vec_t<T>>(p);
}
template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// A store that goes past the caches, where the instruction set has one for a whole vector: for what is too large to be
// found there when it is read again. p: 64-byte aligned. Other threads see it after stream_fence().
template <class V, class T>
inline void stream(T* p, V v) {
#if defined(PCOH_AVX512)
  _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
#else
  store(p, v);
#endif
}
inline void stream_fence() {
#if defined(PCOH_AVX512)
  _mm_sfence();
#endif
}

template <class T>
inline vec_t<T> splat(T x) {
  return vec_t<T>{} + x;
}

// 0, 1, 2, ...
template <class V>
inline V lane_numbers() {
  V v{};
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = i;
  return v;
}
template <class M, class V>
inline V select(M mask, V a, V b) {
  return mask ? a : b;
}
// Whether any bit is set.
template <class M>
inline bool any(M mask) {
#if defined(PCOH_AVX512)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#else
  std::uint64_t words[sizeof(M) / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof(M));
  for (const std::uint64_t w : words) all |= w;
  return all != 0;
#endif
}
// Writes those of `values` for which `mask` holds, in order; returns how many they are. to: with room for all.
template <class T>
inline int keep_where(ivec_t<T> mask, index_t<T> values, std::int32_t* to) {
#if defined(PCOH_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 kept = _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, reinterpret_cast<__m512i>(values)));
    return __builtin_popcount(kept);
  } else {
    const __mmask8 kept = _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_maskz_compress_epi32(kept, reinterpret_cast<__m256i>(values)));
    return __builtin_popcount(kept);
  }
#else
  if (!any(mask)) return 0;
  int count = 0;
  for (int i = 0; i < lanes_v<T>; ++i) {
    to[count] = values[i];
    count += mask[i] != 0;
  }
  return count;
#endif
}
// On NaN these return the second operand: clamping maps NaN to a bound.
template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}
template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}

// Through memory, so that the loop is one the compiler vectorises (lane by lane it is not).
template <class T>
inline vec_t<T> vsqrt_loop(vec_t<T> x) {
  alignas(64) T a[lanes_v<T>];
  store(a, x);
  for (int i = 0; i < lanes_v<T>; ++i) a[i] = std::sqrt(a[i]);
  return load(a);
}
inline vec_t<float> vsqrt(vec_t<float> x) { return vsqrt_loop<float>(x); }
inline vec_t<double> vsqrt(vec_t<double> x) { return vsqrt_loop<double>(x); }

// In float64. GCC would convert two halves and join them: this is one instruction.
inline dvec widened(Simd<float>::octet v) {
#if defined(PCOH_AVX512)
  return _mm512_cvtps_pd(v);
#else
  return __builtin_convertvector(v, dvec);
#endif
}
inline dvec widened(index_t<double> v) {
#if defined(PCOH_AVX512)
  return _mm512_cvtepi32_pd(reinterpret_cast<__m256i>(v));
#else
  return __builtin_convertvector(v, dvec);
#endif
}
inline dvec widened(dvec v) { return v; }
inline dvec low_half(vec_t<float> v) { return widened(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)); }
inline dvec high_half(vec_t<float> v) { return widened(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)); }

inline vec_t<float> join(dvec low, dvec high) {
  using Octet = Simd<float>::octet;
  return __builtin_shufflevector(__builtin_convertvector(low, Octet), __builtin_convertvector(high, Octet), 0, 1, 2, 3,
                                 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <class V>
inline auto sum_lanes(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}
inline double sum_lanes(dvec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Sums in float64 whatever the element type: row sums then cost no accuracy and need no blocking.
struct Sum {
  dvec a{}, b{};
  void add(vec_t<float> v) {
    a += low_half(v);
    b += high_half(v);
  }
  void add(vec_t<double> v) { a += v; }
  void add_product(vec_t<float> v, vec_t<float> w) {
    a += low_half(v) * low_half(w);
    b += high_half(v) * high_half(w);
  }
  void add_product(vec_t<double> v, vec_t<double> w) { a += v * w; }
  double total() const { return sum_lanes(a + b); }
};

// Smallest lane / largest lane.
template <class V>
inline auto min_lane(V v) {
  auto m = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) m = v[i] < m ? v[i] : m;
  return m;
}
template <class V>
inline auto max_lane(V v) {
  auto m = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) m = v[i] > m ? v[i] : m;
  return m;
}
// exp(x) for x <= 0, to about one unit in the last place: x = k log 2 + r, |r| <= log(2) / 2, Taylor series in r
// (order set by the type: the first term left out is below epsilon / 2), scaled by 2^k through the exponent bits.
template <class T>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  static constexpr int order = 7, mantissa = 23, bias = 127;
  static constexpr float lowest = -87.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct ExpTraits<double> {
  static constexpr int order = 13, mantissa = 52, bias = 1023;
  static constexpr double lowest = -708.0, ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
};

template <class T>
inline vec_t<T> exp_nonpositive(vec_t<T> x) {
  using E = ExpTraits<T>;
  x = vmax(x, splat<T>(E::lowest));
  const vec_t<T> shifted = x * T(1.4426950408889634074) + E::round;
  const vec_t<T> k = shifted - E::round;
  const vec_t<T> r = (x - k * E::ln2_high) - k * E::ln2_low;
  T coefficient[E::order + 1];
  coefficient[0] = 1;
  for (int i = 1; i <= E::order; ++i) coefficient[i] = coefficient[i - 1] / i;
  vec_t<T> p = splat<T>(coefficient[E::order]);
  for (int i = E::order - 1; i >= 0; --i) p = p * r + coefficient[i];
  const ivec_t<T> exponent = __builtin_convertvector(k, ivec_t<T>) + E::bias;
  return p * reinterpret_cast<vec_t<T>>(exponent << E::mantissa);
}

// What lies `step` lanes below; 0 where nothing does.
template <int step, class V, std::size_t... l>
inline V lanes_below(V v, std::index_sequence<l...>) {
  constexpr int n = sizeof...(l);
  return __builtin_shufflevector(V{}, v, (int(l) < step ? int(l) : n + int(l) - step)...);
}

template <class V, int step, std::size_t... l>
inline void exchange(V& a, V& b, std::index_sequence<l...>) {
  constexpr int n = sizeof...(l);
  const V x = __builtin_shufflevector(a, b, ((l & step) ? n + (l ^ step) : l)...);
  const V y = __builtin_shufflevector(a, b, ((l & step) ? n + l : (l ^ step))...);
  a = x;
  b = y;
}
// Exchanges rows and columns of a square of values, or of several side by side where a vector holds more than `rows`.
template <int step = 1, class V, int rows>
inline void transpose(V (&v)[rows]) {
  constexpr auto lanes = std::make_index_sequence<sizeof(V) / sizeof(v[0][0])>{};
  for (int i = 0; i < rows; ++i)
    if (!(i & step)) exchange<V, step>(v[i], v[i + step], lanes);
  if constexpr (2 * step < rows) transpose<2 * step>(v);
}

}  // namespace pcoherence::PCOH_ISA
