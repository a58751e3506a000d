// Hard mid-ranks of one row: F_j = (sum_k w_k [v_k < v_j] + sum_k w_k [v_k = v_j] / 2) / W.
#pragma once

#include "bucket_ranks.h"
#include "buckets.h"
#include "soft_ranks.h"
#include "sort.h"

namespace pcoherence::cuda {

// At most, of buckets or the sort.
template <class T>
constexpr std::int64_t hard_rank_bytes(std::int64_t n) {
  const std::int64_t buckets = bucket_bytes<T>(n) + 2 * n + 3 * kRowSample * sizeof(T) + WeighedRanks<T, T>::bytes(n),
                     sorted = n * (sizeof(T) + 4 + 8);
  return (buckets > sorted ? buckets : sorted) + 3 * 16 + 8;
}

// ---------------------------------------------------------------- buckets

// A piece of any value. (memcpy would move it byte by byte: nvcc does not see that it is aligned.)
using Word [[gnu::may_alias]] = unsigned;

template <class V>
PCOH_DEVICE const Word* words(const V* value) {
  return reinterpret_cast<const Word*>(value);
}
template <class V>
PCOH_DEVICE Word* words(V* value) {
  return reinterpret_cast<Word*>(value);
}

// Until a candidate is ranked, its bucket and its place there stand where its rank will, marked by the sign bit, which
// a rank does not have.
struct Ticket {
  static constexpr unsigned mark = 1u << 31;
  unsigned bits;

  PCOH_DEVICE static Ticket of(int bucket, int place) { return {mark | unsigned(bucket) << 8 | unsigned(place)}; }
  PCOH_DEVICE bool ranked() const { return !(bits & mark); }
  PCOH_DEVICE int bucket() const { return static_cast<int>((bits & ~mark) >> 8); }
  PCOH_DEVICE int place() const { return static_cast<int>(bits & 255u); }

  template <class Out>
  static PCOH_DEVICE Ticket at(const Out* out) {
    return {words(out)[last<Out>]};
  }
  template <class Out>
  PCOH_DEVICE void put(Out* out) const {
    words(out)[last<Out>] = bits;
  }

 private:
  template <class Out>
  static constexpr int last = sizeof(Out) / sizeof(Word) - 1;
};
static_assert(std::int64_t(kMostBuckets) << 8 < std::int64_t(Ticket::mark));

// Values of a row in the order of their buckets, `window` of them at a time: as many as there is memory for.
template <class T>
struct Ordered {
  T* values;  // [window + kFullest] those of buckets that begin within the window
  int window;
};

// Into buckets: tickets into out [n], 0 for those without weight, which have no rank.
template <class T, class Out, class G, class Buckets>
PCOH_DEVICE void count_values(G& g, const Row<T>& row, const Buckets& bucket, const Counters& c, Out* out) {
  const T* values = row.values;
  with_weights(row, [&](auto weight) {
    each_loaded(
        g, row.n, [=](int k) { return values[k]; },
        [&](int k, T v) {
          if (!(weight(k) > 0)) {
            out[k] = 0;
            return;
          }
          const int b = bucket(v);
          Ticket::of(b, c.add(g, b)).put(out + k);
        });
  });
  g.sync();
}

// Orders `count` values and what is kept beside each by one warp, each of whose lanes has up to `own` of them. What is
// beside moves a word at a time: all of it in registers would leave the callers too few.
template <int own, class T, class G, class Beside>
PCOH_DEVICE void order_in_registers(G& g, T* values, Beside* beside, int count) {
  T value[own];
  int place[own];
  unrolled<own>([&](auto j) {
    const int i = g.lane() + kWarp * j;
    value[j] = i < count ? values[i] : T(0);
    place[j] = 0;
  });
  for (int i = 0; i < count; ++i) {
    const T other = values[i];
    unrolled<own>([&](auto j) { place[j] += other < value[j] || (other == value[j] && i < g.lane() + kWarp * j); });
  }
  g.sync_warp();
  unrolled<own>([&](auto j) {
    if (g.lane() + kWarp * j < count) values[place[j]] = value[j];
  });
  constexpr int pieces = std::is_empty_v<Beside> ? 0 : sizeof(Beside) / sizeof(Word);
  unrolled<pieces>([&](auto w) {
    Word word[own];
    unrolled<own>([&](auto j) {
      const int i = g.lane() + kWarp * j;
      word[j] = i < count ? words(beside + i)[w] : 0;
    });
    g.sync_warp();
    unrolled<own>([&](auto j) {
      if (g.lane() + kWarp * j < count) words(beside + place[j])[w] = word[j];
    });
  });
}
template <class T, class G, class Beside>
PCOH_APART void order_by_warp(G& g, T* values, Beside* beside, int count) {
  static_assert(kFullest <= 8 * kWarp);
  if (count <= kWarp)
    order_in_registers<1>(g, values, beside, count);
  else if (count <= 2 * kWarp)
    order_in_registers<2>(g, values, beside, count);
  else
    order_in_registers<8>(g, values, beside, count);
}

// The crowded buckets of a window that begins at `first`.
template <class T, class G, class Ranks>
PCOH_DEVICE void order_crowded(G& g, const Counters& c, const Ordered<T>& ordered, int first, const Ranks& ranks) {
  for (int base = g.warp() * kWarp; base < c.words; base += g.threads()) {
    const int i = base + g.lane();
    const unsigned word = i < c.words ? c.counts[i] : 0;
    unsigned crowded = g.ballot((word & Counters::crowded_bits) != 0);
    for (int b = 4 * base; crowded != 0; b += 4, crowded >>= 1) {
      if (!(crowded & 1)) continue;
      for (int which = 0; which < 4; ++which) {
        const auto [begin, size] = c.at(b + which);
        if (size >= kCrowded && unsigned(begin - first) < unsigned(ordered.window))
          order_by_warp(g, ordered.values + (begin - first), ranks.beside(begin - first), size);
      }
    }
  }
  g.sync();
}

// The number of sorted values [count] that come before v, or not after it.
template <class T>
PCOH_DEVICE int place_of(const T* sorted, int count, T v, bool or_equal) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    const bool comes_before = sorted[middle] < v || (or_equal && sorted[middle] == v);
    low = comes_before ? middle + 1 : low;
    high = comes_before ? high : middle;
  }
  return low;
}

