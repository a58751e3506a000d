#include "cloud.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace pcoherence {
namespace {

// The centre and the spread are estimated from at most this many candidates, evenly spaced: enough to find the
// middle of a cloud, and a fraction of the cost of one product.
constexpr std::int64_t kSample = 512;
// Features that pay for a thread: a few microseconds of work.
constexpr std::int64_t kFeatureGrain = 1 << 15;

double power_of_two_below(double x) { return std::ldexp(1.0, std::ilogb(x)); }

// |x|, by which a vector is divided to give its direction; a zero vector, which has none, stays zero.
template <class T>
double length_of(const T* x, const std::vector<double>& zero) {
  const auto width = static_cast<std::int64_t>(zero.size());
  const double length = std::sqrt(kernels().of<T>().squared_distance_to(x, zero.data(), width));
  return length == 0 ? std::numeric_limits<double>::infinity() : length;
}

// What the squared distance of `count` equal points to their mean can be: the mean may miss them by its rounding, a
// unit for every point that is added, and a few more.
double rounding(const std::vector<double>& centre, std::int64_t count) {
  double square = 0;
  for (const double c : centre) square += c * c;
  const double error = double(4 + count) * std::numeric_limits<double>::epsilon();
  return square * error * error;
}

// Rows of a matrix, evenly spaced, as directions or as they are.
template <class T>
class Sample {
 public:
  Sample(const T* x, std::int64_t rows, std::int64_t width, std::int64_t size, bool directions)
      : width_(width), count_(std::min(rows, size)), x_(count_ * width), far_(count_) {
    const std::vector<double> zero(width, 0.0);
    for (std::int64_t i = 0; i < count_; ++i) {
      const T* from = x + i * rows / count_ * width;
      kernel().shift(row(i), from, directions ? length_of(from, zero) : 1.0, zero.data(), 1.0, width);
    }
  }

  // Mean of the rows no farther from the last centre than `limit`.
  std::vector<double> mean(double limit) {
    std::vector<double> sum(width_, 0.0);
    std::int64_t used = 0;
    for (std::int64_t i = 0; i < count_; ++i) {
      if (!(far_[i] <= limit)) continue;
      ++used;
      kernel().add_to(sum.data(), row(i), width_);
    }
    for (double& s : sum) s /= double(std::max<std::int64_t>(used, 1));
    return sum;
  }

  // Median of the squared distances to `centre`.
  double median(const std::vector<double>& centre) {
    for (std::int64_t i = 0; i < count_; ++i) {
      far_[i] = kernel().squared_distance_to(row(i), centre.data(), width_);
      if (std::isnan(far_[i])) far_[i] = std::numeric_limits<double>::infinity();  // sorting needs an order
    }
    std::vector<double> sorted = far_;
    std::nth_element(sorted.begin(), sorted.begin() + count_ / 2, sorted.end());
    return sorted[count_ / 2];
  }

  void copy_first(std::vector<double>& centre) { std::copy(row(0), row(0) + width_, centre.begin()); }

  double farthest() const { return *std::max_element(far_.begin(), far_.end()); }

 private:
  static const RowKernels<T>& kernel() { return kernels().of<T>(); }
  T* row(std::int64_t i) { return x_.data() + i * width_; }

  std::int64_t width_, count_;
  std::vector<T> x_;         // [count, width]
  std::vector<double> far_;  // [count] squared distances to the last centre
};

}  // namespace

template <class T>
Cloud<T>::Cloud(const GivenPoints<T>& input) : input_(input) {
  if (traits().products) return;
  anchors_ = const_cast<T*>(input.anchors);
  candidates_ = same() ? anchors_ : const_cast<T*>(input.candidates);
}

template <class T>
void Cloud<T>::prepare(Cloud& student, Cloud& teacher, Runtime<T>& runtime, Team& team) {
  std::vector<Cloud*> clouds;
  for (Cloud* cloud : {&student, &teacher})
    if (cloud->traits().products) clouds.push_back(cloud);
  team.run(runtime, std::ssize(clouds), 1, [&](std::int64_t i, Workspace&) { clouds[i]->choose_centre(); });
  for (Cloud* cloud : clouds) cloud->prepare_points(runtime);
  team.run(runtime, std::ssize(clouds), 1, [&](std::int64_t i, Workspace&) { clouds[i]->find_duplicates(); });
}

