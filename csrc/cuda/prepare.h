// Points made ready for distances by matrix products, as pcoherence/backends/points.py does it: a centre and a scale
// found from a sample by a few small launches, then a warp a point, and identical points found by a hash table.
#pragma once

#include "distances.h"

namespace pcoherence::cuda {

// One kind of work for several clouds of points by one launch: task y of block (x, y). Each of them turns away blocks
// beyond its own.
inline constexpr int kMostClouds = 4;  // anchors and candidates of two networks
template <class Task>
struct Several {
  int count = 0;
  Task of[kMostClouds];

  void add(const Task& task) { of[count++] = task; }
};

// What all blocks have to have done before the next: each a launch.
enum class CentreStage {
  first_mean,       // of the whole sample
  first_distances,  // to that
  mean,             // of the nearer half
  distances,        // to that
  finish,           // centre and scale
};

// In every stage but the last a block takes kSampleRows points of the sample.
template <class T>
struct CentreTask {
  CentreStage stage;
  std::int64_t n;
  int width;
  bool directions;
  const T* points;  // [n, width] the candidates
  double* centre;   // [width]
  double* scale;    // [1] a power of two
  double* memory;   // [centre_memory(width)]
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

inline constexpr int kSample = 256;  // SAMPLE of points.py
// Blocks of the sample's points: 16 rows of 512 features lie between the time of 16 loads that a thread waits for
// together, and that of the sums of 16 blocks, which all of them read again.
inline constexpr int kCentreThreads = 512;
inline constexpr int kSampleRows = kCentreThreads / kWarp;  // a warp each
inline constexpr int kSampleParts = kSample / kSampleRows;
PCOH_DEVICE constexpr std::int64_t centre_memory(std::int64_t width) { return 4 * kSample + 1 + kSampleParts * width; }

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

// ---------------------------------------------------------------- the centre

// A sample of the candidates, as directions or as they are, by the blocks of a launch: x of them, and each by a group.
template <class T, class G>
class Sample {
 public:
  PCOH_DEVICE Sample(G& g, const CentreTask<T>& task, std::int64_t x)
      : g_(g),
        task_(task),
        count_(static_cast<int>(task.n < kSample ? task.n : kSample)),
        parts_((count_ + kSampleRows - 1) / kSampleRows),
        x_(static_cast<int>(x)) {
    lengths_ = task.memory;
    inverses_ = lengths_ + kSample;
    far_[0] = inverses_ + kSample;
    far_[1] = far_[0] + kSample;
    used_ = far_[1] + kSample;
    sums_ = used_ + 1;
  }

  PCOH_DEVICE int parts() const { return parts_; }
  PCOH_DEVICE int count() const { return count_; }

  // Of this block's directions.
  PCOH_DEVICE void measure_lengths() {
    const int i = own();
    if (i < count_) {
      const Length found = length_of(row(i));
      if (g_.lane() == 0) {
        lengths_[i] = found.length;
        inverses_[i] = found.inverse;
      }
    }
    g_.sync();
  }

  // Sums over this block's points that are no farther from the first mean than `limit`, or over all of them.
  PCOH_DEVICE void add_up(bool all, double limit) {
    const double* far = far_[0];
    const auto uses = [=](int i) { return all || far[i] <= limit; };
    if (x_ == 0) {
      int mine = 0;
      each(g_, count_, [&](int i) { mine += uses(i); });
      const double used = total(g_, double(mine));
      if (g_.thread() == 0) *used_ = used;
    }
    const int begin = x_ * kSampleRows;
    each(g_, task_.width, [=, this](int f) {
      double values[kSampleRows];  // whose loads wait at the same time
      unrolled<kSampleRows>([&](auto i) { values[i] = value(begin + i < count_ ? begin + i : count_ - 1, f); });
      double sum = 0;
      // Not a product with the choice: NaN * 0 is NaN.
      unrolled<kSampleRows>([&](auto i) { sum += begin + i < count_ && uses(begin + i) ? values[i] : 0; });
      sums_[std::int64_t(x_) * task_.width + f] = sum;
    });
  }

  // This block's squared distances to the mean that has been added up; not numbers count as infinite.
  PCOH_DEVICE void measure(int which) {
    constexpr int part = kScratchBytes / sizeof(double);
    double* centre = reinterpret_cast<double*>(g_.scratch());
    const int i = own() < count_ ? own() : count_ - 1;
    double square = 0;
    for (int first = 0; first < task_.width; first += part) {
      const int here = task_.width - first < part ? task_.width - first : part;
      double values[part / kWarp];
      unrolled<part / kWarp>([&](auto k) {
        const int f = k * kWarp + g_.lane();
        values[k] = f < here ? value(i, first + f) : 0;
      });
      g_.sync();
      each(g_, here, [=, this](int f) { centre[f] = mean(first + f); });
      g_.sync();
      unrolled<part / kWarp>([&](auto k) {
        const int f = k * kWarp + g_.lane();
        const double difference = f < here ? values[k] - centre[f] : 0;
        square += difference * difference;
      });
    }
    square = total_of_warp(g_, square);
    if (own() < count_ && g_.lane() == 0) far_[which][i] = number(square);
  }

