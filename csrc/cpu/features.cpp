#include "features.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pcoherence {
namespace {

template <class T>
double squared_norm(const T* x, std::int64_t width) {
  double lanes[8] = {};
  std::int64_t f = 0;
  for (; f + 8 <= width; f += 8)
    for (int i = 0; i < 8; ++i) lanes[i] += double(x[f + i]) * double(x[f + i]);
  for (; f < width; ++f) lanes[0] += double(x[f]) * double(x[f]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Mean of the rows listed by `use(i)`.
template <class T, class Use>
std::vector<double> mean_of_rows(const T* x, std::int64_t rows, std::int64_t width, Use use) {
  std::vector<double> sum(width, 0.0);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    if (!use(i)) continue;
    ++count;
    const T* row = x + i * width;
    for (std::int64_t f = 0; f < width; ++f) sum[f] += double(row[f]);
  }
  for (double& s : sum) s /= double(std::max<std::int64_t>(count, 1));
  return sum;
}

template <class T>
double squared_distance(const T* x, const std::vector<double>& c) {
  double sum = 0;
  for (std::size_t f = 0; f < c.size(); ++f) sum += (double(x[f]) - c[f]) * (double(x[f]) - c[f]);
  return sum;
}

double power_of_two_below(double x) { return std::ldexp(1.0, std::ilogb(x)); }

std::uint64_t hash_row(const void* row, std::size_t bytes) {
  std::uint64_t h = 1469598103934665603ull;
  const char* p = static_cast<const char*>(row);
  for (; bytes >= 4; bytes -= 4, p += 4) {
    std::uint32_t word;
    std::memcpy(&word, p, 4);
    h = (h ^ word) * 1099511628211ull;
  }
  return h;
}

}  // namespace

template <class T>
Features<T>::Features(const FeatureInput<T>& input, Runtime<T>& runtime) : input_(input) {
  if (!from_products(input.metric)) {
    anchors_ = const_cast<T*>(input.anchors);
    candidates_ = same() ? anchors_ : const_cast<T*>(input.candidates);
    return;
  }
  anchors_ = runtime.allocate(input.m * input.width);
  candidates_ = same() ? anchors_ : runtime.allocate(input.n * input.width);
  if (input.metric == Metric::cosine) {
    normalise(runtime);
  } else {
    // + 0 turns -0 into 0, so that equal rows are equal bit by bit.
    for (std::int64_t i = 0; i < input.m * input.width; ++i) anchors_[i] = input.anchors[i] + T(0);
    if (!same())
      for (std::int64_t i = 0; i < input.n * input.width; ++i) candidates_[i] = input.candidates[i] + T(0);
  }
  centre(runtime);
  find_duplicates();
  unit_ = input.metric == Metric::euclidean ? 1 / scale_ : 1 / (scale_ * scale_);
}

template <class T>
void Features<T>::normalise(Runtime<T>& runtime) {
  const auto side = [&](const T* from, T* to, T* lengths, std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const T* x = from + i * input_.width;
      const double length = std::sqrt(squared_norm(x, input_.width));
      lengths[i] = static_cast<T>(length);
      const double factor = length == 0 ? 0 : 1 / length;  // a zero vector has no direction: it stays zero
      for (std::int64_t f = 0; f < input_.width; ++f)
        to[i * input_.width + f] = static_cast<T>(double(x[f]) * factor) + T(0);
    }
  };
  anchor_lengths_ = runtime.allocate(input_.m);
  side(input_.anchors, anchors_, anchor_lengths_, input_.m);
  if (same()) {
    candidate_lengths_ = anchor_lengths_;
  } else {
    candidate_lengths_ = runtime.allocate(input_.n);
    side(input_.candidates, candidates_, candidate_lengths_, input_.n);
  }
}