// Values of the window go to their places.
template <class T, class Out, class G, class Ranks>
PCOH_DEVICE void order_values(G& g, const Row<T>& row, const Counters& c, const Ordered<T>& ordered, int first,
                              const Ranks& ranks, const Out* out) {
  const T* values = row.values;
  ranks.clear(g);
  each_loaded(
      g, row.n, [=](int k) { return Ticket::at(out + k); },
      [=](int k, Ticket ticket) {
        if (ticket.ranked()) return;
        const int begin = c.at(ticket.bucket()).begin - first;
        if (unsigned(begin) >= unsigned(ordered.window)) return;
        ordered.values[begin + ticket.place()] = values[k];
        ranks.put(begin + ticket.place(), k);
      });
  g.sync();
}

// Ranks of the window's candidates; returns a thread's part of the ties.
template <class T, class Out, class G, class Ranks>
PCOH_DEVICE typename Ranks::Tie rank_values(G& g, const Row<T>& row, const Counters& c, const Ordered<T>& ordered,
                                            int first, const Ranks& ranks, Out* out) {
  const T* values = row.values;
  typename Ranks::Tie ties = 0;
  each_loaded(
      g, row.n, [=](int k) { return Ticket::at(out + k); },
      [&](int k, Ticket ticket) {
        if (ticket.ranked()) return;
        const auto [start, size] = c.at(ticket.bucket());
        const int begin = start - first, end = begin + size;
        if (unsigned(begin) >= unsigned(ordered.window)) return;
        const T v = values[k];
        typename Ranks::Amount less = 0, equal = 0;
        if (size >= kCrowded) {
          const T* bucket = ordered.values + begin;
          const int from = begin + place_of(bucket, size, v, false), to = begin + place_of(bucket, size, v, true);
          less = ranks.between(begin, from);
          equal = ranks.between(from, to);
        } else {
          // One or two values: copies of the loop would only take registers.
          PCOH_ROLLED
          for (int i = begin; i < end; ++i) {
            const auto own = ranks.between(i, i + 1);
            less += ordered.values[i] < v ? own : 0;
            equal += ordered.values[i] == v ? own : 0;
          }
        }
        out[k] = ranks.rank(ranks.before(first, begin) + less, equal);
        ties += ranks.tie(k, equal);
      });
  return ties;
}

// Every value is compared with those of its bucket. Values arrive there in any order, but what is added up does not
// depend on it. False where a bucket holds too many. fast: all of this memory is.
template <bool fast, class T, class Out, class G, class Ranks>
PCOH_APART bool rank_in_buckets(G& g, const Row<T>& row, const Stats<T>& s, const Counters& counters,
                                const Ordered<T>& order, const Ranks& amounts, Out* out, double& ties) {
  const Counters c{at<fast>(g, counters.counts), at<fast>(g, counters.starts), counters.words};
  const Ordered<T> ordered{at<fast>(g, order.values), order.window};
  const Ranks ranks = amounts.template known<fast>(g);
  bool crowded = false;
  if (start_buckets(g, c, crowded) != s.count) return false;
  typename Ranks::Tie own = 0;
  typename Ranks::Amount earlier = 0;
  for (int first = 0; first < s.count; first += ordered.window) {
    order_values(g, row, c, ordered, first, ranks, out);
    if (crowded) order_crowded(g, c, ordered, first, ranks);
    earlier = ranks.add_up(g, earlier);
    own += rank_values(g, row, c, ordered, first, ranks, out);
    g.sync();
  }
  ties = ranks.ties(total(g, double(own)));
  return true;
}