  // Their median, of all blocks' distances: the largest that fewer than half are smaller than.
  PCOH_DEVICE double median(int which) {
    double* far = reinterpret_cast<double*>(g_.scratch());
    each(g_, count_, [=, this](int i) { far[i] = far_[which][i]; });
    g_.sync();
    double found = 0;
    each(g_, count_, [&](int i) {
      const double own = far[i];
      int below = 0;
      for (int j = 0; j < count_; ++j) below += far[j] < own;
      if (below <= count_ / 2) found = own;
    });
    g_.sync();
    return reduce(g_, found, Larger{});
  }

  // By the last stage's group alone from here on.
  PCOH_DEVICE void store_centre() {
    each(g_, task_.width, [this](int f) { task_.centre[f] = mean(f); });
  }

  PCOH_DEVICE double farthest() {
    double most = 0;
    each(g_, count_, [&](int i) { most = far_[1][i] > most ? far_[1][i] : most; });
    return reduce(g_, most, Larger{});
  }

  PCOH_DEVICE void copy_first() {
    each(g_, task_.width, [this](int f) { task_.centre[f] = value(0, f); });
    g_.sync();
  }

  // The largest squared distance of any candidate to the centre.
  PCOH_DEVICE double farthest_of_all() {
    double most = 0;
    for (std::int64_t i = g_.warp(); i < task_.n; i += g_.warps()) {
      const T* x = task_.points + i * task_.width;
      const Length length = task_.directions ? length_of(x) : Length(1);
      const double far = number(sum_over_features(g_, task_.width, [=, this](std::int64_t f) {
        const double difference = quotient(double(x[f]), length) - task_.centre[f];
        return difference * difference;
      }));
      most = far > most ? far : most;
    }
    return reduce(g_, most, Larger{});
  }

 private:
  PCOH_DEVICE int own() const { return x_ * kSampleRows + g_.warp(); }
  PCOH_DEVICE const T* row(int i) const { return task_.points + i * task_.n / count_ * task_.width; }
  PCOH_DEVICE double value(int i, int f) const {
    const double x = double(row(i)[f]);
    return task_.directions ? quotient(x, lengths_[i], inverses_[i]) : x;
  }
  // All blocks add up their sums in the same order.
  PCOH_DEVICE double mean(int f) const {
    double sums[kSampleParts];
    unrolled<kSampleParts>(
        [&](auto part) { sums[part] = part < parts_ ? sums_[std::int64_t(part) * task_.width + f] : 0; });
    double sum = 0;
    unrolled<kSampleParts>([&](auto part) { sum += sums[part]; });
    return sum / *used_;
  }
  PCOH_DEVICE Length length_of(const T* x) const { return Length(squared_length(g_, x, task_.width)); }
  static PCOH_DEVICE double number(double square) {
    return square == square ? square : std::numeric_limits<double>::infinity();
  }

  G& g_;
  const CentreTask<T>& task_;
  const int count_, parts_, x_;
  double *lengths_, *inverses_;  // [kSample] of directions
  double* far_[2];               // [kSample] squared distances to the first mean, and to that of the nearer half
  double* used_;                 // [1] points of the last mean
  double* sums_;                 // [parts, width] of them
};

// See pcoherence/backends/points.py.
template <class T, class G>
PCOH_DEVICE void finish_centre(G& g, const CentreTask<T>& task, Sample<T, G>& sample) {
  double spread = sample.median(1);
  sample.store_centre();
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

template <class T, class G>
PCOH_DEVICE void find_centre(G& g, const CentreTask<T>& task, std::int64_t x) {
  Sample<T, G> sample(g, task, x);
  if (x >= sample.parts()) return;
  switch (task.stage) {
    case CentreStage::first_mean:
      if (task.directions) sample.measure_lengths();
      return sample.add_up(true, 0);
    case CentreStage::first_distances:
      return sample.measure(0);
    case CentreStage::mean:
      return sample.add_up(false, sample.median(0));
    case CentreStage::distances:
      return sample.measure(1);
    case CentreStage::finish:
      return finish_centre(g, task, sample);
  }
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
  Length length(1);
  if (task.directions) length = Length(squared_length(g, from, task.width));
  std::uint64_t hash = 0;
  const double norm = sum_over_features(g, task.width, [&](std::int64_t f) {
    const double value = task.directions ? quotient(double(from[f]), length) : double(from[f]);
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
