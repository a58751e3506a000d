// Points made ready for distances by matrix products, as pcoherence/backends/points.py does it: a centre and a scale
// found from a sample by one thread block, then a warp a point, and identical points found by a hash table.
#pragma once

#include "distances.h"

namespace pcoherence::cuda {

template <class T>
struct CentreTask {
  std::int64_t n;
  int width;
  bool directions;
  const T* points;  // [n, width] the candidates
  double* centre;   // [width]
  double* scale;    // [1] a power of two
  double* memory;   // [kCentreMemory]
};

// prepared = ((x or x / |x|) - centre) * scale; rows = x * scale, by whose differences near pairs are measured.
template <class T>
struct PrepareTask {
  std::int64_t rows;
  int width;
  bool directions;
  const T* points;               // [rows, width]
  const double *centre, *scale;  // [width], [1]
  T* prepared;                   // [rows, width]
  T* scaled;                     // [rows, width], or null: of directions the prepared ones serve
  double* norms;                 // [rows] |prepared|^2
  std::uint64_t* hashes;         // [rows], or null
  int* table;                    // with hashes: [2 * table_size(rows)] to be cleared for IdenticalTask
};

// The points of equal bits that a slot stands for, and the first of them. Who owns a slot depends on who comes first;
// which points share one does not, nor does their lowest number.
struct Identity {
  int* owners;        // [size] a point; kNobody: free
  int* lowest;        // [size] the first point
  int* slots;         // [n] of every point
  std::int64_t size;  // a power of two
};
inline constexpr int kNobody = 0x7fffffff;

template <class T>
struct IdenticalTask {
  std::int64_t n;
  int width;
  const T* rows;                // [n, width] without -0
  const std::uint64_t* hashes;  // [n]
  Identity found;
};

template <class T>
struct FirstTask {
  std::int64_t n;
  Identity found;
  std::int64_t* first;  // [n] the first point that is identical
};

inline constexpr int kCentreThreads = 512;  // 16 warps, whose partial sums of 32 features fill the scratch
inline constexpr int kSample = 256;         // SAMPLE of points.py
inline constexpr int kCentreMemory = 2 * kSample + 1;

// At most half full, so that a free slot is a few steps away.
PCOH_DEVICE constexpr std::int64_t table_size(std::int64_t n) {
  std::int64_t size = 64;
  while (size < 2 * n) size *= 2;
  return size;
}

PCOH_DEVICE double power_of_two_below(double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, exponent - 1);
}

// By what a vector of this squared length is divided to give its direction; a zero vector stays zero.
PCOH_DEVICE double length_from(double square) {
  return square == 0 ? std::numeric_limits<double>::infinity() : std::sqrt(square);
}

// ---------------------------------------------------------------- the centre

// The sampled candidates, as directions or as they are, by the whole group.
template <class T, class G>
class Sample {
 public:
  PCOH_DEVICE Sample(G& g, const CentreTask<T>& task)
      : g_(g), task_(task), count_(static_cast<int>(task.n < kSample ? task.n : kSample)) {
    far_ = task.memory;
    lengths_ = far_ + kSample;
    picked_ = lengths_ + kSample;
    if (task.directions) {
      for (int i = g.warp(); i < count_; i += g.warps()) {
        const double length = length_of(row(i));
        if (g.lane() == 0) lengths_[i] = length;
      }
      g.sync();
    }
  }

  // centre = mean of the points that are no farther from the last centre than `limit`.
  PCOH_DEVICE void mean(bool all, double limit) {
    const auto uses = [=, this](int i) { return all || far_[i] <= limit; };
    int mine = 0;
    each(g_, count_, [&](int i) { mine += uses(i); });
    const double used = total(g_, double(mine));
    double* partial = reinterpret_cast<double*>(g_.scratch());  // [warps, 32]
    for (int first = 0; first < task_.width; first += kWarp) {
      const int f = first + g_.lane();
      double sum = 0;
      if (f < task_.width)
        for (int i = g_.warp(); i < count_; i += g_.warps())
          sum += uses(i) ? value(i, f) : 0;  // not a product with the choice: NaN * 0 is NaN
      partial[g_.thread()] = sum;
      g_.sync();
      if (g_.warp() == 0 && f < task_.width) {
        for (int w = 1; w < g_.warps(); ++w) sum += partial[w * kWarp + g_.lane()];
        task_.centre[f] = sum / used;
      }
      g_.sync();
    }
  }

