// One anchor's row, from distances to loss and gradient, by a group of lanes (row.h).
#pragma once

#include "near.h"
#include "objectives.h"

namespace pcoherence {

// A row that has neither ranks nor a gradient of its own: everything of it is `value`.
template <class T, class G>
PCOH_DEVICE Outcome give_up(G& g, const AnchorRow<T>& a, int n, double value, Status status = Status::ok) {
  T* gradient = a.gradient;
  if (gradient != nullptr) each(g, n, [&](int k) { G::put(gradient, k, G::all(T(value))); });
  return {value, value, status};
}

template <class T>
PCOH_INLINE Scaling scaling(Scale scale, const Stats<T>& s, double temperature, double unit) {
  const bool by_mean = scale == Scale::anchor;  // in whatever unit the distances have
  return scaling(s.low, s.high, by_mean ? s.mean : 1, (by_mean ? 1 : unit) / temperature);
}

// A row without weight: nobody to compare. It contributes nothing, but NaN shows.
template <class T, class G, class Row, class Workplace>
PCOH_APART Outcome nobody(G& g, const AnchorRow<T>& a, Row row, const Weighed& weighed, const Workplace& work) {
  const auto finite = [&](const T* distances) {
    row.values = Workplace(work).values(distances, row.n);
    const bool found = stats(g, row, distances, weighed).finite;
    g.sync();
    return found;
  };
  const bool theirs = finite(a.teacher), ours = finite(a.student);
  return give_up(g, a, row.n, theirs && ours ? 0 : std::numeric_limits<double>::quiet_NaN());
}

// ---------------------------------------------------------------- neighbourhood

// ranks [n]: F^T under the row's weights.
template <class T, class G, class Row>
PCOH_APART void near_weights(G& g, const Row& row, const NearDivisor<T>& near, const T* ranks, T* out) {
  const auto zero = G::all(T(0));
  each_candidate(g, row, [&](int k, auto w) {
    const auto counted = w / near(G::get(ranks, k));
    G::put(out, k, w > zero ? counted : zero);  // of the others the rank is anything
  });
}

// As count_near(), without counting: where nobody ties every place is taken once, whatever the row.
template <class T, class G, class Row, class Table>
PCOH_APART Weighed look_up_near(G& g, const Row& row, const Weighed& weighed, const Table& table, const T* plain,
                                T* weights, T* out) {
  const T weight = static_cast<T>(weighed.total / weighed.count);
  const auto place = [&](int k) { return twice_place(row, plain, k, weighed.count); };
  const Table known = table;
  each_indexed(g, row.n, place, [=](int k, int i) {
    weights[k] = weight * known.weight(i);
    out[k] = known.rank(i);
  });
  return {double(weight) * table.total, weighed.count, false};
}

// ---------------------------------------------------------------- the teacher

// Whether a table of places holds to T's last digit although so many pairs tie (see tied_pairs()). Where two tie, the
// weights at two neighbouring places become twice that between them: a second difference.
template <class T>
PCOH_DEVICE bool hardly_ties(double pairs, double count, double h) {
  if (pairs < 1) return true;
  const double second = 2 / (h * h * count * count), sum = count * h * std::log1p(1 / h);
  constexpr double bound = std::numeric_limits<T>::epsilon() / 8;
  return pairs * (std::sqrt(pairs) + 2) / 24 * second < bound * sum;
}

// The weights of the neighbourhood into near [n]: they become the row's, and s what they make of it. True where out [n]
// has F^T under them, too, and for cross_entropy `ties` sum_jk w_j w_k of those that tie. plain: [n] to work in.
template <class T, class Rank, class G, class Row, class Workplace>
PCOH_APART bool enter_neighbourhood(G& g, const Options& options, Row& row, Stats<T>& s, T* near, T* plain, Rank* out,
                                    double& ties, Workplace& work) {
  const NearDivisor<T> divisor(options.neighbourhood);
  const auto table = work.near_table(s.count, divisor);
  const bool may_look_up = options.objective != Objective::cross_entropy && table.available;
  ties = hard_ranks(g, row, s, may_look_up || Workplace::wants_ties, plain, work);
  g.sync();
  const bool whole = s.uniform && s.count <= kWholeRanks<T>;
  Weighed found;
  if (!whole) {
    near_weights(g, row, divisor, plain, near);
    g.sync();
    row.weights = near;
    found = weigh(g, row);
  } else {
    bool looked_up = false;
    if constexpr (sizeof(Rank) == sizeof(T)) {
      looked_up = may_look_up && hardly_ties<T>(tied_pairs(s, ties), s.count, options.neighbourhood);
      if (looked_up) found = look_up_near(g, row, s, table, plain, near, out);
    }
    if (!looked_up) found = count_near(g, row, s, table, plain, near, out, ties, work);
    row.weights = near;
  }
  static_cast<Weighed&>(s) = found;
  g.sync();
  return whole;
}

// F^T of a soft teacher under the row's weights: see teacher_ranks().
template <class T, class Rank, class G, class Row, class Workplace>
PCOH_APART Status soft_teacher_ranks(G& g, const Options& options, double unit, Row& row, const Stats<T>& s, T* plain,
                                     Rank* out, double& entropy, Workplace& work) {
  const Scaling scale = scaling(options.scale, s, options.teacher_temperature, unit);
  return with_sums(g, row, s.low, s.high, scale, work, [&](auto& sums) {
    sums.ranks(plain);
    g.sync();
    const Rank per_weight = static_cast<Rank>(1 / s.total);
    each_element(g, row.n, [&](int k) { out[k] = Rank(plain[k]) * per_weight; });
    g.sync();
    if constexpr (sizeof(Rank) == sizeof(double))
      if (options.objective == Objective::cross_entropy) entropy = sums.cross_total(out, s.total);
  });
}

// F^T under the row's weights, into out [n]: T, or double for cross_entropy, and then its `entropy`, sum_jk w_j w_k
// H(P_jk). near [n] or null: without a neighbourhood. plain: [n] to work in, or `out`.
template <class T, class Rank, class G, class Row, class Workplace>
PCOH_APART Status teacher_ranks(G& g, const Options& options, double unit, Row& row, Stats<T>& s, T* near, T* plain,
                                Rank* out, double& entropy, Workplace& work) {
  double ties = 0;
  const bool ranked = near != nullptr && enter_neighbourhood(g, options, row, s, near, plain, out, ties, work);
  if (options.soft_teacher()) return soft_teacher_ranks(g, options, unit, row, s, plain, out, entropy, work);
  if (!ranked) ties = hard_ranks(g, row, s, options.objective == Objective::cross_entropy, out, work);
  entropy = kLog2 * ties;
  return Status::ok;
}

// ---------------------------------------------------------------- the student

// pull [n] times `factor`, the gradient w.r.t. positions in temperatures -> what the pipeline stores; returns its sum.
// row: with the weights of the scale; positions: of the sums.
template <class T, class G, class Row>
PCOH_APART double store_gradient(G& g, const Options& options, const AnchorRow<T>& a, const Row& row,
                                 const Row& positions, const Stats<T>& s, const Scaling& scale, const T* pull,
                                 T factor) {
  double through_mean = 0;  // -sum_k pull_k s_k: the pull on log(mean)
  if (options.scale == Scale::anchor && s.mean > 0) {
    typename G::Sum sum;
    by_memory(g, pull, [&](const T* from) {
      each(g, row.n, [&](int k) { sum.add(G::get(from, k) * factor * positions.place(k)); });
    });
    through_mean = -a.coefficient * total(g, sum) * positions.unit() / (s.total * s.mean);
  }
  const T per_pull = static_cast<T>(a.coefficient * scale.per_distance * a.chain);
  const T per_weight = static_cast<T>(through_mean * a.chain);
  const T* distances = a.student;  // may be `out`: every lane reads an element before it writes it
  T* out = a.gradient;
  const bool chain_root = a.chain_root;
  const auto zero = G::all(T(0));
  typename G::Sum stored;
  by_memory(g, pull, [&](const T* from) {
    each_candidate(g, row, [&](int k, auto w) {
      const auto d = G::get(distances, k);
      auto v = G::get(from, k) * factor * per_pull + w * per_weight;
      if (chain_root) v = d > zero ? v / d : zero;
      if constexpr (G::sums_gradient) stored.add(v);
      G::put(out, k, v);
    });
  });
  return G::sums_gradient ? total(g, stored) : 0;
}

// ---------------------------------------------------------------- both

// Rows of memory that anchor() takes from its workplace: from the first to the last, then for the teacher's stage, and
// for the student's, which may use the teacher's again. With cross_entropy one of doubles more.
inline constexpr int kKeptRows = 2, kTeacherRows = 1, kStudentRows = 2;
inline constexpr int kAnchorRows = kKeptRows + (kTeacherRows > kStudentRows ? kTeacherRows : kStudentRows);

// What the teacher's stage leaves to the student's.
template <class T>
struct Kept {
  T* ranks;         // [n] F^T
  T* near;          // [n] weights in the neighbourhood, or null: without one
  double* exact;    // [n] F^T for cross_entropy, or null
  double entropy;   // sum_jk w_j w_k H(P_jk) for cross_entropy
  Weighed weighed;  // what the weights of the ranks are
};

// row: of the candidates; it gets the weights of the ranks.
template <class T, class G, class Row, class Workplace>
PCOH_APART Status teacher_stage(G& g, const Options& options, const AnchorRow<T>& a, const Weighed& weighed, Row& row,
                                Kept<T>& kept, Workplace work) {
  row.values = work.ranked_values(a.teacher, row.n);
  Stats<T> s = stats(g, row, a.teacher, weighed);
  if (!s.finite) return Status::not_finite;
  T *ranks = kept.ranks, *near = kept.near;
  Status status;
  if (double* exact = kept.exact; exact != nullptr) {
    status = teacher_ranks(g, options, a.teacher_unit, row, s, near, ranks, exact, kept.entropy, work);
    g.sync();
    each_element(g, row.n, [&](int k) { ranks[k] = static_cast<T>(exact[k]); });
  } else {
    status = teacher_ranks(g, options, a.teacher_unit, row, s, near, ranks, ranks, kept.entropy, work);
  }
  kept.weighed = s;
  g.sync();  // the memory of this stage is used again
  return status;
}

// row: with the weights of the scale; ranked: with those of ranks and objective.
template <class T, class G, class Row, class Workplace>
PCOH_APART Status student_stage(G& g, const Options& options, const AnchorRow<T>& a, const Weighed& weighed, Row& row,
                                Row& ranked, const Kept<T>& kept, Outcome& result, Workplace work) {
  const int n = row.n;
  row.values = ranked.values = work.values(a.student, n);
  const Stats<T> s = stats(g, row, a.student, weighed);
  if (!s.finite) return Status::not_finite;
  T* ranks = work.take(n);
  const Scaling scale = scaling(options.scale, s, options.temperature, a.student_unit);
  return with_sums(g, ranked, s.low, s.high, scale, work, [&](auto& sums) {
    sums.ranks(ranks);
    g.sync();
    const double total = kept.weighed.total;
    const T* pull = ranks;
    T factor = static_cast<T>(1 / total);  // of `pull`, to be the gradient w.r.t. positions
    if (kept.exact != nullptr) {
      result.loss = (sums.cross_total(kept.exact, total) - kept.entropy) / (total * total);
      const T* teacher = kept.ranks;
      each_candidate(g, ranked,
                     [&](int k, auto w) { G::put(ranks, k, w * (G::get(ranks, k) * factor - G::get(teacher, k))); });
      factor *= 2;
    } else {
      result.loss = objective(g, options.objective, ranked, kept.ranks, total, ranks);
      if (a.gradient != nullptr) pull = work.pullback(sums, ranks, n);
    }
    if (result.loss < 0) result.loss = 0;  // by rounding: no objective has a loss below 0
    g.sync();
    if (a.gradient != nullptr) result.stored = store_gradient(g, options, a, row, ranked, s, scale, pull, factor);
  });
}

// row: of the candidates, without values; weighed: its weights.
template <class T, class G, class Row, class Workplace>
PCOH_APART Outcome anchor(G& g, const Options& options, const AnchorRow<T>& a, Row row, const Weighed& weighed,
                          Workplace work) {
  const int n = row.n;
  if (!(weighed.total > 0)) return nobody(g, a, row, weighed, work);
  Kept<T> kept{};
  // The teacher's ranks are touched twice, all else again and again: they are the first to leave fast memory.
  kept.ranks = work.take(n, kAnchorRows - 1);
  if (options.neighbourhood > 0) kept.near = work.take(n, kStudentRows);
  if (options.objective == Objective::cross_entropy) kept.exact = work.template take<double>(n);
  Row ranked = row;
  Outcome result;
  Status status = teacher_stage(g, options, a, weighed, ranked, kept, work);
  if (status == Status::ok) status = student_stage(g, options, a, weighed, row, ranked, kept, result, work);
  if (status == Status::ok) return result;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  return give_up(g, a, n, nan, status == Status::not_finite ? Status::ok : status);
}

}  // namespace pcoherence
