// One anchor's row, from distances to loss and gradient, by a group of lanes (row.h).
#pragma once

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

// ---------------------------------------------------------------- neighbourhood

// w_j / (1 + F_j / h) = h w_j / (h + F_j), but for a factor, on which nothing depends: so chosen that no h under- or
// overflows.
template <class T>
struct NearDivisor {
  T offset, slope;

  PCOH_DEVICE explicit NearDivisor(double h)
      : offset(static_cast<T>(h / (h + 0.5))), slope(static_cast<T>(1 / (h + 0.5))) {}
  template <class V>
  PCOH_DEVICE V operator()(V rank) const {
    return offset + rank * slope;
  }
};

// ranks [n]: F^T under the row's weights.
template <class T, class G, class Row>
PCOH_APART void near_weights(G& g, const Row& row, const NearDivisor<T>& near, const T* ranks, T* out) {
  const auto zero = G::all(T(0));
  each_candidate(g, row, [&](int k, auto w) {
    const auto counted = w / near(G::get(ranks, k));
    G::put(out, k, w > zero ? counted : zero);  // of the others the rank is anything
  });
}

// Hard ranks of `count` candidates under equal weights, no two alike -> those under near weights, in place: of each, by
// its place, what weighs before it and half of its own.
template <class T, class G, class Workplace>
PCOH_APART void rerank(G& g, int n, int count, const NearDivisor<T>& near, T* ranks, Workplace& work) {
  const T* table = work.near_ranks(g, count, near);
  each_element(g, n, [&](int k) {
    const int place = static_cast<int>(ranks[k] * T(count));
    ranks[k] = table[place < count ? place : count - 1];  // of weight 0: any
  });
}

// ---------------------------------------------------------------- the teacher

// F^T under the row's weights, into `out`; `entropy`, for cross_entropy: sum_jk w_j w_k H(P_jk). With a neighbourhood
// the row's weights become those, in `near_weights` [n], and s what they make of it.
template <class T, class G, class Row, class Workplace>
PCOH_DEVICE Status teacher_ranks(G& g, const Options& options, double unit, Row& row, Stats<T>& s, T* near, T* out,
                                 double& entropy, Workplace& work) {
  const bool cross_entropy = options.objective == Objective::cross_entropy;
  bool ranked = false;
  if (near != nullptr) {
    const NearDivisor<T> divisor(options.neighbourhood);
    const double ties = hard_ranks(g, row, s, true, out, work);
    g.sync();
    near_weights(g, row, divisor, out, near);
    g.sync();
    // A pair that ties would add 2 / count to 1.
    const bool distinct = s.uniform && ties * s.count <= s.total * s.total * (1 + 1.0 / s.count);
    const int count = s.count;
    row.weights = near;
    static_cast<Weighed&>(s) = weigh(g, row);
    ranked = distinct && !options.soft_teacher();
    if (ranked) {
      rerank(g, row.n, count, divisor, out, work);
      if (cross_entropy) {
        typename G::Sum squares;
        each_candidate(g, row, [&](int, auto w) { squares.add(w * w); });
        entropy = kLog2 * total(g, squares);
      }
    }
  }
  if (ranked) return Status::ok;
  if (!options.soft_teacher()) {
    entropy = kLog2 * hard_ranks(g, row, s, cross_entropy, out, work);
    return Status::ok;
  }
  const Scaling scale = scaling(options.scale, s, options.teacher_temperature, unit);
  const T per_weight = static_cast<T>(1 / s.total);
  return with_sums(g, row, s.low, s.high, scale, work, [&](auto& sums) {
    sums.ranks(out);
    g.sync();
    each(g, row.n, [&](int k) { G::put(out, k, G::get(out, k) * per_weight); });
    if (cross_entropy) entropy = sums.softplus_total() - s.total * linear_part(g, row, out, 0);
  });
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

// Rows of memory that anchor() takes from its workplace: from the first to the last, then for the teacher's stage, and
// for the student's, which may use the teacher's again.
inline constexpr int kKeptRows = 2, kTeacherRows = 1, kStudentRows = 2;
inline constexpr int kAnchorRows = kKeptRows + (kTeacherRows > kStudentRows ? kTeacherRows : kStudentRows);

// row: of the candidates, without values; weighed: its weights.
template <class T, class G, class Row, class Workplace>
PCOH_APART Outcome anchor(G& g, const Options& options, const AnchorRow<T>& a, Row row, const Weighed& weighed,
                          Workplace work) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const int n = row.n;
  if (!(weighed.total > 0)) {  // nobody to compare: the anchor contributes nothing, but NaN shows
    const auto finite = [&](const T* distances) {
      row.values = Workplace(work).values(distances, n);
      const bool found = stats(g, row, distances, weighed).finite;
      g.sync();
      return found;
    };
    const bool theirs = finite(a.teacher), ours = finite(a.student);
    return give_up(g, a, n, theirs && ours ? 0 : nan);
  }
  const bool cross_entropy = options.objective == Objective::cross_entropy;

  // The teacher's ranks are touched twice, all else again and again: they are the first to leave fast memory.
  T* teacher = work.take(n, kAnchorRows - 1);
  T* near = options.neighbourhood > 0 ? work.take(n, kStudentRows) : nullptr;
  Row ranked = row;  // with the weights of ranks and objective; `row` keeps those of the scale
  Weighed counted;   // under those
  double entropy = 0;
  {
    Workplace stage = work;
    ranked.values = stage.values(a.teacher, n);
    Stats<T> t = stats(g, ranked, a.teacher, weighed);
    if (!t.finite) return give_up(g, a, n, nan);
    const Status status = teacher_ranks(g, options, a.teacher_unit, ranked, t, near, teacher, entropy, stage);
    if (status != Status::ok) return give_up(g, a, n, nan, status);
    counted = t;
    g.sync();  // the stage's memory is used again
  }

  row.values = ranked.values = work.values(a.student, n);
  const Stats<T> drawn = stats(g, row, a.student, weighed);
  if (!drawn.finite) return give_up(g, a, n, nan);
  Stats<T> s = drawn;
  static_cast<Weighed&>(s) = counted;
  T* ranks = work.take(n);
  const Scaling scale = scaling(options.scale, s, options.temperature, a.student_unit);
  Outcome result;
  const Status status = with_sums(g, ranked, s.low, s.high, scale, work, [&](auto& sums) {
    sums.ranks(ranks);
    g.sync();
    const T* pull = ranks;
    T factor = static_cast<T>(1 / s.total);  // of `pull`, to be the gradient w.r.t. positions
    if (cross_entropy) {
      const int levels = s.uniform && !options.soft_teacher() ? 2 * s.count : 0;  // ties share a half
      result.loss =
          (sums.softplus_total() - s.total * linear_part(g, ranked, teacher, levels) - entropy) / (s.total * s.total);
      each_candidate(g, ranked,
                     [&](int k, auto w) { G::put(ranks, k, w * (G::get(ranks, k) * factor - G::get(teacher, k))); });
      factor *= 2;
    } else {
      result.loss = objective(g, options.objective, ranked, teacher, s.total, ranks);
      if (a.gradient != nullptr) pull = work.pullback(sums, ranks, n);
    }
    g.sync();
    if (a.gradient != nullptr) result.stored = store_gradient(g, options, a, row, ranked, drawn, scale, pull, factor);
  });
  return status == Status::ok ? result : give_up(g, a, n, nan, status);
}

}  // namespace pcoherence
