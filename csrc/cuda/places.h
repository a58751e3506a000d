// Ranks in a neighbourhood, by counting who is at each place: a window of places at a time, as many as fast memory has
// room for.
#pragma once

#include "buckets.h"
#include "near.h"

namespace pcoherence::cuda {

// Places that share a sum of what lies below them: those that one word of ByteCounts counts.
inline constexpr int kPlacesOfSum = 4;

// How many are at a place: a byte, if no more than kFullest are at one, or a word.
struct ByteCounts {
  static constexpr int words = 1;  // for kPlacesOfSum
  unsigned* counts;

  template <class G>
  PCOH_DEVICE void add(G& g, int i) const {
    Counters{counts, nullptr, 0}.add(g, i);
  }
  PCOH_DEVICE int at(int i) const { return Counters::size(counts[i / 4], i % 4); }
};
struct WordCounts {
  static constexpr int words = kPlacesOfSum;
  unsigned* counts;

  template <class G>
  PCOH_DEVICE void add(G& g, int i) const {
    g.add(&counts[i], 1u);
  }
  PCOH_DEVICE int at(int i) const { return static_cast<int>(counts[i]); }
};

// A multiple of kPlacesOfSum places.
template <class Counts>
struct PlaceWindow {
  Counts counts;
  double* below;  // [sums] the weights below every kPlacesOfSum-th place
  int sums;

  static constexpr std::int64_t bytes(std::int64_t sums) {
    return sums * (Counts::words * sizeof(unsigned) + sizeof(double)) + 2 * 16;
  }
  static constexpr std::int64_t sums_of(std::int64_t places) { return (places + kPlacesOfSum - 1) / kPlacesOfSum; }

  static PCOH_DEVICE PlaceWindow take(int places, Arena arena) {
    // A window reads the row twice. More of them would take longer than counting in slow memory.
    constexpr int most_windows = 8;
    const std::int64_t all = sums_of(places), room = (arena.fast_left() - bytes(0)) / (bytes(1) - bytes(0));
    const std::int64_t sums = room < all && room * most_windows >= all ? room : all;
    unsigned* counts = arena.take<unsigned>(sums * Counts::words);
    return {{counts}, arena.take<double>(sums), static_cast<int>(sums)};
  }
};

// What `count` of one weight weigh. Most are alone, and conversions are slow.
template <class T>
PCOH_DEVICE double mass(int count, T weight) {
  return count == 1 ? double(weight) : count * double(weight);
}

// fast: all of the window's memory is.
template <bool fast, class Counts, class T, class Rank, class G>
PCOH_APART Weighed rank_in_windows(G& g, const Row<T>& row, const Weighed& weighed, const NearSums<T>& table,
                                   const T* plain, const PlaceWindow<Counts>& given, T* weights, Rank* out,
                                   double& ties) {
  const Counts counts{at<fast>(g, given.counts.counts)};
  double* below = at<fast>(g, given.below);
  const int count = weighed.count, last = 2 * count - 1;  // the place of those without weight
  const int sums = given.sums, window = sums * kPlacesOfSum;
  const bool whole = window > last;
  const Row<T> own_row = row;  // copies, which no store can change
  const NearSums<T> known = table;
  const T each_weighs = static_cast<T>(weighed.total / count);
  const auto place = [=](int k) { return twice_place(own_row, plain, k, count); };
  const auto weight = [=](int i) { return each_weighs * known.weight(i); };
  double all = 0, own_ties = 0;
  for (int first = 0; first <= last; first += window) {
    each(g, sums * Counts::words, [=](int i) { counts.counts[i] = 0; });
    g.sync();
    // What a byte of the last place, of those without weight, cannot hold is carried to where nobody is.
    each_indexed(g, row.n, place, [&](int, int i) {
      if (unsigned(i - first) < unsigned(window)) counts.add(g, i - first);
    });
    g.sync();
    each(g, sums, [&](int s) {
      double sum = 0;
      unrolled<kPlacesOfSum>([&](auto j) {
        const int i = kPlacesOfSum * s + j, here = counts.at(i);
        if (here == 0) return;
        const double own = mass(here, weight(first + i));
        sum += own;
        own_ties += own * own;
      });
      below[s] = sum;
    });
    g.sync();
    const double earlier = all;
    all += running_sums(g, sums, [=](int s) { return below[s]; }, [=](int s, double sum) { below[s] = earlier + sum; });
    g.sync();
    // Until all weights are known, ranks are not divided by them, and negative: `plain` may be what `out` has, and
    // there is no such place.
    const double factor = whole ? 1 / all : -1;
    each_indexed(g, row.n, place, [=](int k, int i) {
      const int within = i - first;
      if (unsigned(within) >= unsigned(window)) return;
      const int which = within % kPlacesOfSum, begin = within - which;
      double rank = below[within / kPlacesOfSum];
      unrolled<kPlacesOfSum - 1>([&](auto j) {
        const int here = j < which ? counts.at(begin + j) : 0;
        if (here != 0) rank += mass(here, weight(first + begin + j));
      });
      const T own = weight(i);
      weights[k] = own;
      out[k] = static_cast<Rank>((rank + mass(counts.at(within), own) / 2) * factor);
    });
    g.sync();
  }
  const double per_all = 1 / all;
  if (!whole) each(g, row.n, [=](int k) { out[k] = static_cast<Rank>(out[k] * -per_all); });
  ties = total(g, own_ties);
  return {all, count, false};
}

// Memory for any.
constexpr std::int64_t places_bytes(std::int64_t places) {
  using Window = PlaceWindow<WordCounts>;
  return Window::bytes(Window::sums_of(places));
}

// See ../row.h.
template <class T, class Rank, class G, class Workplace>
PCOH_APART Weighed count_near(G& g, const Row<T>& row, const Weighed& weighed, const NearSums<T>& table, const T* plain,
                              T* weights, Rank* out, double& ties, const Workplace& work) {
  const int places = 2 * weighed.count;
  // m at one place are m (m - 1) pairs, a whole number that has been rounded.
  if (tied_pairs(weighed, ties) > double(kFullest) * (kFullest + 1) - 1)
    return rank_in_windows<false>(g, row, weighed, table, plain, PlaceWindow<WordCounts>::take(places, work.arena),
                                  weights, out, ties);
  const auto window = PlaceWindow<ByteCounts>::take(places, work.arena);
  return g.in_fast(window.counts.counts) && g.in_fast(window.below)
             ? rank_in_windows<true>(g, row, weighed, table, plain, window, weights, out, ties)
             : rank_in_windows<false>(g, row, weighed, table, plain, window, weights, out, ties);
}

}  // namespace pcoherence::cuda