  // The median of the squared distances to the centre; not numbers count as infinite.
  PCOH_DEVICE double median() {
    for (int i = g_.warp(); i < count_; i += g_.warps()) {
      const double far = distance(i);
      if (g_.lane() == 0) far_[i] = far;
    }
    g_.sync();
    each(g_, count_, [&](int i) {
      int below = 0;
      for (int j = 0; j < count_; ++j) below += far_[j] < far_[i] || (far_[j] == far_[i] && j < i);
      if (below == count_ / 2) *picked_ = far_[i];
    });
    g_.sync();
    const double result = *picked_;
    g_.sync();
    return result;
  }

  PCOH_DEVICE double farthest() {
    double most = 0;
    each(g_, count_, [&](int i) { most = far_[i] > most ? far_[i] : most; });
    return reduce(g_, most, Larger{});
  }

  PCOH_DEVICE void copy_first() {
    each(g_, task_.width, [&](int f) { task_.centre[f] = value(0, f); });
    g_.sync();
  }

  // The largest squared distance of any candidate to the centre.
  PCOH_DEVICE double farthest_of_all() {
    double most = 0;
    for (std::int64_t i = g_.warp(); i < task_.n; i += g_.warps()) {
      const T* x = task_.points + i * task_.width;
      const double length = task_.directions ? length_of(x) : 1;
      const double far = squared_distance(x, length);
      most = far > most ? far : most;
    }
    return reduce(g_, most, Larger{});
  }

  PCOH_DEVICE int count() const { return count_; }

 private:
  PCOH_DEVICE const T* row(int i) const { return task_.points + i * task_.n / count_ * task_.width; }
  PCOH_DEVICE double value(int i, int f) const {
    const double x = double(row(i)[f]);
    return task_.directions ? x / lengths_[i] : x;
  }
  // By a warp.
  PCOH_DEVICE double length_of(const T* x) const {
    return length_from(sum_over_features(g_, task_.width, [=](std::int64_t f) { return double(x[f]) * double(x[f]); }));
  }
  PCOH_DEVICE double squared_distance(const T* x, double length) const {
    const bool directions = task_.directions;
    const double* centre = task_.centre;
    const double square = sum_over_features(g_, task_.width, [=](std::int64_t f) {
      const double difference = (directions ? double(x[f]) / length : double(x[f])) - centre[f];
      return difference * difference;
    });
    return square == square ? square : std::numeric_limits<double>::infinity();
  }
  PCOH_DEVICE double distance(int i) const { return squared_distance(row(i), task_.directions ? lengths_[i] : 1); }

  G& g_;
  const CentreTask<T>& task_;
  const int count_;
  double *far_, *lengths_, *picked_;  // [kSample] squared distances to the last centre; [kSample]; [1]
};

// By one group; see pcoherence/backends/points.py.
template <class T, class G>
PCOH_DEVICE void find_centre(G& g, const CentreTask<T>& task) {
  Sample<T, G> sample(g, task);
  sample.mean(true, 0);
  const double half = sample.median();
  sample.mean(false, half);
  double spread = sample.median();
  double square = 0;
  each(g, task.width, [&](int f) { square += task.centre[f] * task.centre[f]; });
  // What the squared distance of equal points to their mean can be: it may miss them by a unit for each.
  const double error = (4 + sample.count()) * std::numeric_limits<double>::epsilon();
  const double rounding = error * error * total(g, square);
  if (!(spread > rounding)) spread = sample.farthest();
  if (spread <= rounding) {
    // The sample is one point many times: then that is the centre, and all are asked.
    sample.copy_first();
    spread = sample.count() < task.n ? sample.farthest_of_all() : 0;
  }
  const bool finite = std::isfinite(spread), useful = finite && spread > 0;
  const double quantum = useful ? power_of_two_below(std::sqrt(spread / (task.width > 0 ? task.width : 1))) : 1;
  each(g, task.width, [&](int f) {
    if (!finite)
      task.centre[f] = 0;
    else if (useful)
      task.centre[f] = std::rint(task.centre[f] / quantum) * quantum;
  });
  if (g.thread() == 0) *task.scale = useful ? 1 / power_of_two_below(std::sqrt(spread)) : 1;
}

