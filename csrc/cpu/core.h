// The lanes that work on a row: those of one core's vectors (see ../row.h).
#pragma once

#include "../row.h"
#include "simd.h"

namespace pcoherence::PCOH_ISA {

template <class T>
struct Core {
  using Sum = PCOH_ISA::Sum;
  static constexpr bool sums_gradient = true;  // while it is in registers

  static vec_t<T> all(T x) { return splat(x); }
  static vec_t<T> get(const T* p, int k) { return load(p + k); }
  static void put(T* p, int k, vec_t<T> v) { store(p + k, v); }
  void sync() const {}
  static void add(int* p, int v) { *p += v; }
};

// One row's candidates, n a multiple of the lane count. s = value / temperature. Sums go by differences of the values
// as they are given, or by positions in float64: taken from the lowest value in T, a position would lose the digits
// that tell apart what lies close together far away.
template <class T>
struct Row {
  const T* weights;  // [n], the anchor's own candidate excluded by weight 0
  int n;
  const T* values = nullptr;  // [n], finite
  T low = 0;                  // smallest value that counts
  Scaling scale{};

  double temperatures(std::uint32_t from, std::uint32_t to) const {
    return (double(values[to]) - double(values[from])) * scale.per_distance;
  }
  T weight(int k) const { return weights[k]; }
  double position(std::uint32_t k) const { return (double(values[k]) - double(low)) * scale.per_distance; }
  // Only candidates of weight 0 can lie below; a range may overflow T.
  vec_t<T> place(int k) const {
    return vmin(vmax(load(values + k) - low, vec_t<T>{}), splat(std::numeric_limits<T>::max()));
  }
  double unit() const { return scale.per_distance; }
};

template <class T, class F>
void each(const Core<T>&, int n, F&& f) {
  for (int k = 0; k < n; k += lanes_v<T>) f(k);
}
template <class T, class F>
void each_candidate(const Core<T>&, const Row<T>& row, F&& f) {
  for (int k = 0; k < row.n; k += lanes_v<T>) f(k, load(row.weights + k));
}
template <class T, class F>
void each_value(const Core<T>&, const Row<T>& row, const T* from, F&& f) {
  for (int k = 0; k < row.n; k += lanes_v<T>) f(k, load(from + k), load(row.weights + k));
}
template <class T, class F>
void each_element(const Core<T>&, int n, F&& f) {
  for (int k = 0; k < n; ++k) f(k);
}
template <class T, class Index, class F>
void each_indexed(const Core<T>&, int n, Index&& index, F&& f) {
  constexpr int together = 16;  // so that the compiler uses vectors for the indices
  int k = 0;
  for (; k + together <= n; k += together) {
    std::int32_t found[together];
    for (int i = 0; i < together; ++i) found[i] = index(k + i);
    for (int i = 0; i < together; ++i) f(k + i, found[i]);
  }
  for (; k < n; ++k) f(k, index(k));
}
// f(k) of 8 elements, computed together.
template <class F>
inline dvec eight(int k, F&& f) {
  alignas(64) double values[8];
  for (int i = 0; i < 8; ++i) values[i] = f(k + i);
  return load(values);
}
template <class T, class F>
double sum_each(const Core<T>&, int n, F&& f) {
  dvec sum{};
  double rest = 0;
  int k = 0;
  for (; k + 8 <= n; k += 8) sum += eight(k, f);
  for (; k < n; ++k) rest += f(k);
  return sum_lanes(sum) + rest;
}
template <class T, class Load, class Store>
void running_sums(const Core<T>&, int n, Load&& load, Store&& store) {
  constexpr auto all = std::make_index_sequence<8>{};
  double before = 0;
  int k = 0;
  for (; k + 8 <= n; k += 8) {
    dvec sum = eight(k, load);  // with all below, by doubling: add what lies 1, 2, 4 lanes below
    sum += lanes_below<1>(sum, all);
    sum += lanes_below<2>(sum, all);
    sum += lanes_below<4>(sum, all);
    const dvec exclusive = lanes_below<1>(sum, all) + before;
    for (int i = 0; i < 8; ++i) store(k + i, exclusive[i]);
    before += sum[7];
  }
  for (; k < n; ++k) {
    const double own = load(k);
    store(k, before);
    before += own;
  }
}
template <class T, class V, class F>
void by_memory(const Core<T>&, V* p, F&& f) {
  f(p);
}
template <class T>
double total(const Core<T>&, const Sum& sum) {
  return sum.total();
}
template <class T>
Triple total(const Core<T>&, const Sum& a, const Sum& b, const Sum& c) {
  return {a.total(), b.total(), c.total()};
}
template <class T>
Extremes<T> extremes(const Core<T>&, vec_t<T> low, vec_t<T> high, const Sum& sum) {
  return {sum.total(), min_lane(low), max_lane(high)};
}
template <class T>
Weighed weigh(const Core<T>&, const Row<T>& row) {
  const vec_t<T> zero{}, inf = splat(std::numeric_limits<T>::infinity());
  vec_t<T> least = inf, most = zero;
  ivec_t<T> count{};
  Sum total;
  for (int k = 0; k < row.n; k += lanes_v<T>) {
    const auto w = load(row.weights + k);
    count -= w > zero;
    least = vmin(select(w > zero, w, inf), least);
    most = vmax(w, most);
    total.add(w);
  }
  return {total.total(), static_cast<int>(sum_lanes(count)), min_lane(least) == max_lane(most)};
}

}  // namespace pcoherence::PCOH_ISA
