#include "pipeline.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <vector>

namespace pcoherence {
namespace {

// A block of anchors' distances, one each for student and teacher, is bounded in bytes: beyond the caches anyway
// (blocks that fit them lose more by reading the candidates again), it bounds the memory...
constexpr std::int64_t kBlockBytes = 16 << 20;
// ... and in rows: every block reads all candidates again, so that 128 rows were a third slower than 512 (measured),
// and 64 rows is where the products themselves slow down.
constexpr std::int64_t kMinBlock = 64, kMaxBlock = 512;
// Elements of a row's work that pay for a thread.
constexpr std::int64_t kGrain = 4096;

template <class T>
std::int64_t block_rows(std::int64_t m, std::int64_t n) {
  const std::int64_t fits = kBlockBytes / static_cast<std::int64_t>(sizeof(T)) / padded(n) / 16 * 16;
  return std::min(m, std::clamp(fits, kMinBlock, kMaxBlock));
}

// One scratch area for each thread, and the first thing that went wrong in any of them: neither an exception
// nor a status can leave a parallel region by itself.
class Team {
 public:
  explicit Team(int threads) : workspaces_(threads) {}

  template <class T, class Body>
  void run(Runtime<T>& runtime, std::int64_t count, std::int64_t grain, Body&& body) {
    runtime.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end, int thread) {
      try {
        for (std::int64_t i = begin; i < end; ++i) body(i, workspaces_[thread]);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::vector<Workspace> workspaces_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

template <class T>
CandidateWeights<T> padded_weights(const T* given, std::int64_t n, Runtime<T>& runtime) {
  T* weights = runtime.allocate(padded(n));
  for (std::int64_t k = 0; k < n; ++k) weights[k] = given ? given[k] : T(1);
  std::fill(weights + n, weights + padded(n), T(0));
  return candidate_weights<T>(weights, n);
}

// Gradient w.r.t. features from blocks of V, by products: sum_j V_ij (x_i - c_j) for the anchors, and the
// opposite for the candidates; for cityblock sum_j V_ij sign(x_i - c_j). A whole V, `symmetric`, takes one product
// instead of two: with S = V + V^T both together are sum_j S_ij (x_i - x_j).
template <class T>
class FeatureGradient {
 public:
  FeatureGradient(const Features<T>& features, bool want_anchors, bool want_candidates, bool symmetric,
                  Runtime<T>& runtime)
      : features_(features),
        runtime_(runtime),
        n_(features.input().n),
        width_(features.input().width),
        symmetric_(symmetric) {
    if (want_anchors) {
      anchors_ = runtime.allocate(features.input().m * width_);
      std::fill(anchors_, anchors_ + features.input().m * width_, T(0));
    }
    if (want_candidates || (want_anchors && features.same() && !symmetric)) {
      candidates_ = runtime.allocate(n_ * width_);
      std::fill(candidates_, candidates_ + n_ * width_, T(0));
      column_sums_.assign(n_, 0.0);
    }
  }

  // block [rows, padded(n)]: V; row_sums [rows]; close: pairs kept out of the products, by row.
  void add(T* block, const double* row_sums, std::int64_t begin, std::int64_t rows,
           const std::vector<std::vector<std::int32_t>>& close, Team& team) {
    if (!features_.traits().products) {
      add_signs(block, begin, rows, team);
      return;
    }
    // Pairs too close for products go first, and leave a zero in the block.
    std::vector<double> sums(row_sums, row_sums + rows);
    add_close(block, sums, begin, rows, close, team);
    const std::int64_t ld = padded(n_);
    if (symmetric_) {
      add_transpose(block);
      team.run(runtime_, rows, 1 + kGrain / n_,
               [&](std::int64_t i, Workspace&) { sums[i] = kernels().of<T>().sum_row(block + i * ld, n_); });
    }
    if (anchors_ != nullptr) add_anchors(block, sums, begin, rows);
    if (candidates_ != nullptr) {
      runtime_.accumulate_tn(candidates_, block, ld, features_.anchors() + begin * width_, rows, n_, width_);
      add_column_sums(block, rows, team);
    }
  }

  // After the last block.
  void finish() {
    if (candidates_ == nullptr) return;
    if (features_.traits().products) {
      const T* c = features_.candidates();
      for (std::int64_t j = 0; j < n_; ++j) {
        const T sum = static_cast<T>(column_sums_[j]);
        for (std::int64_t f = 0; f < width_; ++f)
          candidates_[j * width_ + f] = sum * c[j * width_ + f] - candidates_[j * width_ + f];
      }
    }
    if (features_.same())
      for (std::int64_t i = 0; i < n_ * width_; ++i) anchors_[i] += candidates_[i];
  }

  T* anchors() { return anchors_; }
  T* candidates() { return candidates_; }

 private:
  void add_transpose(T* block) {
    const std::int64_t size = padded(n_), strips = (size + kSymmetricStrip - 1) / kSymmetricStrip;
    // A strip is as long as what is right of it: the first and the last together make an even share.
    runtime_.parallel_for((strips + 1) / 2, 1, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        kernels().of<T>().add_transpose(block, size, size, i);
        if (strips - 1 - i != i) kernels().of<T>().add_transpose(block, size, size, strips - 1 - i);
      }
    });
  }

  void add_anchors(const T* block, const std::vector<double>& sums, std::int64_t begin, std::int64_t rows) {
    if (products_ == nullptr) products_ = runtime_.allocate(rows * width_);  // the first block is the largest
    runtime_.multiply_nn(products_, block, padded(n_), features_.candidates(), rows, n_, width_);
    const T* x = features_.anchors() + begin * width_;
    T* out = anchors_ + begin * width_;
    for (std::int64_t i = 0; i < rows; ++i) {
      const T sum = static_cast<T>(sums[i]);
      for (std::int64_t f = 0; f < width_; ++f)
        out[i * width_ + f] += sum * x[i * width_ + f] - products_[i * width_ + f];
    }
  }

  // The sign convention of candidates_ until finish(): sum_i V_ij x_i, to be subtracted.
  void add_close(T* block, std::vector<double>& sums, std::int64_t begin, std::int64_t rows,
                 const std::vector<std::vector<std::int32_t>>& close, Team& team) {
    struct Pair {
      std::int64_t anchor, candidate;
      T value;
    };
    std::vector<Pair> pairs;
    for (std::int64_t i = 0; i < rows; ++i)
      for (const std::int32_t j : close[i]) {
        T& v = block[i * padded(n_) + j];
        pairs.push_back({begin + i, j, v});
        v = 0;
      }
    if (pairs.empty()) return;
    // Not by subtraction: of a pair that nearly coincides V is so large that nothing else would be left of the sum.
    for (std::int64_t i = 0; i < rows; ++i)
      if (!close[i].empty()) sums[i] = kernels().of<T>().sum_row(block + i * padded(n_), n_);
    // Threads share out the features, not the pairs: every sum keeps its order.
    constexpr std::int64_t slice = 16;  // 64 bytes of float32: no two threads write to one cache line
    team.run(runtime_, (width_ + slice - 1) / slice, 1, [&](std::int64_t s, Workspace&) {
      const std::int64_t end = std::min(width_, (s + 1) * slice);
      for (const Pair& p : pairs) {
        const Point<T> a = features_.anchor(p.anchor), c = features_.candidate(p.candidate);
        for (std::int64_t f = s * slice; f < end; ++f) {
          const double difference = double(a.x[f]) / a.length - double(c.x[f]) / c.length;
          const T pull = static_cast<T>(double(p.value) * difference * features_.scale());
          if (anchors_ != nullptr) anchors_[p.anchor * width_ + f] += pull;
          if (candidates_ != nullptr) candidates_[p.candidate * width_ + f] += pull;
          if (symmetric_) anchors_[p.candidate * width_ + f] -= pull;
        }
      }
    });
  }

  void add_column_sums(const T* block, std::int64_t rows, Team& team) {
    constexpr std::int64_t slice = 256;  // columns summed together, in registers and L1
    const std::int64_t ld = padded(n_);
    team.run(runtime_, (n_ + slice - 1) / slice, kGrain / slice, [&](std::int64_t s, Workspace&) {
      T sum[slice] = {};
      const std::int64_t begin = s * slice, count = std::min(slice, n_ - begin);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < count; ++j) sum[j] += block[i * ld + begin + j];
      for (std::int64_t j = 0; j < count; ++j) column_sums_[begin + j] += double(sum[j]);
    });
  }