// The centre is the mean of the half of the candidates that lies nearest to the overall mean, so that a far outlier
// does not move it, rounded to a power of two near the spread of one coordinate: then x - centre is exact for data on
// a lattice (integers, quantised or binary features), and distances that tie exactly still do.
template <class T>
void Cloud<T>::choose_centre() {
  const T* x = same() ? input_.anchors : input_.candidates;
  const bool directions = traits().directions;
  double spread = 0;
  // Only where the sample is a single point must everybody be asked; if they all are, it is the centre.
  for (const std::int64_t size : {kSample, input_.n}) {
    Sample<T> sample(x, input_.n, input_.width, size, directions);
    const double half = sample.median(sample.mean(0));
    centre_ = sample.mean(half);
    spread = sample.median(centre_);
    if (!(spread > rounding(centre_, std::min(size, input_.n)))) spread = sample.farthest();
    if (!(spread <= rounding(centre_, std::min(size, input_.n)))) break;
    sample.copy_first(centre_);
    spread = 0;
  }
  if (!std::isfinite(spread)) {
    std::fill(centre_.begin(), centre_.end(), 0.0);
  } else if (spread > 0) {
    const double quantum = power_of_two_below(std::sqrt(spread / double(input_.width)));
    for (double& c : centre_) c = std::nearbyint(c / quantum) * quantum;
    scale_ = 1 / power_of_two_below(std::sqrt(spread));
  }
}

template <class T>
void Cloud<T>::prepare_points(Runtime<T>& runtime) {
  const std::int64_t width = input_.width;
  const std::vector<double> zero(width, 0.0);
  const auto& kernel = kernels().of<T>();
  // Matrix products may round differently for different columns, so equal candidates are found by value: by the value
  // given, since the prepared ones may have lost a difference far smaller than the centre.
  hashes_.resize(input_.n);
  const auto side = [&](const T* from, T*& to, std::vector<double>& norms, std::vector<double>& lengths,
                        std::int64_t rows, bool candidates) {
    to = runtime.allocate(rows * width);
    norms.assign(padded(rows), 0.0);
    if (traits().directions) lengths.resize(rows);
    runtime.parallel_for(rows, 1 + kFeatureGrain / (width + 1), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        const T* x = from + i * width;
        T* row = to + i * width;
        if (!lengths.empty()) lengths[i] = length_of(x, zero);
        if (candidates) {
          kernel.shift(row, x, length(lengths, i), zero.data(), 1.0, width);
          hashes_[i] = {kernel.hash(row, width), static_cast<std::int32_t>(i)};
        }
        norms[i] = kernel.shift(row, x, length(lengths, i), centre_.data(), scale_, width);
      }
    });
  };
  side(input_.anchors, anchors_, anchor_norms_, anchor_lengths_, input_.m, same());
  if (same()) {
    candidates_ = anchors_;
  } else {
    side(input_.candidates, candidates_, candidate_norms_, candidate_lengths_, input_.n, true);
  }
  unit_ = traits().root ? 1 / scale_ : 1 / (scale_ * scale_);
}

// Candidates that are equal by value, not only by hash.
template <class T>
void Cloud<T>::find_duplicates() {
  const std::int64_t width = input_.width;
  const std::vector<double> zero(width, 0.0);
  const auto copy = [&](std::int32_t i, std::vector<T>& to) {
    const Point<T> point = candidate(i);
    kernels().of<T>().shift(to.data(), point.x, point.length, zero.data(), 1.0, width);
  };
  auto& order = hashes_;
  std::sort(order.begin(), order.end());
  std::vector<T> original(width), row(width);
  for (std::size_t first = 0, i = 1; i < order.size(); ++i) {
    if (order[i].first != order[first].first) {
      first = i;
      continue;
    }
    copy(order[first].second, original);
    copy(order[i].second, row);
    if (std::memcmp(row.data(), original.data(), width * sizeof(T)) == 0)
      duplicates_.emplace_back(order[i].second, order[first].second);
  }
  std::vector<std::pair<std::uint64_t, std::int32_t>>().swap(order);  // with its memory
}

