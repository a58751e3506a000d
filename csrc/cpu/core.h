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
template <class T, class F>
double sum_each(const Core<T>&, int n, F&& f) {
  double sum[4] = {};  // an addition need not wait for the one before
  int k = 0;
  for (; k + 4 <= n; k += 4)
    for (int i = 0; i < 4; ++i) sum[i] += f(k + i);
  for (; k < n; ++k) sum[0] += f(k);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
template <class T, class Load, class Store>
void running_sums(const Core<T>&, int n, Load&& load, Store&& store) {
  double sum = 0;
  int k = 0;
  for (; k + 4 <= n; k += 4) {  // one addition of the four waits for those before
    const double a = load(k), b = load(k + 1), c = load(k + 2), d = load(k + 3);
    store(k, sum);
    store(k + 1, sum + a);
    store(k + 2, sum + (a + b));
    store(k + 3, sum + ((a + b) + c));
    sum += (a + b) + (c + d);
  }
  for (; k < n; ++k) {
    const double own = load(k);
    store(k, sum);
    sum += own;
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
  Weighed result{total.total(), 0, min_lane(least) == max_lane(most)};
  for (int i = 0; i < lanes_v<T>; ++i) result.count += static_cast<int>(count[i]);
  return result;
}

}  // namespace pcoherence::PCOH_ISA
