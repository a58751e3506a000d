// One anchor's row by one group of threads, from distances to loss and gradient: what csrc/cpu/rows.inc does, with the
// same meaning in every corner (rows without weight, NaN, ties, vanishing gradients).
#pragma once

#include "../objectives.h"
#include "../options.h"
#include "grid.h"
#include "hard_ranks.h"
#include "pairs.h"
#include "scan.h"

namespace pcoherence::cuda {

// ---------------------------------------------------------------- tasks: pointers to device memory

// How the sums of a row are computed.
template <class T>
struct Summation {
  Method method;
  int most_bins;         // that a group has memory for
  std::int64_t reserve;  // bytes of fast memory that rows leave to the grid
  DeviceTables<T> tables;
  int* status;  // [1] set to 1 where an explicit grid would need more bins
};

template <class T>
struct RowTask {
  Options options;
  Summation<T> sums;
  std::int64_t rows;
  int n;
  const T* student;                           // [rows, n] distances
  const T* teacher;                           // [rows, n] distances, or for hard ranks anything in the same order
  const double *student_unit, *teacher_unit;  // [1] a distance in the metric = unit * the distance here; or null: 1
  const T* weights;                           // [n] of the candidates, or null: ones
  const std::int64_t* self;                   // [rows] candidate excluded, -1 for none; or null
  const T* coefficients;                      // [rows] c_i, or null: ones
  double chain;     // what a gradient w.r.t. a distance is multiplied by before it is stored, ...
  bool chain_root;  // ... and with this divided by the distance (0 where that is 0)
  T* gradient;      // [rows, n] of c_i L_i, or null: losses alone. May be `student`
  double* losses;   // [rows] L_i
};

template <class T>
struct SoftRankTask {
  Summation<T> sums;
  std::int64_t rows;
  int n;
  const T* values;   // [rows, n]
  const T* weights;  // [n], or [rows, n] with `weights_per_row`, or null
  bool weights_per_row;
  const T* upstream;  // [rows, n], then `out` is its pullback; null: `out` is the ranks
  T* out;             // [rows, n]
  double temperature;
};

template <class T>
struct RowSumsTask {
  std::int64_t rows;
  int n;
  const T* matrix;  // [rows, n]
  double* sums;     // [rows]
};

// ---------------------------------------------------------------- positions

// What a row is in the units of some sums.
template <class T>
struct Positions {
  T base, factor, bottom, top;

  // Only candidates of weight 0 can lie outside of [bottom, top], or be NaN.
  PCOH_DEVICE T operator()(T value) const { return std::fmin(std::fmax((value - base) * factor, bottom), top); }
};

// The range of a row's values, and where its positions begin. The base is the value nearest to 0: taken from the lowest
// value, positions would lose the digits that tell apart what lies close together far away. A grid begins at the
// lowest: there are at most most_bins, so that no value is far from it.
template <class T>
struct Range {
  T low, high;

  template <bool from_low>
  PCOH_DEVICE T base() const {
    return from_low || low > 0 ? low : high < 0 ? high : T(0);
  }
  template <class Sums>
  PCOH_DEVICE Positions<T> positions(const Scaling& scale) const {
    const T from = base<Sums::from_low>();
    const double factor = scale.per_distance / Sums::unit;
    return {from, static_cast<T>(factor), bounded((double(low) - double(from)) * factor),
            bounded((double(high) - double(from)) * factor)};
  }

 private:
  static PCOH_DEVICE T bounded(double position) {
    constexpr double most = std::numeric_limits<T>::max();
    return static_cast<T>(std::fmin(std::fmax(position, -most), most));
  }
};

// ---------------------------------------------------------------- row statistics

template <class T>
struct Stats {
  double weight, product;  // sum_k w_k, sum_k w_k v_k
  T low, high;             // over weights > 0
  T least, most;           // weights > 0
  int count;               // of weights > 0

  PCOH_DEVICE double mean() const { return weight > 0 ? product / weight : 0; }
  PCOH_DEVICE bool uniform() const { return least == most; }
  PCOH_DEVICE Range<T> range() const { return {low, high}; }
  PCOH_DEVICE bool finite() const { return std::isfinite(product) && std::isfinite(double(high) - double(low)); }