  void add_signs(const T* block, std::int64_t begin, std::int64_t rows, Team& team) {
    const auto& accumulate = kernels().of<T>().accumulate_signs;
    const std::int64_t ld = padded(n_);
    const T* x = features_.anchors() + begin * width_;
    if (anchors_ != nullptr)
      team.run(runtime_, rows, 1, [&](std::int64_t i, Workspace&) {
        accumulate(anchors_ + (begin + i) * width_, x + i * width_, features_.candidates(), block + i * ld, 1, n_,
                   width_);
      });
    if (candidates_ != nullptr)
      team.run(runtime_, n_, 1, [&](std::int64_t j, Workspace&) {
        accumulate(candidates_ + j * width_, features_.candidates() + j * width_, x, block + j, ld, rows, width_);
      });
  }

  const Features<T>& features_;
  Runtime<T>& runtime_;
  std::int64_t n_, width_;
  bool symmetric_;
  T* anchors_ = nullptr;     // [m, width]
  T* candidates_ = nullptr;  // [n, width]
  T* products_ = nullptr;    // [block rows, width]
  std::vector<double> column_sums_;
};

// The mean distance over all anchors (scale "batch").
struct BatchMean {
  double mean = 0;    // in prepared units
  double weight = 0;  // sum_i a_i W_i
};

template <class T>
class Coherence {
 public:
  Coherence(const LossSpec& spec, const FeatureInput<T>& student, const FeatureInput<T>& teacher,
            const Weights<T>& weights, Runtime<T>& runtime)
      : spec_(spec),
        weights_(weights),
        runtime_(runtime),
        student_(student, runtime),
        teacher_(teacher, runtime),
        candidates_(padded_weights(weights.candidates, student.n, runtime)),
        team_(runtime.threads()),
        m_(student.m),
        n_(student.n),
        symmetric_(fits_symmetric(student_) && fits_symmetric(teacher_)),
        rows_(symmetric_ ? m_ : block_rows<T>(m_, n_)),
        student_block_(runtime.allocate((symmetric_ ? padded(n_) : rows_) * padded(n_))),
        teacher_block_(runtime.allocate((symmetric_ ? padded(n_) : rows_) * padded(n_))),
        close_(rows_),
        sums_(rows_) {
    // Without a mean, the temperature is in the units of the metric; the prepared features are in others.
    if (spec.scale == Scale::none) {
      spec_.temperature /= student_.unit();
      spec_.teacher_temperature /= teacher_.unit();
    }
  }

