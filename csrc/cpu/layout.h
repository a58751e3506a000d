// Where a row's elements lie in the bins of a grid. Those that hold nobody are left out where bins are many: a far
// point costs its own bin, not the way to it.
#pragma once

#include "core.h"

namespace pcoherence::PCOH_ISA {

// Up to so many bins, positions in the row's own type are as exact as the values' differences: a rounding of 16 bits
// and more is left for the place within a bin.
inline constexpr int kBinsInFloat = 32;

// The bins of a row's elements, and where in them they lie. Its arrays are in the workspace, until the next is laid.
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
    locate(row, per_value, laid, own_bin, own_x);
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

  static void locate(const Row<T>& row, double per_value, int laid, std::int32_t* bin, T* x) {
    if constexpr (sizeof(T) == 4)
      if (laid > kBinsInFloat || per_value > double(std::numeric_limits<T>::max()))
        return locate_in_double(row, per_value, laid, bin, x);
    locate_in_own_type(row, static_cast<T>(per_value), laid, bin, x);
  }

  static void locate_in_own_type(const Row<T>& row, T per_value, int laid, std::int32_t* bin, T* x) {
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
  static void locate_in_double(const Row<float>& row, double per_value, int laid, std::int32_t* bin, float* x) {
    struct Located {
      dvec bin, x;
    };
    const dvec low = dvec{} + double(row.low), last = dvec{} + double(laid - 1), end = dvec{} + double(laid);
    const auto located = [&](dvec v) {
      const dvec t = vmin(vmax((v - low) * per_value, dvec{}), end);
      const dvec floor = vmin(widened(__builtin_convertvector(t, index_t<double>)), last);
      return Located{floor, (t - floor) * 2.0 - 1.0};
    };
    for (int k = 0; k < row.n; k += lanes_v<float>) {
      const vec_t<float> v = load(row.values + k);
      const Located a = located(low_half(v)), b = located(high_half(v));
      store(bin + k, __builtin_convertvector(join(a.bin, b.bin), index_t<float>));
      store(x + k, join(a.x, b.x));
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

}  // namespace pcoherence::PCOH_ISA