// ---------------------------------------------------------------- the points

template <class T>
PCOH_DEVICE std::uint64_t bits_of(T value) {
  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// An odd pseudo-random factor for the words of a feature (multipliers of Knuth and of Steele and Vigna).
PCOH_DEVICE std::uint64_t hash_factor(std::uint64_t f) {
  const std::uint64_t x = (f + 1) * 6364136223846793005u;
  return (x ^ x >> 29) * 0x9FB21C651E98DF25u | 1;
}

// A group takes as many points as it has warps: the x-th of such parts.
template <class T, class G>
PCOH_DEVICE void prepare_points(G& g, const PrepareTask<T>& task, std::int64_t x) {
  const std::int64_t r = x * g.warps() + g.warp();
  if (r >= task.rows) return;
  const T* from = task.points + r * task.width;
  const double scale = *task.scale;
  double length = 1;
  if (task.directions)
    length = length_from(
        sum_over_features(g, task.width, [=](std::int64_t f) { return double(from[f]) * double(from[f]); }));
  std::uint64_t hash = 0;
  const double norm = sum_over_features(g, task.width, [&](std::int64_t f) {
    const double value = task.directions ? double(from[f]) / length : double(from[f]);
    // + 0 turns -0 into 0, so that equal points are equal bit by bit.
    const T ready = static_cast<T>((value - task.centre[f]) * scale) + T(0);
    const T plain = task.directions ? ready : static_cast<T>(double(from[f]) * scale) + T(0);
    task.prepared[r * task.width + f] = ready;
    if (task.scaled != nullptr) task.scaled[r * task.width + f] = plain;
    hash += bits_of(plain) * hash_factor(f);
    return double(ready) * double(ready);
  });
  if (g.lane() == 0) task.norms[r] = norm;
  if (task.hashes == nullptr) return;
  PCOH_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) hash += g.shuffle_xor(hash, mask);
  if (g.lane() == 0) task.hashes[r] = hash;
  for (std::int64_t i = r * kWarp + g.lane(); i < 2 * table_size(task.rows); i += task.rows * kWarp)
    task.table[i] = kNobody;
}

// ---------------------------------------------------------------- identical points

template <class T, class G>
PCOH_DEVICE void find_identical(G& g, const IdenticalTask<T>& task, std::int64_t x) {
  const std::int64_t own = x * g.warps() + g.warp();
  if (own >= task.n) return;
  const T* row = task.rows + own * task.width;
  const std::int64_t last = task.found.size - 1;
  std::int64_t slot = static_cast<std::int64_t>(task.hashes[own] * 0x9E3779B97F4A7C15u >> 32) & last;
  for (;; slot = (slot + 1) & last) {
    int owner = 0;
    if (g.lane() == 0) owner = g.swap_if(task.found.owners + slot, kNobody, static_cast<int>(own));
    owner = g.shuffle(owner, 0);
    if (owner == kNobody) break;
    const T* other = task.rows + std::int64_t(owner) * task.width;
    bool differs = false;
    for (std::int64_t f = g.lane(); f < task.width; f += kWarp) differs |= bits_of(row[f]) != bits_of(other[f]);
    if (g.ballot(differs) == 0) break;
  }
  if (g.lane() == 0) {
    g.lower(task.found.lowest + slot, static_cast<int>(own));
    task.found.slots[own] = static_cast<int>(slot);
  }
}

template <class T, class G>
PCOH_DEVICE void store_first(G& g, const FirstTask<T>& task, std::int64_t x) {
  const std::int64_t i = x * g.threads() + g.thread();
  if (i < task.n) task.first[i] = task.found.lowest[task.found.slots[i]];
}

}  // namespace pcoherence::cuda