  Status run(Results<T>& results) {
    const bool want = results.gradient_anchors != nullptr || results.gradient_candidates != nullptr;
    FeatureGradient<T> gradient(student_, results.gradient_anchors != nullptr, results.gradient_candidates != nullptr,
                                symmetric_, runtime_);
    FeatureGradient<T> mean_gradient(student_, want_mean(results.gradient_anchors),
                                     want_mean(results.gradient_candidates), symmetric_, runtime_);
    BatchMean student_mean, teacher_mean;
    if (spec_.scale == Scale::batch) {
      student_mean = batch_mean(student_, student_block_, want ? &mean_gradient : nullptr);
      if (spec_.soft_teacher()) teacher_mean = batch_mean(teacher_, teacher_block_, nullptr);
    }

    double mean_pull = 0;
    std::vector<AnchorRow<T>> rows(rows_);
    for (std::int64_t begin = 0; begin < m_; begin += rows_) {
      const std::int64_t count = std::min(rows_, m_ - begin);
      products(student_, student_block_, begin, count);
      products(teacher_, teacher_block_, begin, count);
      team_.run(runtime_, count, 1 + kGrain / n_, [&](std::int64_t i, Workspace& ws) {
        rows[i] = anchor_row(begin + i, i, want, student_mean.mean, teacher_mean.mean);
        student_.distances(rows[i].student, rows[i].student, begin + i, false, &close_[i]);
        // Out of place: they are read once, and need not go back to memory.
        T* products = rows[i].teacher;
        rows[i].teacher = ws.teacher.need<T>(padded(n_));
        teacher_.distances(products, rows[i].teacher, begin + i, !spec_.soft_teacher(), nullptr);
        kernels().of<T>().anchor(spec_, candidates_, rows[i], ws);
      });
      for (std::int64_t i = 0; i < count; ++i) {
        if (rows[i].status != Status::ok) return rows[i].status;
        if (results.losses != nullptr) results.losses[begin + i] = static_cast<T>(rows[i].loss);
        if (weights_.coefficients != nullptr) results.total += rows[i].coefficient * rows[i].loss;
        mean_pull += rows[i].mean_pull;
        sums_[i] = rows[i].stored_sum;
      }
      if (want) gradient.add(student_block_, sums_.data(), begin, count, close_, team_);
    }
    gradient.finish();
    mean_gradient.finish();
    const double factor = student_mean.weight > 0 ? mean_pull / student_mean.weight : 0;
    deliver(gradient.anchors(), mean_gradient.anchors(), factor, m_, results.gradient_anchors);
    if (results.gradient_anchors != nullptr) student_.pull_anchors(results.gradient_anchors);
    deliver(gradient.candidates(), mean_gradient.candidates(), factor, n_, results.gradient_candidates);
    if (results.gradient_candidates != nullptr) student_.pull_candidates(results.gradient_candidates);
    return Status::ok;
  }