template <bool fast, class T, class Out, class G, class Buckets>
PCOH_APART void fill_buckets(G& g, const Row<T>& row, Buckets bucket, const Counters& counters, Out* out) {
  const Counters c{at<fast>(g, counters.counts), counters.starts, counters.words};
  if constexpr (std::is_same_v<Buckets, EqualShares<T>>) {
    bucket.tree = at<fast>(g, bucket.tree);
    bucket.table = at<fast>(g, bucket.table);
  }
  each(g, c.words, [=](int i) { c.counts[i] = 0; });
  g.sync();
  count_values(g, row, bucket, c, out);
}

// False where that is left to the sort.
template <class Ranks, class T, class Out, class G>
PCOH_DEVICE bool hard_ranks_bucketed(G& g, const Row<T>& row, const Stats<T>& s, Out* out, double& ties, Arena arena) {
  if (2 * std::int64_t(row.n) > kMostBuckets || !Ranks::possible(s)) return false;
  T* tree = arena.take<T>(EqualShares<T>::parts);
  auto* table = arena.take<typename EqualShares<T>::Part>(EqualShares<T>::parts);
  const int buckets = bucket_count(row.n, arena.fast_left());
  const EqualWidths<T> widths(s, buckets);
  if (!widths.possible()) return false;
  Counters c{nullptr, nullptr, buckets / 4};
  c.counts = arena.take<unsigned>(c.words);
  c.starts = arena.take<int>(c.words);

  bool shares = false;
  if (row.n >= kRowSample) {
    Arena other = arena;  // before the values are ordered, in their place
    T* sample = other.take<T>(kRowSample);
    take_sample(g, row, s, sample);
    shares = crowds(g, sample, s, other.take<int>(kRowSample));
    if (shares) lay_shares(g, sample, s, buckets / kRowSample, tree, table, other.take<T>(kRowSample));
  }
  // All values at a time, or as many as fast memory has room for; but not in more than 8 windows.
  constexpr int most_windows = 8;
  const std::int64_t room = arena.fast_left() / std::int64_t(sizeof(T) + Ranks::place_bytes);
  const std::int64_t window = (room - (kFullest + 1)) / 4 * 4;  // whole pieces of an arena
  const bool in_parts = room < row.n && window * most_windows >= row.n;
  Ordered<T> ordered{nullptr, in_parts ? static_cast<int>(window) : row.n};
  ordered.values = arena.take<T>(in_parts ? window + kFullest : row.n);
  const Ranks ranks(row, s, arena, ordered.window);
  const auto by = [&]<bool fast>(std::bool_constant<fast>) {
    if (shares)
      fill_buckets<fast>(g, row, EqualShares<T>{tree, table, buckets / kRowSample}, c, out);
    else
      fill_buckets<fast>(g, row, widths, c, out);
    return rank_in_buckets<fast>(g, row, s, c, ordered, ranks, out, ties);
  };
  const bool fast = g.in_fast(tree) && g.in_fast(table) && g.in_fast(c.counts) && g.in_fast(c.starts) &&
                    g.in_fast(ordered.values) && ranks.in_fast(g);
  return fast ? by(std::true_type{}) : by(std::false_type{});
}

// ---------------------------------------------------------------- the sort

// Sort, running sums of weights, and each value's place among them by bisection.
template <class T, class Out, class G>
PCOH_APART double hard_ranks_sorted(G& g, const Row<T>& row, const Stats<T>& s, Out* out, Arena arena) {
  const int n = row.n;
  T* keys = arena.take<T>(n);
  std::int32_t* items = arena.take<std::int32_t>(n);
  double* before = arena.take<double>(n + 1);  // sum of the weights of the sorted values before each
  each(g, n, [&](int k) {
    keys[k] = row.values[k];
    items[k] = k;
  });
  sort(g, keys, items, n);
  running_sums(g, n, [&](int i) { return double(row.weight(items[i])); }, [&](int i, double sum) { before[i] = sum; });
  if (g.thread() == 0) before[n] = s.total;
  g.sync();
  double ties = 0;
  each(g, n, [&](int i) {
    const T v = keys[i];
    const double below = before[place_of(keys, n, v, false)], group = before[place_of(keys, n, v, true)] - below;
    out[items[i]] = static_cast<Out>((below + group / 2) / s.total);
    ties += double(row.weight(items[i])) * group;
  });
  return total(g, ties);
}

// F_j into out [n]; returns sum_jk w_j w_k [v_j = v_k].
template <class T, class Out, class G>
PCOH_APART double hard_ranks(G& g, const Row<T>& row, const Stats<T>& s, bool, Out* out, Workplace<T, G>& work) {
  double ties = 0;
  if (s.high > s.low && (s.uniform || !work.sorts_weights)) {
    const bool done = s.uniform ? hard_ranks_bucketed<CountedRanks<T, Out>>(g, row, s, out, ties, work.arena)
                                : hard_ranks_bucketed<WeighedRanks<T, Out>>(g, row, s, out, ties, work.arena);
    if (done) return ties;
  }
  g.sync();  // the buckets' memory is used again
  return hard_ranks_sorted(g, row, s, out, work.arena);
}

}  // namespace pcoherence::cuda