  static PCOH_DEVICE Stats none() {
    constexpr T inf = std::numeric_limits<T>::infinity();
    return {0, 0, inf, -inf, inf, -inf, 0};
  }
  PCOH_DEVICE void add(T v, T w) {
    weight += double(w);
    product += double(w) * double(v);  // 0 * NaN shows, as it does in the reference
    if (!(w > 0)) return;
    low = v < low ? v : low;
    high = v > high ? v : high;
    least = w < least ? w : least;
    most = w > most ? w : most;
    ++count;
  }
  // The same for weights of 1 and 0, up to finish_unweighted().
  PCOH_DEVICE void add_unweighted(T v, bool counts) {
    product += double(counts ? v : v * 0);
    low = counts && v < low ? v : low;
    high = counts && v > high ? v : high;
    count += counts;
  }
  PCOH_DEVICE void finish_unweighted() {
    weight = count;
    if (count > 0) least = most = 1;
  }
};
struct Merge {
  template <class T>
  PCOH_DEVICE Stats<T> operator()(const Stats<T>& a, const Stats<T>& b) const {
    return {a.weight + b.weight,
            a.product + b.product,
            b.low < a.low ? b.low : a.low,
            b.high > a.high ? b.high : a.high,
            b.least < a.least ? b.least : a.least,
            b.most > a.most ? b.most : a.most,
            a.count + b.count};
  }
};

// Statistics of the row's candidates with values `from` [n], which become row.values unless that is null.
template <class T, class G>
PCOH_APART Stats<T> stats(G& g, const RowView<T>& row, const T* from) {
  Stats<T> s = Stats<T>::none();
  by_memory(g, row.values, [&](T* copy) {
    const auto keep = [=](int k, T v) {
      if (copy != nullptr) copy[k] = v;
      return v;
    };
    if (row.weights != nullptr) {
      each(g, row.n, [&](int k) { s.add(keep(k, from[k]), row.weight(k)); });
    } else {
      each(g, row.n, [&, self = row.self](int k) { s.add_unweighted(keep(k, from[k]), k != self); });
      s.finish_unweighted();
    }
  });
  return reduce(g, s, Merge{});
}

// ---------------------------------------------------------------- soft ranks

// Where "auto" leaves the grid: its convolution costs an element 29 * 3 * order operations a bin over n, about what
// the scan's sort and recurrences cost at one bin for every 8 elements (64-bit: twice the order, slower arithmetic).
template <class T>
inline constexpr int kElementsPerBin = sizeof(T) == 4 ? 8 : 32;
// Up to this many elements all pairs take less time than the barriers of the scan's sort: 50 of them against 25
// operations for each of two elements a thread.
inline constexpr int kFewPairs = 512;

template <class T>
PCOH_DEVICE Method choose(const Summation<T>& sums, double range, int n) {
  if (sums.method != Method::automatic) return sums.method;
  const double bins = range / kBinWidth;
  if (bins * kElementsPerBin<T> <= n && bins < sums.most_bins) return Method::grid;
  return n <= kFewPairs ? Method::pairs : Method::scan;
}

// One way to sum. Apart, so that what the caller holds does not take registers from the loops.
template <class Sums, class T, class G, class F>
PCOH_APART void run_sums(G& g, const Summation<T>& how, const RowView<T>& row, const Range<T>& range,
                         const Scaling& scale, Arena arena, F& f) {
  const Positions<T> position = range.template positions<Sums>(scale);
  by_memory(g, row.values, [&](T* values) { each(g, row.n, [=](int k) { values[k] = position(values[k]); }); });
  g.sync();
  Sums sums(g, row, position.top, how.tables, arena);
  f(sums);
}

// Calls f(sums) with the kernel sums of a row, whose values become positions in their units. False: too many bins.
template <class T, class G, class F>
PCOH_DEVICE bool with_sums(G& g, const Summation<T>& how, const RowView<T>& row, const Range<T>& range,
                           const Scaling& scale, Arena arena, F f) {
  switch (choose(how, scale.range, row.n)) {
    case Method::grid:
      if (!(static_cast<T>(scale.range / kBinWidth) < T(how.most_bins))) {  // as the grid will round it
        if (g.thread() == 0) *how.status = 1;
        return false;
      }
      run_sums<Grid<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::scan:
      run_sums<Scan<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::pairs:
      run_sums<Pairs<T, G>>(g, how, row, range, scale, arena, f);
      break;
    case Method::automatic:
      PCOH_TRAP();  // choose() has chosen
  }
  return true;
}

// Sum of w_j s_j (2 F_j - 1) over the row, s in temperatures: the linear part of cross_entropy, divided by W.
template <class T, class G>
PCOH_APART double linear_part(G& g, const RowView<T>& row, double unit, const T* ranks) {
  double sum = 0;
  with_weights(row, [&](auto weight) {
    each(g, row.n, [&, values = row.values](int k) {
      sum += double(weight(k)) * double(values[k]) * (2 * double(ranks[k]) - 1);
    });
  });
  return total(g, sum) * unit;
}

// ---------------------------------------------------------------- objectives

struct Triple {
  double a, b, c;
  friend PCOH_DEVICE Triple operator+(const Triple& x, const Triple& y) { return {x.a + y.a, x.b + y.b, x.c + y.c}; }
};

// Loss of one anchor from its ranks R [n], which become d loss / d F.
template <class Phi, class T, class G>
PCOH_DEVICE double residual_objective(G& g, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  double loss = 0;
  by_memory(g, ranks, [&](T* student) {
    with_weights(row, [&](auto weight_of) {
      each(g, row.n, [&](int k) {
        const T r = student[k] * per_weight - teacher[k], w = weight_of(k);
        loss += double(w * Phi::value(r));
        student[k] = w * Phi::slope(r, kResolution<T>) * per_weight;
      });
    });
  });
  return total(g, loss) / weight;
}

template <class T, class G>
PCOH_DEVICE double spearman(G& g, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
  const T per_weight = static_cast<T>(1 / weight);
  Triple sum{};
  each(g, row.n, [&](int k) {
    ranks[k] *= per_weight;
    sum.a += double(row.weight(k)) * double(ranks[k]);
    sum.b += double(row.weight(k)) * double(teacher[k]);
  });
  sum = total(g, sum);
  const T student_mean = static_cast<T>(sum.a / weight), teacher_mean = static_cast<T>(sum.b / weight);
  Triple square{};  // of the student, of the teacher, their product
  each(g, row.n, [&](int k) {
    const T f = ranks[k] - student_mean, t = teacher[k] - teacher_mean, w = row.weight(k);
    square = square + Triple{double(w * f * f), double(w * t * t), double(w * f * t)};
  });
  square = total(g, square);
  const double scale = std::sqrt(square.a * square.b);
  constexpr double deviation = kSpearmanFloor * std::numeric_limits<T>::epsilon();
  constexpr double floor = deviation * deviation;
  const bool flat = !(square.a > weight * floor) || !(square.b > weight * floor);
  const double correlation = flat ? 0 : square.c / scale;
  const T by_teacher = flat ? T(0) : static_cast<T>(1 / scale);
  const T by_student = flat ? T(0) : static_cast<T>(correlation / square.a);
  each(g, row.n, [&](int k) {
    const T f = ranks[k] - student_mean, t = teacher[k] - teacher_mean;
    ranks[k] = row.weight(k) * (f * by_student - t * by_teacher);
  });
  return 1 - correlation;
}

template <class T, class G>
PCOH_APART double objective(G& g, Objective which, const RowView<T>& row, const T* teacher, double weight, T* ranks) {
  switch (which) {
    case Objective::mse:
      return residual_objective<Mse>(g, row, teacher, weight, ranks);
    case Objective::l1:
      return residual_objective<L1>(g, row, teacher, weight, ranks);
    case Objective::huber:
      return residual_objective<Huber>(g, row, teacher, weight, ranks);
    case Objective::spearman:
      return spearman(g, row, teacher, weight, ranks);
    case Objective::cross_entropy:
      break;  // not a function of the residuals: see anchor_row()
  }
  PCOH_TRAP();
  return 0;
}

// ---------------------------------------------------------------- one anchor

template <class T, class G>
PCOH_DEVICE void fill(G& g, T* row, T value, int n) {
  each(g, n, [=](int k) { row[k] = value; });
}

// A row that has neither ranks nor a gradient of its own: everything of it is `value`.
template <class T, class G>
PCOH_DEVICE void give_up(G& g, const RowTask<T>& task, std::int64_t r, double value) {
  if (task.gradient != nullptr) fill(g, task.gradient + r * task.n, T(value), task.n);
  if (g.thread() == 0) task.losses[r] = value;
}

template <class T>
PCOH_DEVICE Scaling scaling(Scale scale, const Stats<T>& s, double temperature, const double* unit) {
  const double mean = scale == Scale::anchor ? s.mean() : 1;
  return pcoherence::scaling(s.low, s.high, mean, (unit != nullptr ? *unit : 1) / temperature);
}

// pull [n] times `factor`, the gradient w.r.t. positions (in temperatures) -> what the pipeline stores. row: positions.
template <class T, class G>
PCOH_APART void store_gradient(G& g, const RowTask<T>& task, std::int64_t r, const RowView<T>& row, double unit,
                               const Stats<T>& s, const Scaling& scale, const T* pull, T factor) {
  const double coefficient = task.coefficients ? double(task.coefficients[r]) : 1.0;
  double through_mean = 0;  // -sum_k pull_k s_k: the pull on log(mean)
  if (task.options.scale == Scale::anchor) {
    double sum = 0;
    by_memory(g, pull, [&](const T* from) {
      each(g, row.n, [&, values = row.values](int k) { sum += double(from[k] * factor) * double(values[k]); });
    });
    through_mean = -coefficient * total(g, sum) * unit;
  }
  const double mean = s.mean();
  const bool by_mean = task.options.scale == Scale::anchor && mean > 0;
  const T per_pull = static_cast<T>(coefficient * scale.per_distance * task.chain);
  const T per_weight = by_mean ? static_cast<T>(through_mean / (s.weight * mean) * task.chain) : T(0);
  const T* distances = task.student + r * task.n;  // may be `out`: every thread reads an element before it writes it
  T* out = task.gradient + r * task.n;
  const bool chain_root = task.chain_root;
  by_memory(g, pull, [&](const T* from) {
    with_weights(row, [&](auto weight) {
      each(g, row.n, [=](int k) {
        const T d = distances[k];
        const T v = from[k] * factor * per_pull + weight(k) * per_weight;
        out[k] = !chain_root ? v : d > 0 ? v / d : T(0);
      });
    });
  });
}

// Memory of one group for rows of n: the teacher's ranks, then either the teacher's values and their ranking or the
// student's values and ranks with the kernel sums.
template <class T, class G>
constexpr std::int64_t row_bytes(std::int64_t n, int threads, std::int64_t bins) {
  const std::int64_t row = n * sizeof(T) + 16, sort = hard_rank_bytes(n, sizeof(T));
  const std::int64_t grid = Grid<T, G>::bytes(bins) + Grid<T, G>::lane_bytes(threads);
  std::int64_t sums = grid;
  if (Scan<T, G>::bytes(n, threads) > sums) sums = Scan<T, G>::bytes(n, threads);
  if (Pairs<T, G>::bytes(n) > sums) sums = Pairs<T, G>::bytes(n);
  return row + (sort > row + sums ? row + sort : 2 * row + sums);
}

template <class T, class G>
PCOH_APART void anchor_row(G& g, const RowTask<T>& task, std::int64_t r, Arena arena) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const int n = task.n;
  const std::int64_t row_size = std::int64_t(n) * sizeof(T) + 16;
  const int self = task.self ? static_cast<int>(task.self[r]) : -1;

