// Argsort of one row, stable: by least-significant-digit radix sort, as fast on any distribution; of few values, which
// would wait for its counters, by comparisons.
#pragma once

#include "simd.h"

namespace pcoherence::PCOH_ISA {

template <class T>
struct RadixKey;
template <>
struct RadixKey<float> {
  using type = std::uint32_t;
};
template <>
struct RadixKey<double> {
  using type = std::uint64_t;
};

template <class T>
struct SortItem {
  typename RadixKey<T>::type key;
  std::uint32_t index;
};

// Unsigned integers in the order of the floats; -0 and 0 become the same key, so that they tie.
template <class T>
inline typename RadixKey<T>::type radix_key(T value) {
  using K = typename RadixKey<T>::type;
  constexpr K sign = K(1) << (8 * sizeof(K) - 1);
  value += T(0);
  K bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

// Up to here comparisons take less time than counters (measured).
inline constexpr int kFewToSort = 128;

// Items of values[0..n) in ascending order; the result lives in the workspace.
template <class T>
const SortItem<T>* argsort(const T* values, int n, Workspace& ws) {
  using Item = SortItem<T>;
  constexpr int digit_bits = 11, buckets = 1 << digit_bits;  // 2,048 counters stay in the L1 cache
  constexpr int passes = (8 * sizeof(typename RadixKey<T>::type) + digit_bits - 1) / digit_bits;
  Item* from = ws.items.need<Item>(n);
  Item* to = ws.items_swap.need<Item>(n);
  if (n <= kFewToSort) {
    for (int i = 0; i < n; ++i) from[i] = {radix_key(values[i]), static_cast<std::uint32_t>(i)};
    std::sort(from, from + n,
              [](const Item& a, const Item& b) { return a.key < b.key || (a.key == b.key && a.index < b.index); });
    return from;
  }
  auto* counts = ws.histogram.need<std::uint32_t>(passes * buckets);
  std::memset(counts, 0, sizeof(*counts) * passes * buckets);
  for (int i = 0; i < n; ++i) {
    const auto key = radix_key(values[i]);
    from[i] = {key, static_cast<std::uint32_t>(i)};
    for (int p = 0; p < passes; ++p) ++counts[p * buckets + ((key >> (p * digit_bits)) & (buckets - 1))];
  }
  for (int p = 0; p < passes; ++p) {
    std::uint32_t* count = counts + p * buckets;
    const int shift = p * digit_bits;
    if (count[(from[0].key >> shift) & (buckets - 1)] == static_cast<std::uint32_t>(n)) continue;  // all the same digit
    std::uint32_t start = 0;
    for (int b = 0; b < buckets; ++b) {
      const std::uint32_t c = count[b];
      count[b] = start;
      start += c;
    }
    for (int i = 0; i < n; ++i) to[count[(from[i].key >> shift) & (buckets - 1)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

}  // namespace pcoherence::PCOH_ISA
