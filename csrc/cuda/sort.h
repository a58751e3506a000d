// Sorting a row with one group of threads.
#pragma once

#include "group.h"

namespace pcoherence::cuda {

// keys [n] ascending, items [n] moved along; equal keys in the order of their items, so that the result is unique.
// Bitonic merging in the form whose every exchange puts the smaller one first: what would lie beyond n counts as
// infinite, never moves, and needs no memory. log2(n)^2 / 2 steps, 700 operations an element at n = 8,192.
template <class T, class G>
PCOH_DEVICE void sort_there(G& g, T* keys, std::int32_t* items, int n) {
  const auto exchange = [=](int i, int j) {
    if (j >= n) return;
    const T a = keys[i], b = keys[j];
    const std::int32_t p = items[i], q = items[j];
    if (a < b || (a == b && p < q)) return;
    keys[i] = b;
    keys[j] = a;
    items[i] = q;
    items[j] = p;
  };
  int size = 1;
  while (size < n) size *= 2;
  g.sync();
  for (int merged = 2; merged <= size; merged *= 2) {
    // Pairs of sorted halves: the first step mirrors the second half, the others compare at a fixed distance.
    each(g, size / 2, [=](int i) {
      const int offset = i & (merged / 2 - 1), block = 2 * (i - offset);
      exchange(block + offset, block + merged - 1 - offset);
    });
    g.sync();
    for (int distance = merged / 4; distance > 0; distance /= 2) {
      each(g, size / 2, [=](int i) {
        const int first = 2 * i - (i & (distance - 1));
        exchange(first, first + distance);
      });
      g.sync();
    }
  }
}

template <class T, class G>
PCOH_APART void sort(G& g, T* keys, std::int32_t* items, int n) {
  if (g.in_fast(keys) && g.in_fast(items))
    sort_there(g, g.fast(keys), g.fast(items), n);
  else
    sort_there(g, keys, items, n);
}

}  // namespace pcoherence::cuda