// The centre is the mean of the half of the candidates that lies nearest to the overall mean, so that a far outlier
// does not move it, rounded to a power of two near the spread of one coordinate: then x - centre is exact for data on
// a lattice (integers, quantised or binary features), and distances that tie exactly still do.
template <class T>
void Features<T>::centre(Runtime<T>& runtime) {
  const std::int64_t m = input_.m, n = input_.n, width = input_.width;
  centre_ = mean_of_rows(candidates_, n, width, [](std::int64_t) { return true; });
  std::vector<double> far(n);
  const auto measure = [&] {
    for (std::int64_t i = 0; i < n; ++i) {
      far[i] = squared_distance(candidates_ + i * width, centre_);
      if (std::isnan(far[i])) far[i] = std::numeric_limits<double>::infinity();  // sorting needs an order
    }
    std::vector<double> sorted = far;
    std::nth_element(sorted.begin(), sorted.begin() + n / 2, sorted.end());
    return sorted[n / 2];
  };
  double half = measure();
  centre_ = mean_of_rows(candidates_, n, width, [&](std::int64_t i) { return far[i] <= half; });
  half = measure();
  const double spread = half > 0 ? half : *std::max_element(far.begin(), far.end());
  if (spread > 0 && std::isfinite(spread)) {
    const double quantum = power_of_two_below(std::sqrt(spread / double(width)));
    for (double& c : centre_) c = std::nearbyint(c / quantum) * quantum;
    scale_ = 1 / power_of_two_below(std::sqrt(spread));
  } else if (!std::isfinite(spread)) {
    std::fill(centre_.begin(), centre_.end(), 0.0);
  }

  const auto side = [&](T* x, T* norms, std::int64_t rows) {
    runtime.parallel_for(rows, 1 + (1 << 14) / (width + 1), [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        T* row = x + i * width;
        for (std::int64_t f = 0; f < width; ++f)
          row[f] = static_cast<T>((double(row[f]) - centre_[f]) * scale_);
        norms[i] = static_cast<T>(squared_norm(row, width));
      }
    });
  };
  anchor_norms_ = runtime.allocate(padded(m));
  std::fill(anchor_norms_ + m, anchor_norms_ + padded(m), T(0));
  side(anchors_, anchor_norms_, m);
  if (same()) {
    candidate_norms_ = anchor_norms_;
  } else {
    candidate_norms_ = runtime.allocate(padded(n));
    std::fill(candidate_norms_ + n, candidate_norms_ + padded(n), T(0));
    side(candidates_, candidate_norms_, n);
  }
}

// Matrix products may round differently for different columns, so equal candidates are found by value.
template <class T>
void Features<T>::find_duplicates() {
  const std::size_t bytes = input_.width * sizeof(T);
  std::vector<std::pair<std::uint64_t, std::int32_t>> order(input_.n);
  for (std::int64_t i = 0; i < input_.n; ++i)
    order[i] = {hash_row(candidates_ + i * input_.width, bytes), static_cast<std::int32_t>(i)};
  std::sort(order.begin(), order.end());
  const auto row = [&](std::int32_t i) { return candidates_ + std::int64_t(i) * input_.width; };
  for (std::size_t first = 0, i = 1; i < order.size(); ++i) {
    if (order[i].first != order[first].first)
      first = i;
    else if (std::memcmp(row(order[i].second), row(order[first].second), bytes) == 0)
      duplicates_.emplace_back(order[i].second, order[first].second);
  }
}

template <class T>
void Features<T>::products(T* block, std::int64_t begin, std::int64_t rows, Runtime<T>& runtime) const {
  if (from_products(input_.metric))
    runtime.multiply_nt(block, padded(input_.n), anchors_ + begin * input_.width, candidates_, rows, input_.n,
                        input_.width);
}

template <class T>
void Features<T>::distances(T* row, std::int64_t anchor, bool order_only, std::vector<std::int32_t>& close) const {
  const T* x = anchors_ + anchor * input_.width;
  if (!from_products(input_.metric)) {
    kernels().of<T>().cityblock_distances(row, x, candidates_, input_.n, input_.width);
    return;
  }
  const bool root = input_.metric == Metric::euclidean && !order_only;
  const T factor = input_.metric == Metric::cosine ? T(0.5) : T(1);
  kernels().of<T>().finish_distances({row, input_.n, anchor_norms_[anchor], candidate_norms_, same() ? anchor : -1,
                                      root, factor, x, candidates_, input_.width},
                                     close);
  for (const auto& [candidate, original] : duplicates_) row[candidate] = row[original];
}

template <class T>
void Features<T>::pull(T* gradient, const T* prepared, const T* lengths, std::int64_t rows) const {
  const std::int64_t width = input_.width;
  for (std::int64_t i = 0; i < rows; ++i) {
    T* g = gradient + i * width;
    const T* x = prepared + i * width;
    double along = 0, by = scale_;
    if (lengths != nullptr) {  // cosine: through x / |x|, the prepared row being (x / |x| - centre) * scale
      by = lengths[i] == 0 ? 0 : scale_ / double(lengths[i]);
      for (std::int64_t f = 0; f < width; ++f) along += double(g[f]) * (double(x[f]) / scale_ + centre_[f]);
    }
    for (std::int64_t f = 0; f < width; ++f) {
      const double radial = lengths != nullptr ? along * (double(x[f]) / scale_ + centre_[f]) : 0;
      g[f] = static_cast<T>((double(g[f]) - radial) * by);
    }
  }
}

template class Features<float>;
template class Features<double>;

}  // namespace pcoherence
