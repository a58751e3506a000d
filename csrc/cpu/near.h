// Ranks in a neighbourhood, by counting who is at each place.
#pragma once

#include "../near.h"
#include "core.h"

namespace pcoherence::PCOH_ISA {
namespace {

// See ../row.h.
template <class T, class Table, class Rank, class Workplace>
Weighed count_near(const Core<T>& core, const Row<T>& row, const Weighed& weighed, const Table& table, const T* plain,
                   T* weights, Rank* out, double& ties, const Workplace& work) {
  const int count = weighed.count, places = 2 * count - 1;
  Workplace own = work;
  int* here = own.template take<int>(places + 1);
  double* before = own.template take<double>(places + 1);
  const auto place = [&](int k) { return twice_place(row, plain, k, count); };
  each_element(core, places + 1, [&](int i) { here[i] = 0; });
  each_indexed(core, row.n, place, [&](int, int i) { ++here[i]; });
  const T weight = static_cast<T>(weighed.total / count);
  const Table known = table;  // a copy, which no store can change
  const auto at = [=](int i) { return weight * known.weight(i); };
  const auto mass = [=](int i) { return double(here[i]) * double(at(i)); };
  running_sums(core, places, mass, [&](int i, double sum) { before[i] = sum; });
  const double all = before[places - 1] + mass(places - 1), per_all = 1 / all;
  ties = sum_each(core, places, [&](int i) { return mass(i) * mass(i); });
  each_element(core, places, [&](int i) { before[i] = (before[i] + mass(i) / 2) * per_all; });
  before[places] = 0;  // of those without weight
  each_indexed(core, row.n, place, [&](int k, int i) {
    weights[k] = at(i);
    out[k] = static_cast<Rank>(before[i]);
  });
  return {all, count, false};
}

}  // namespace
}  // namespace pcoherence::PCOH_ISA