 private:
  static bool fits_symmetric(const Features<T>& features) {
    const std::int64_t size = padded(features.input().n);
    return features.same() && features.traits().products && size * size * sizeof(T) <= kSymmetricBytes;
  }

  void products(const Features<T>& features, T* block, std::int64_t begin, std::int64_t rows) {
    if (symmetric_)
      features.symmetric_products(block, runtime_);
    else
      features.products(block, begin, rows, runtime_);
  }

  bool want_mean(const T* gradient) const { return gradient != nullptr && spec_.scale == Scale::batch; }

  std::int64_t self(std::int64_t anchor) const { return weights_.self ? weights_.self[anchor] : -1; }

  AnchorRow<T> anchor_row(std::int64_t anchor, std::int64_t row, bool want, double student_mean,
                          double teacher_mean) const {
    AnchorRow<T> a{};
    a.student = student_block_ + row * padded(n_);
    a.teacher = teacher_block_ + row * padded(n_);
    a.self = self(anchor);
    a.student_mean = student_mean;
    a.teacher_mean = teacher_mean;
    a.coefficient = weights_.coefficients ? double(weights_.coefficients[anchor]) : 0.0;
    a.want_gradient = want;
    a.chain = student_.chain();
    a.chain_root = student_.chain_root();
    return a;
  }

  BatchMean batch_mean(const Features<T>& features, T* block, FeatureGradient<T>* gradient) {
    BatchMean result;
    std::vector<RowSum> row_sums(rows_);
    double distance = 0;
    for (std::int64_t begin = 0; begin < m_; begin += rows_) {
      const std::int64_t count = std::min(rows_, m_ - begin);
      products(features, block, begin, count);
      team_.run(runtime_, count, 1 + kGrain / n_, [&](std::int64_t i, Workspace&) {
        T* row = block + i * padded(n_);
        features.distances(row, row, begin + i, false, gradient != nullptr ? &close_[i] : nullptr);
        row_sums[i] = kernels().of<T>().sum(row, candidates_, self(begin + i));
        if (gradient != nullptr) sums_[i] = weights_to_gradient(features, row, begin + i);
      });
      for (std::int64_t i = 0; i < count; ++i) {
        const double a = weights_.anchors ? double(weights_.anchors[begin + i]) : 1.0;
        if (a == 0) continue;  // padding: whatever its distances are
        result.weight += a * row_sums[i].weight;
        distance += a * row_sums[i].distance;
      }
      if (gradient != nullptr) gradient->add(block, sums_.data(), begin, count, close_, team_);
    }
    result.mean = result.weight > 0 ? distance / result.weight : 0;
    return result;
  }

  // Distances -> V for the gradient of sum_ik a_i w_k d_ik; returns the row's sum.
  double weights_to_gradient(const Features<T>& features, T* row, std::int64_t anchor) const {
    const double a = (weights_.anchors ? double(weights_.anchors[anchor]) : 1.0) * features.chain();
    const std::int64_t own = self(anchor);
    double sum = 0;
    for (std::int64_t k = 0; k < n_; ++k) {
      const T w = k == own ? T(0) : static_cast<T>(a * double(candidates_.weights[k]));
      row[k] = !features.chain_root() ? w : row[k] > 0 ? w / row[k] : row[k] == 0 ? T(0) : row[k];
      sum += double(row[k]);
    }
    return sum;
  }

  void deliver(const T* gradient, const T* mean_gradient, double factor, std::int64_t rows, T* out) const {
    if (out == nullptr) return;
    const std::int64_t count = rows * student_.input().width;
    for (std::int64_t i = 0; i < count; ++i)
      out[i] = mean_gradient ? static_cast<T>(double(gradient[i]) + factor * double(mean_gradient[i])) : gradient[i];
  }