  // F^T is touched twice, all else again and again: it is the first to leave fast memory.
  T* teacher = arena.take<T>(n, 3 * row_size + task.sums.reserve);
  double entropy = 0;  // sum_jk w_j w_k H(P_jk), for cross_entropy
  {
    Arena stage = arena;
    T* values = stage.take<T>(n, task.sums.reserve);
    const RowView<T> row{values, task.weights, n, self};
    const Stats<T> t = stats(g, row, task.teacher + r * n);
    if (t.weight == 0) return give_up(g, task, r, 0);  // nobody to compare: the anchor contributes nothing
    if (!t.finite()) return give_up(g, task, r, nan);
    if (!task.options.soft_teacher()) {
      const HardRanks<T> hard{t.count, t.weight, t.uniform(), t.low, t.high};
      const double ties = hard_ranks(g, row, hard, teacher, stage);
      if (task.options.objective == Objective::cross_entropy) entropy = 0.69314718055994530942 * ties;  // log 2
    } else {
      const T per_weight = static_cast<T>(1 / t.weight);
      const Scaling scale = scaling(task.options.scale, t, task.options.teacher_temperature, task.teacher_unit);
      const bool done = with_sums(g, task.sums, row, t.range(), scale, stage, [&](auto& sums) {
        sums.ranks(teacher);
        g.sync();
        each(g, n, [=](int k) { teacher[k] *= per_weight; });
        if (task.options.objective == Objective::cross_entropy)
          entropy = sums.softplus_total() - t.weight * linear_part(g, row, sums.unit, teacher);
      });
      if (!done) return give_up(g, task, r, nan);
    }
    g.sync();  // the stage's memory is used again
  }

