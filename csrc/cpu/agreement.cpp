#include "agreement.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace pcoherence {
namespace {

double pairs_of(std::int64_t n) { return 0.5 * double(n) * double(n - 1); }

// f(begin, end) for every run of equals in `order`.
template <class Equal, class F>
void for_each_run(const std::vector<std::int32_t>& order, Equal&& equal, F&& f) {
  for (std::size_t begin = 0, end; begin < order.size(); begin = end) {
    for (end = begin + 1; end < order.size() && equal(order[begin], order[end]);) ++end;
    f(begin, end);
  }
}

// Mid-ranks of `values` from their order, into ranks by index; returns the number of tied pairs.
template <class T>
double mid_ranks(const T* values, const std::vector<std::int32_t>& order, std::vector<double>& ranks) {
  double ties = 0;
  for_each_run(
      order, [&](std::int32_t i, std::int32_t j) { return values[i] == values[j]; },
      [&](std::size_t begin, std::size_t end) {
        ties += pairs_of(static_cast<std::int64_t>(end - begin));
        for (std::size_t i = begin; i < end; ++i) ranks[order[i]] = 0.5 * double(begin + end - 1);
      });
  return ties;
}

// Sorts `order` by values (bottom-up merging, stable) and returns how many pairs were the wrong way round.
template <class T>
double count_inversions(const T* values, std::vector<std::int32_t>& order, std::vector<std::int32_t>& merged) {
  const std::size_t n = order.size();
  merged.resize(n);
  double inversions = 0;
  for (std::size_t width = 1; width < n; width *= 2) {
    for (std::size_t begin = 0; begin < n; begin += 2 * width) {
      const std::size_t middle = std::min(begin + width, n), end = std::min(begin + 2 * width, n);
      std::size_t left = begin, right = middle;
      for (std::size_t out = begin; out < end; ++out) {
        const bool take_right = right < end && (left == middle || values[order[right]] < values[order[left]]);
        if (take_right) inversions += double(middle - left);
        merged[out] = order[take_right ? right++ : left++];
      }
    }
    order.swap(merged);
  }
  return inversions;
}

double correlation(const std::vector<std::int32_t>& members, const std::vector<double>& a,
                   const std::vector<double>& b) {
  const double mean = 0.5 * double(members.size() - 1);  // of mid-ranks, with or without ties
  double aa = 0, bb = 0, ab = 0;
  for (const std::int32_t i : members) {
    const double x = a[i] - mean, y = b[i] - mean;
    aa += x * x;
    bb += y * y;
    ab += x * y;
  }
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

}  // namespace

template <class T>
Agreement rank_agreement(const T* a, const T* b, std::int64_t n, std::int64_t self, std::int64_t nearest,
                         AgreementScratch& scratch) {
  auto& [by_a, by_b, merged, rank_a, rank_b] = scratch;
  by_a.clear();
  for (std::int32_t i = 0; i < n; ++i) {
    if (i == self) continue;
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      return {nan, nan, nan};
    }
    by_a.push_back(i);
  }
  rank_a.resize(n);
  rank_b.resize(n);
  // By a, then b: within a tie of a nothing is out of order.
  std::sort(by_a.begin(), by_a.end(), [&](std::int32_t i, std::int32_t j) {
    return a[i] != a[j] ? a[i] < a[j] : b[i] != b[j] ? b[i] < b[j] : i < j;
  });
  const double ties_a = mid_ranks(a, by_a, rank_a);
  double ties_both = 0;
  for_each_run(
      by_a, [&](std::int32_t i, std::int32_t j) { return a[i] == a[j] && b[i] == b[j]; },
      [&](std::size_t begin, std::size_t end) { ties_both += pairs_of(static_cast<std::int64_t>(end - begin)); });
  by_b = by_a;
  const double discordant = count_inversions(b, by_b, merged);
  const double ties_b = mid_ranks(b, by_b, rank_b);

  Agreement result;
  const auto count = static_cast<std::int64_t>(by_a.size());
  const double pairs = pairs_of(count), untied_a = pairs - ties_a, untied_b = pairs - ties_b;
  // Pairs that neither ties: concordant + discordant.
  const double decided = pairs - ties_a - ties_b + ties_both;
  if (untied_a > 0 && untied_b > 0)
    result.kendall = (decided - 2 * discordant) / (std::sqrt(untied_a) * std::sqrt(untied_b));
  if (count > 0) result.spearman = correlation(by_a, rank_a, rank_b);

  const std::int64_t k = std::min(nearest, count);
  const auto first = [&](std::vector<std::int32_t>& order, const T* values) {
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](std::int32_t i, std::int32_t j) {
      return values[i] != values[j] ? values[i] < values[j] : i < j;
    });
    std::sort(order.begin(), order.begin() + k);
  };
  first(by_a, a);
  first(by_b, b);
  merged.clear();
  std::set_intersection(by_a.begin(), by_a.begin() + k, by_b.begin(), by_b.begin() + k, std::back_inserter(merged));
  if (k > 0) result.overlap = double(merged.size()) / double(k);
  return result;
}

template Agreement rank_agreement<float>(const float*, const float*, std::int64_t, std::int64_t, std::int64_t,
                                         AgreementScratch&);
template Agreement rank_agreement<double>(const double*, const double*, std::int64_t, std::int64_t, std::int64_t,
                                          AgreementScratch&);

}  // namespace pcoherence