  LossSpec spec_;
  const Weights<T>& weights_;
  Runtime<T>& runtime_;
  Features<T> student_, teacher_;
  CandidateWeights<T> candidates_;
  Team team_;
  std::int64_t m_, n_;
  bool symmetric_;  // the candidates are the anchors, and all distances are held at once
  std::int64_t rows_;
  T *student_block_, *teacher_block_;             // [rows, padded(n)]
  std::vector<std::vector<std::int32_t>> close_;  // [rows] see RowKernels::finish_distances
  std::vector<double> sums_;                      // [rows] of V
};

}  // namespace

template <class T>
Status coherence(const LossSpec& spec, const FeatureInput<T>& student, const FeatureInput<T>& teacher,
                 const Weights<T>& weights, Results<T>& results, Runtime<T>& runtime) {
  return Coherence<T>(spec, student, teacher, weights, runtime).run(results);
}

template <class T>
Status coherence_from_distances(const LossSpec& spec, const T* student, const T* teacher, std::int64_t m,
                                std::int64_t n, const Weights<T>& weights, T* losses, T* gradient, double& total,
                                Runtime<T>& runtime) {
  const auto candidates = padded_weights(weights.candidates, n, runtime);
  Team team(runtime.threads());
  const std::int64_t ld = padded(n);
  std::vector<double> row_losses(m);
  std::vector<Status> status(m, Status::ok);
  team.run(runtime, m, 1 + kGrain / n, [&](std::int64_t i, Workspace& ws) {
    AnchorRow<T> a{};
    a.student = ws.student.need<T>(ld);
    a.teacher = ws.teacher.need<T>(ld);
    std::copy(student + i * n, student + (i + 1) * n, a.student);
    std::copy(teacher + i * n, teacher + (i + 1) * n, a.teacher);
    std::fill(a.student + n, a.student + ld, T(0));
    std::fill(a.teacher + n, a.teacher + ld, T(0));
    a.self = weights.self ? weights.self[i] : -1;
    a.coefficient = weights.coefficients ? double(weights.coefficients[i]) : 0.0;
    a.want_gradient = gradient != nullptr;
    a.chain = 1;
    kernels().of<T>().anchor(spec, candidates, a, ws);
    row_losses[i] = a.loss;
    status[i] = a.status;
    if (gradient != nullptr) std::copy(a.student, a.student + n, gradient + i * n);
  });
  total = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    if (status[i] != Status::ok) return status[i];
    if (losses != nullptr) losses[i] = static_cast<T>(row_losses[i]);
    if (weights.coefficients != nullptr) total += double(weights.coefficients[i]) * row_losses[i];
  }
  return Status::ok;
}

template <class T>
Status soft_ranks(const T* values, const T* weights, bool weights_per_row, const T* upstream, T* out, std::int64_t rows,
                  std::int64_t n, double temperature, Method method, Runtime<T>& runtime) {
  Team team(runtime.threads());
  std::vector<Status> status(rows, Status::ok);
  team.run(runtime, rows, 1 + kGrain / (n + 1), [&](std::int64_t i, Workspace& ws) {
    const T* w = weights == nullptr ? nullptr : weights + (weights_per_row ? i * n : 0);
    status[i] = kernels().of<T>().soft_rank(
        {values + i * n, w, upstream ? upstream + i * n : nullptr, out + i * n, n, temperature, method}, ws);
  });
  for (const Status s : status)
    if (s != Status::ok) return s;
  return Status::ok;
}

#define PCOH_INSTANTIATE(T)                                                                                         \
  template Status coherence<T>(const LossSpec&, const FeatureInput<T>&, const FeatureInput<T>&, const Weights<T>&,  \
                               Results<T>&, Runtime<T>&);                                                           \
  template Status coherence_from_distances<T>(const LossSpec&, const T*, const T*, std::int64_t, std::int64_t,      \
                                              const Weights<T>&, T*, T*, double&, Runtime<T>&);                     \
  template Status soft_ranks<T>(const T*, const T*, bool, const T*, T*, std::int64_t, std::int64_t, double, Method, \
                                Runtime<T>&);
PCOH_INSTANTIATE(float)
PCOH_INSTANTIATE(double)
#undef PCOH_INSTANTIATE

}  // namespace pcoherence
