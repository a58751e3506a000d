// Where a row's elements lie in the bins of a grid. Those that hold nobody are left out where bins are many: a far
// point costs its own bin, not the way to it. As in csrc/cpu/layout.h.
#pragma once

#include "../soft_ranks.h"
#include "group.h"

namespace pcoherence::cuda {

// Up to so many bins, positions in float32 are as exact as the values' differences: a rounding of 16 bits and more is
// left for the place within a bin.
inline constexpr int kBinsInFloat = 32;
// Among so many, as they are laid, "auto" looks for those that hold somebody: a bit each, and a number for 32 of them,
// take 64 KiB. Of 8,192 norms with a density that falls as their inverse square, the largest was beyond kMaxBins in 13
// % and 27 % of 60 draws (d = 16, 128; temperature 0.03), and never beyond this. What is beyond is left to the scan.
inline constexpr int kMostLaid = 1 << 18;
// Up to here the bins cost less than finding out which of them are empty.
inline constexpr int kDenseBins = 128;

// Where in the bins as they are laid a value lies, the lowest at 0. Computed in float64: a bin far from the lowest
// value resolves as much of its values as the first.
template <class T>
struct Spot;
template <>
struct Spot<float> {
  int bin;
  unsigned fraction;  // in units of 2^-32

  // t: from 0 to 2^20 bins. The float64 that is added leaves 32 bits for the fraction.
  PCOH_DEVICE explicit Spot(double t) {
    const double shifted = t + 0x1p20;
    std::uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bin = static_cast<int>(bits >> 32 & 0xFFFFFu);
    fraction = static_cast<unsigned>(bits);
  }
};
template <>
struct Spot<double> {
  int bin;
  double fraction;

  PCOH_DEVICE explicit Spot(double t) : bin(static_cast<int>(t)), fraction(t - bin) {}
};

// The bins of a row's values.
template <class T>
class Layout {
 public:
  int laid = 0;                 // from the lowest value to the highest
  int bins = 0;                 // that are held; all that are laid where these are few
  const int* places = nullptr;  // [bins] where they are laid, ascending; null: all are held

  Layout() = default;
  PCOH_DEVICE Layout(T low, T high, const Scaling& scale)
      : low_(low), high_(high), per_value_(scale.per_distance / kBinWidth) {
    laid = bins = Spot<T>(position(high)).bin + 1;
  }

  static constexpr int most_words = kMostLaid / 32 + 1;
  // Memory for `held` bins, and to find them.
  static constexpr std::int64_t bytes(std::int64_t held) { return (held + 2 * most_words) * 4 + 3 * 16; }

  // Leaves out the bins that are empty; false where more than `most` are not.
  template <class G>
  PCOH_APART bool leave_out_empty(G& g, const Row<T>& row, int most, Arena& arena) {
    const int words = laid / 32 + 1;
    int* own_places = arena.take<int>(most < laid ? most : laid);
    Arena rest = arena;
    unsigned* held = rest.take<unsigned>(words);
    int* numbers = rest.take<int>(words);
    each(g, words, [=](int i) { held[i] = 0; });
    g.sync();
    each_loaded(
        g, row.n, [=](int k) { return row.values[k]; },
        [&](int, T v) {
          const int b = spot(v).bin;
          const unsigned bit = 1u << b % 32;
          if (!(g.peek(held + b / 32) & bit)) g.set(held + b / 32, bit);  // most are there
        });
    g.sync();
    const Chunk own = chunk(g, words);
    int count = 0;
    for (int i = own.begin; i < own.end; ++i) count += ones(held[i]);
    const Running<int> held_bins = exclusive(g, count);
    bins = held_bins.all;
    if (bins > most) return false;
    int number = held_bins.before;
    for (int i = own.begin; i < own.end; ++i) {
      numbers[i] = number;
      for (int b = 0; held[i] >> b != 0; ++b) {
        if (held[i] >> b & 1u) own_places[number++] = 32 * i + b;
        if (b == 31) break;
      }
    }
    g.sync();
    held_ = held;
    numbers_ = numbers;
    places = own_places;
    return true;
  }

  // Codes in place of the row's values.
  template <class G>
  PCOH_APART void locate(G& g, Row<T>& row) const {
    row.cells = Cells<T>(bins, places);
    const Cells<T> cells = row.cells;
    const Layout own = *this;
    by_memory(g, row.values, [&](T* values) {
      if (places != nullptr) {
        each(g, row.n, [=](int k) {
          const Spot<T> s = own.spot(values[k]);
          values[k] = cells.code(own.number(s.bin), s.fraction);
        });
        return;
      }
      if constexpr (sizeof(T) == 4) {
        const T low = low_, per_value = static_cast<T>(per_value_);
        if (laid <= kBinsInFloat && per_value <= std::numeric_limits<T>::max())
          return each(g, row.n, [=](int k) { values[k] = cells.code((own.bounded(values[k]) - low) * per_value); });
      }
      each(g, row.n, [=](int k) {
        const Spot<T> s = own.spot(values[k]);
        values[k] = cells.code(s.bin, s.fraction);
      });
    });
    g.sync();
  }

 private:
  // Only candidates of weight 0 can lie outside, or be NaN.
  PCOH_DEVICE T bounded(T v) const { return std::fmin(std::fmax(v, low_), high_); }
  PCOH_DEVICE double position(T v) const { return (double(v) - double(low_)) * per_value_; }
  PCOH_DEVICE Spot<T> spot(T v) const { return Spot<T>(position(bounded(v))); }

  // Of a held bin, counted from the lowest.
  PCOH_DEVICE int number(int bin) const { return numbers_[bin / 32] + ones(held_[bin / 32] & ((1u << bin % 32) - 1)); }

  T low_ = 0, high_ = 0;
  double per_value_ = 0;            // bins
  const unsigned* held_ = nullptr;  // [laid / 32 + 1] a bit for each bin, until the next is laid
  const int* numbers_ = nullptr;    // [laid / 32 + 1] of the first held bin in a word
};

}  // namespace pcoherence::cuda