template <class T>
void Cloud<T>::products(T* block, std::int64_t begin, std::int64_t rows, Runtime<T>& runtime) const {
  if (traits().products)
    runtime.multiply_nt(block, padded(input_.n), anchors_ + begin * input_.width, candidates_, rows, input_.n,
                        input_.width);
}

// Half of the multiplications, in slabs of rows from the diagonal on. An eighth of the rows at a time wastes 1/16 on
// the diagonal blocks; products of fewer than 64 rows are slow, and more than 512 gain nothing.
constexpr std::int64_t kMinSlab = 64, kMaxSlab = 512;
static_assert(kMinSlab % kSymmetricStrip == 0);
// A matrix of more bytes than this is not found in the cache when its rows are read (last-level caches: 32 MiB and up
// for all cores together; two such matrices are held).
constexpr std::int64_t kCachedBytes = 16 << 20;

template <class T>
void Cloud<T>::symmetric_products(T* block, Runtime<T>& runtime) const {
  const std::int64_t n = input_.n, ld = padded(n), width = input_.width;
  const std::int64_t rows = std::clamp(n / 8 / kSymmetricStrip * kSymmetricStrip, kMinSlab, kMaxSlab);
  const bool beyond_cache = ld * ld * static_cast<std::int64_t>(sizeof(T)) > kCachedBytes;
  for (std::int64_t begin = 0; begin < n; begin += rows) {
    const std::int64_t end = std::min(n, begin + rows), first = begin / kSymmetricStrip;
    // In pieces of 1 MiB of float32 at most: the library goes over its result more than once (2 % faster, measured).
    for (std::int64_t column = begin; column < n; column += kMaxSlab)
      runtime.multiply_nt(block + begin * ld + column, ld, anchors_ + begin * width, anchors_ + column * width,
                          end - begin, std::min(kMaxSlab, n - column), width);
    runtime.parallel_for((end - 1) / kSymmetricStrip + 1 - first, 1, [&](std::int64_t s, std::int64_t last, int) {
      for (; s < last; ++s) kernels().of<T>().mirror(block, ld, ld, first + s, beyond_cache);
    });
  }
}

template <class T>
void Cloud<T>::distances(T* products, T* row, std::int64_t anchor, bool order_only,
                         std::vector<std::int32_t>* near) const {
  if (near != nullptr) near->clear();
  if (!traits().products) {
    kernels().of<T>().cityblock_distances(row, anchors_ + anchor * input_.width, candidates_, input_.n, input_.width);
    return;
  }
  DistanceRow<T> task{};
  task.products = products;
  task.row = row;
  task.n = input_.n;
  task.anchor_norm = anchor_norms_[anchor];
  task.candidate_norms = same() ? anchor_norms_.data() : candidate_norms_.data();
  task.identical = same() ? anchor : -1;
  task.root = traits().root && !order_only;
  task.factor = static_cast<T>(traits().factor);
  task.anchor = this->anchor(anchor);
  task.candidates = given_candidates();
  task.candidate_lengths = candidate_lengths();
  task.scale = scale_;
  task.width = input_.width;
  kernels().of<T>().finish_distances(task, near);
  for (const auto& [candidate, original] : duplicates_) row[candidate] = row[original];
}

template <class T>
void Cloud<T>::pull(T* gradient, const T* given, const std::vector<double>& lengths, std::int64_t rows) const {
  const std::int64_t width = input_.width;
  for (std::int64_t i = 0; i < rows; ++i) {
    T* g = gradient + i * width;
    const T* x = given + i * width;
    const double size = length(lengths, i);
    double along = 0;  // cosine: through x / |x|, which does not change along x
    if (!lengths.empty())
      for (std::int64_t f = 0; f < width; ++f) along += double(g[f]) * (double(x[f]) / size);
    for (std::int64_t f = 0; f < width; ++f) {
      const double radial = lengths.empty() ? 0.0 : along * (double(x[f]) / size);
      g[f] = static_cast<T>((double(g[f]) - radial) * (scale_ / size));
    }
  }
}

template class Cloud<float>;
template class Cloud<double>;

}  // namespace pcoherence
