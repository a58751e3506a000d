// Which of many buckets, in ascending order, a value of a row goes to: so that few share one.
#pragma once

#include "core.h"

namespace pcoherence::PCOH_ISA {

// Buckets for each value: more make them emptier and the counters longer (2 measured best).
inline constexpr int kBucketsPerValue = 2;

// Buckets of equal width, from the lowest value to the highest.
template <class T>
struct EqualWidths {
  T low, per_width;

  EqualWidths(const Stats<T>& s, int buckets) : low(s.low), per_width(T(buckets) / (s.high - s.low)) {}
  // Not where the range, or its inverse, is more than T holds.
  bool possible() const { return per_width > 0 && per_width <= std::numeric_limits<T>::max(); }
  vec_t<T> operator()(vec_t<T> v) const { return (v - low) * per_width; }
};

// Values that are looked at: two for each part of EqualShares.
inline constexpr int kSample = 64;
// From so many values on: in shorter rows the sample takes longer than what it saves (measured).
inline constexpr int kSampled = 1024;

// Evenly spaced in the row.
template <class T>
struct RowSample {
  T values[kSample];

  explicit RowSample(const Row<T>& row) {
    for (int i = 0; i < kSample; ++i) values[i] = row.values[std::int64_t(i) * row.n / kSample];
  }

  // Whether buckets of equal width would be crowded: more than 5 lie in one of 256 parts of the range (of a normal
  // distribution 0.7 are expected in its middle).
  bool crowds(const Stats<T>& s) const {
    constexpr int parts = 256, many = 5;
    int here[parts] = {}, most = 0;
    const T per_part = T(parts) / (s.high - s.low);
    for (const T v : values) {
      const T part = std::min(std::max((v - s.low) * per_part, T(0)), T(parts - 1));
      most = std::max(most, ++here[static_cast<int>(part)]);
    }
    return most > many;
  }
};

// Buckets that a sample says are equally full: of equal width between every other of its values. Where two registers do
// not hold the bounds of all parts, finding a value's part takes as long as the sort.
template <class T>
struct EqualShares {
  static constexpr bool available = false;
};
#if defined(PCOH_AVX512)
template <>
struct EqualShares<float> {
  static constexpr bool available = true;
  static constexpr int parts = 32;  // two registers

  EqualShares(RowSample<float> sample, const Stats<float>& s, int buckets) : per_part(float(buckets) / parts) {
    std::sort(sample.values, sample.values + kSample);
    float from[parts + 1], per_value[parts];
    from[0] = s.low;
    for (int i = 1; i < parts; ++i) from[i] = std::min(std::max(sample.values[i * kSample / parts], s.low), s.high);
    from[parts] = s.high;
    for (int i = 0; i < parts; ++i) {
      const float width = per_part / (from[i + 1] - from[i]);
      per_value[i] = width <= std::numeric_limits<float>::max() ? width : 0;
    }
    for (int i = 0; i < 2; ++i) {
      begin[i] = load(from + 16 * i);
      slope[i] = load(per_value + 16 * i);
    }
  }
  vec_t<float> operator()(vec_t<float> v) const {
    __m512i part = _mm512_setzero_si512();
    for (int step = parts / 2; step > 0; step /= 2) {
      const __m512i next = _mm512_add_epi32(part, _mm512_set1_epi32(step));
      part = _mm512_mask_mov_epi32(part, _mm512_cmp_ps_mask(v, at(begin, next), _CMP_GE_OQ), next);
    }
    const vec_t<float> within = (v - at(begin, part)) * at(slope, part), last = splat(per_part - 1);
    return _mm512_cvtepi32_ps(part) * per_part + vmin(within, last);
  }

  float per_part;
  vec_t<float> begin[2], slope[2];

 private:
  static __m512 at(const vec_t<float> (&table)[2], __m512i which) {
    return _mm512_permutex2var_ps(table[0], which, table[1]);
  }
};
#endif

}  // namespace pcoherence::PCOH_ISA