  T* values = arena.take<T>(n, task.sums.reserve);
  const RowView<T> row{values, task.weights, n, self};
  const Stats<T> s = stats(g, row, task.student + r * n);
  if (!s.finite()) return give_up(g, task, r, nan);
  T* ranks = arena.take<T>(n, task.sums.reserve);
  const Scaling scale = scaling(task.options.scale, s, task.options.temperature, task.student_unit);
  const bool done = with_sums(g, task.sums, row, s.range(), scale, arena, [&](auto& sums) {
    sums.ranks(ranks);
    g.sync();
    double loss = 0;
    T factor = static_cast<T>(1 / s.weight);  // of what `ranks` becomes, to be the gradient w.r.t. positions
    if (task.options.objective == Objective::cross_entropy) {
      loss = (sums.softplus_total() - s.weight * linear_part(g, row, sums.unit, teacher) - entropy) /
             (s.weight * s.weight);
      each(g, n, [&](int k) { ranks[k] = row.weight(k) * (ranks[k] * factor - teacher[k]); });
      factor *= 2;
    } else {
      loss = objective(g, task.options.objective, row, teacher, s.weight, ranks);
      if (task.gradient != nullptr) sums.pullback(ranks, ranks);
    }
    if (g.thread() == 0) task.losses[r] = loss;
    g.sync();
    if (task.gradient != nullptr) store_gradient(g, task, r, row, sums.unit, s, scale, ranks, factor);
  });
  if (!done) give_up(g, task, r, nan);
}

