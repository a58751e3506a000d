// Which of many buckets, in ascending order, a value of a row goes to: so that few share one. As in csrc/cpu/buckets.h.
#pragma once

#include "group.h"

namespace pcoherence::cuda {

// Buckets of equal width, from the lowest value to the highest.
template <class T>
struct EqualWidths {
  T low, per_width;
  int last;

  PCOH_DEVICE EqualWidths(const Stats<T>& s, int buckets)
      : low(s.low), per_width(T(buckets) / (s.high - s.low)), last(buckets - 1) {}
  // Not where the range, or its inverse, is more than T holds.
  PCOH_DEVICE bool possible() const { return per_width > 0 && per_width <= std::numeric_limits<T>::max(); }
  PCOH_DEVICE int operator()(T v) const {
    const int b = Rounded<T>(v - low, per_width).index();
    return b < last ? b : last;
  }
};

// Values that are looked at, and parts of EqualShares: each of 256 threads compares its own with all others once, 15
// operations for each of 8,192 elements. The fullest of so many parts holds about ln 256 = 5.5 times the average.
// Shorter rows are sorted instead.
inline constexpr int kRowSample = 256;

// sample [kRowSample]: evenly spaced in the row.
template <class T, class G>
PCOH_DEVICE void take_sample(G& g, const Row<T>& row, const Stats<T>& s, T* sample) {
  each(g, kRowSample, [&](int i) {
    const T v = row.values[std::int64_t(i) * row.n / kRowSample];
    sample[i] = std::fmin(std::fmax(v, s.low), s.high);  // of weight 0 it may be anything
  });
  g.sync();
}

// Whether buckets of equal width would be crowded: more than 12 of the sample lie in one of 256 parts of the range (of
// a normal distribution 3 are expected in its middle). held [256]: to work in.
template <class T, class G>
PCOH_DEVICE bool crowds(G& g, const T* sample, const Stats<T>& s, int* held) {
  constexpr int parts = 256, many = 12;
  each(g, parts, [=](int i) { held[i] = 0; });
  g.sync();
  const EqualWidths<T> part(s, parts);
  int most = 0;
  each(g, kRowSample, [&](int i) {
    const int here = g.add(&held[part(sample[i])], 1) + 1;
    most = here > most ? here : most;
  });
  return reduce(g, most, Larger{}) > many;
}

// Buckets that a sample says are equally full: of equal width between two neighbours of its values.
template <class T>
struct EqualShares {
  static constexpr int parts = kRowSample;
  struct Part {
    T begin, per_value;
  };
  const T* tree;  // [parts] where parts begin, all but the first, as a search tree: node i has children 2 i, 2 i + 1
  const Part* table;  // [parts]
  int per_part;       // buckets

  static constexpr std::int64_t bytes = parts * (sizeof(T) + sizeof(Part)) + 2 * 16;

  PCOH_DEVICE int operator()(T v) const {
    int i = 1;
    PCOH_UNROLL
    for (int level = 1; level < parts; level *= 2) i = 2 * i + (v >= tree[i]);
    const Part own = table[i - parts];
    const T within = (v - own.begin) * own.per_value, last = T(per_part - 1);
    return (i - parts) * per_part + Rounded<T>(within < last ? within : last).index();
  }
};

// tree, table: as EqualShares has them, to be written. begin [parts]: to work in.
template <class T, class G>
PCOH_APART void lay_shares(G& g, const T* sample, const Stats<T>& s, int per_part, T* tree,
                           typename EqualShares<T>::Part* table, T* begin) {
  constexpr int parts = EqualShares<T>::parts;
  each(g, parts, [=](int i) {
    const T own = sample[i];
    int place = 0;
    for (int j = 0; j < parts; ++j) place += sample[j] < own || (sample[j] == own && j < i);
    begin[place] = place > 0 ? own : s.low;
  });
  g.sync();
  each(g, parts, [=](int i) {
    const T own = begin[i], per_value = T(per_part) / ((i + 1 < parts ? begin[i + 1] : s.high) - own);
    table[i] = {own, per_value <= std::numeric_limits<T>::max() ? per_value : T(0)};
    if (i > 0) tree[(parts + i) / (2 * (i & -i))] = own;
  });
  g.sync();
}

// ---------------------------------------------------------------- counters

// Fuller buckets are ordered by themselves, before their values are looked for by bisection.
inline constexpr int kCrowded = 16;
// What a counter holds: where a bucket has more, the row is sorted.
inline constexpr int kFullest = 255;

// How many values are in each bucket, and where they begin: two bytes a bucket.
struct Counters {
  unsigned* counts;  // [words] of four buckets, a byte each
  int* starts;       // [words] values in all buckets before these four
  int words;

  static constexpr unsigned crowded_bits = 0xF0F0F0F0u;  // of counts that are kCrowded or more

  struct Bucket {
    int begin, size;
  };
  PCOH_DEVICE Bucket at(int b) const {
    return {starts[b / 4] + before(counts[b / 4], b % 4), size(counts[b / 4], b % 4)};
  }

  static PCOH_DEVICE int size(unsigned word, int which) { return static_cast<int>(word >> 8 * which & 255u); }
  static PCOH_DEVICE int all(unsigned word) {
    const unsigned pairs = (word & 0x00FF00FFu) + (word >> 8 & 0x00FF00FFu);
    return static_cast<int>((pairs & 0xFFFFu) + (pairs >> 16));
  }
  static PCOH_DEVICE int before(unsigned word, int which) { return all(word & ((1u << 8 * which) - 1)); }

  // Counts one more; how many came before.
  template <class G>
  PCOH_DEVICE int add(G& g, int b) const {
    const int shift = 8 * (b % 4);
    return static_cast<int>(g.add(&counts[b / 4], 1u << shift) >> shift & 255u);
  }
};
static_assert(kCrowded == 16 && kFullest == 255, "what the bits of Counters can say");

// counts -> starts. Returns how many values were counted: too few where a counter overflowed, since every carry loses
// 255 of them.
template <class G>
PCOH_APART int start_buckets(G& g, Counters c, bool& crowded) {
  unsigned seen = 0;
  const auto count = [&](int i) {
    seen |= c.counts[i];
    return Counters::all(c.counts[i]);
  };
  const int sum = running_sums(g, c.words, count, [=](int i, int before) { c.starts[i] = before; });
  crowded = reduce(g, int((seen & Counters::crowded_bits) != 0), Larger{}) != 0;
  return sum;
}

// ---------------------------------------------------------------- memory

// With fewer than a bucket for 4 values they would be crowded; more have no Ticket (hard_ranks.h).
inline constexpr int kMostValuesPerBucket = 4, kMostBuckets = 1 << 22;
static_assert(kMostBuckets <= Rounded<float>::limit);

// What is accessed at random, of n values in n buckets: their counters, and the values in their order.
template <class T>
constexpr std::int64_t bucket_bytes(std::int64_t n) {
  return EqualShares<T>::bytes + 2 * n + (n + kFullest) * sizeof(T) + 2 * kRowSample + 4 * 16;
}

// Two for each value, where their counters take no more than half of what fast memory is left: more make them emptier
// and the counters longer. The other half is for the values.
PCOH_DEVICE int bucket_count(std::int64_t n, std::int64_t fast_left) {
  std::int64_t buckets = 2 * n;
  while (2 * buckets > fast_left / 2 && buckets * kMostValuesPerBucket > n) buckets /= 2;
  buckets = buckets < kRowSample ? kRowSample : buckets;  // EqualShares has one a part
  return static_cast<int>(buckets / 4 * 4);
}

}  // namespace pcoherence::cuda
