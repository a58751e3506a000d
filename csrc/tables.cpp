#include "tables.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace pcoherence {
namespace {

// [n (q), n (i)]: T_q at Chebyshev node i, cos(pi q (i + 1/2) / n). Kept, since thousands of fits use it.
const std::vector<long double>& node_cosines(int n) {
  static std::array<std::vector<long double>, kSeriesDegree<double> + 1> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& cosine = known.at(n);
  if (cosine.empty()) {
    const long double pi = 3.14159265358979323846264338327950288L;
    cosine.resize(n * n);
    for (int q = 0; q < n; ++q)
      for (int i = 0; i < n; ++i) cosine[q * n + i] = std::cos(pi * q * (i + 0.5L) / n);
  }
  return cosine;
}

// Monomial coefficients of the polynomial through f at the `n` Chebyshev nodes of [-1, 1], by way of the
// Chebyshev coefficients (whose sums are well conditioned; a Vandermonde inverse is not).
template <class F>
std::vector<long double> chebyshev_fit(F f, int n) {
  const auto& cosine = node_cosines(n);
  std::vector<long double> values(n), result(n, 0.0L);
  for (int i = 0; i < n; ++i) values[i] = f(cosine[n + i]);
  std::vector<long double> previous(n, 0.0L), current(n, 0.0L);  // monomials of T_{q-1}, T_q
  for (int q = 0; q < n; ++q) {
    std::vector<long double> next(n, 0.0L);
    if (q == 0) {
      next[0] = 1;
    } else {
      for (int i = 0; i + 1 < n; ++i) next[i + 1] = (q == 1 ? 1 : 2) * current[i];
      if (q > 1)
        for (int i = 0; i < n; ++i) next[i] -= previous[i];
    }
    previous = current;
    current = next;
    long double coefficient = 0;
    for (int i = 0; i < n; ++i) coefficient += values[i] * cosine[q * n + i];
    coefficient *= (q == 0 ? 1.0L : 2.0L) / n;
    for (int i = 0; i < n; ++i) result[i] += coefficient * current[i];
  }
  return result;
}

// The same on [0, 1].
template <class F>
std::vector<long double> unit_interval_fit(F f, int n) {
  const auto c = chebyshev_fit([&](long double x) { return f((x + 1) / 2); }, n);
  std::vector<long double> result(n, 0.0L);
  for (int q = n - 1; q >= 0; --q) {  // Horner in (2 z - 1)
    std::vector<long double> next(n, 0.0L);
    for (int i = 0; i < n; ++i) {
      next[i] -= result[i];
      if (i + 1 < n) next[i + 1] += 2 * result[i];
    }
    next[0] += c[q];
    result = next;
  }
  return result;
}

// Of two points whose bins differ by `difference`. softplus: less t times the step (1/2 within a bin) of that
// difference, which is summed apart, so that what is summed here is small.
long double evaluate(Kernel kernel, long double t, int difference) {
  switch (kernel) {
    case Kernel::sigmoid:
      return sigmoid(t);
    case Kernel::slope:
      return slope(t);
    case Kernel::softplus:
      return difference == 0 ? softplus(t) - t / 2 : softplus(difference > 0 ? -t : t);
  }
  std::abort();  // not a value of the enumeration
}

template <class T>
GridTable<T> build(Kernel kernel) {
  using Table = GridTable<T>;
  constexpr int n = Table::order, reach = Table::bins_in_reach;
  Table table;
  for (int difference = -reach; difference <= reach; ++difference) {
    T* out = const_cast<T*>(table.at(difference));
    // Fit in y for every node x, then in x for every power of y.
    std::vector<std::vector<long double>> by_node;
    chebyshev_fit(
        [&](long double x) {
          by_node.push_back(chebyshev_fit(
              [&](long double y) { return evaluate(kernel, kBinWidth * (difference + (x - y) / 2), difference); }, n));
          return 0.0L;
        },
        n);
    for (int r = 0; r < n; ++r) {
      int node = 0;
      const auto row = chebyshev_fit([&](long double) { return by_node[node++][r]; }, n);
      for (int q = 0; q < n; ++q) out[r * n + q] = static_cast<T>(row[q]);
    }
  }
  return table;
}

template <class T>
Series<T> build_series() {
  constexpr int degree = kSeriesDegree<T>;
  Series<T> s{};
  // 1 / (1 + z) = 1 - z/2 - z (1 - z) / 2 * p(z) with p(z) = 1 / (1 + z) again: fitting p keeps both ends exact.
  const auto p = unit_interval_fit([](long double z) { return 1 / (1 + z); }, degree - 1);
  std::vector<long double> c(degree + 1, 0.0L);
  c[1] = -0.5L;
  for (int i = 0; i < degree - 1; ++i) {
    c[i + 1] -= p[i] / 2;
    c[i + 2] += p[i] / 2;
  }
  const auto l = unit_interval_fit([](long double z) { return z == 0 ? 1.0L : std::log1p(z) / z; }, degree);
  for (int m = 0; m < degree; ++m) {
    s.sigmoid[m] = static_cast<double>(c[m + 1]);
    s.softplus[m] = static_cast<double>(l[m]);
  }
  return s;
}

}  // namespace

template <class T>
const GridTable<T>& grid_table(Kernel kernel) {
  switch (kernel) {
    case Kernel::sigmoid: {
      static const GridTable<T> table = build<T>(Kernel::sigmoid);
      return table;
    }
    case Kernel::slope: {
      static const GridTable<T> table = build<T>(Kernel::slope);
      return table;
    }
    case Kernel::softplus: {
      static const GridTable<T> table = build<T>(Kernel::softplus);
      return table;
    }
  }
  std::abort();  // not a value of the enumeration
}
template const GridTable<float>& grid_table<float>(Kernel);
template const GridTable<double>& grid_table<double>(Kernel);

template <class T>
const Series<T>& series() {
  static const Series<T> s = build_series<T>();
  return s;
}
template const Series<float>& series<float>();
template const Series<double>& series<double>();

}  // namespace pcoherence