// ---------------------------------------------------------------- sums, and soft ranks on their own

template <class T, class G>
PCOH_DEVICE void row_sums(G& g, const RowSumsTask<T>& task, std::int64_t r) {
  double sum = 0;
  each(g, task.n, [&](int k) { sum += double(task.matrix[r * task.n + k]); });
  sum = total(g, sum);
  if (g.thread() == 0) task.sums[r] = sum;
}

// What the values of a row span, whatever their weights, since all of them are ranked.
template <class T>
struct Span {
  Ends ends;
  T low, high;  // of the finite values; low > high: there are none
  int nans;

  static PCOH_DEVICE Span none() {
    constexpr T inf = std::numeric_limits<T>::infinity();
    return {{}, inf, -inf, 0};
  }
  PCOH_DEVICE void add(T v, T w) {
    nans += v != v;
    ends.add(double(v), double(w));
    if (!std::isfinite(v)) return;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  PCOH_DEVICE Range<T> range() const { return low <= high ? Range<T>{low, high} : Range<T>{0, 0}; }
};
struct MergeSpans {
  template <class T>
  PCOH_DEVICE Span<T> operator()(const Span<T>& a, const Span<T>& b) const {
    return {{a.ends.below + b.ends.below, a.ends.between + b.ends.between, a.ends.above + b.ends.above},
            b.low < a.low ? b.low : a.low,
            b.high > a.high ? b.high : a.high,
            a.nans + b.nans};
  }
};

template <class T, class G>
PCOH_DEVICE void soft_rank_row(G& g, const SoftRankTask<T>& task, std::int64_t r, Arena arena) {
  const int n = task.n;
  const T* given = task.values + r * n;
  const T* given_weights = task.weights ? task.weights + (task.weights_per_row ? r * n : 0) : nullptr;
  const auto weight = [=](int k) { return given_weights ? given_weights[k] : T(1); };
  T* result = arena.take<T>(n, task.sums.reserve);
  T* values = arena.take<T>(n, task.sums.reserve);
  T* weights = arena.take<T>(n, task.sums.reserve);
  T* out = task.out + r * n;
  Span<T> span = Span<T>::none();
  each(g, n, [&](int k) { span.add(given[k], weight(k)); });
  span = reduce(g, span, MergeSpans{});
  if (span.nans > 0) return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  // Infinite values rank at the ends and have no slope: they leave the row, weight 0 and any place.
  const Range<T> range = span.range();
  each(g, n, [=](int k) {
    const bool finite = std::isfinite(given[k]);
    values[k] = finite ? given[k] : range.low;
    weights[k] = finite ? weight(k) : T(0);
    if (task.upstream != nullptr) result[k] = finite ? task.upstream[r * n + k] : T(0);
  });
  g.sync();
  // No bound on the range, which scaling() has: values that mask others may be as low as T goes.
  const double per_value = 1 / task.temperature;
  const Scaling scale{per_value, (double(range.high) - double(range.low)) * per_value};
  const RowView<T> row{values, weights, n, -1};
  const bool done = with_sums(g, task.sums, row, range, scale, arena, [&](auto& sums) {
    if (task.upstream == nullptr)
      sums.ranks(result);
    else
      sums.pullback(result, result);
  });
  if (!done) return fill(g, out, std::numeric_limits<T>::quiet_NaN(), n);
  g.sync();
  const T factor = static_cast<T>(per_value);
  const bool pulled = task.upstream != nullptr;
  each(g, n, [=](int k) {
    out[k] = pulled ? result[k] * factor : static_cast<T>(span.ends.rank(given[k], result[k])) + T(0.5);
  });
}

}  // namespace pcoherence::cuda
