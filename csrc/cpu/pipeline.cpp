#include "pipeline.h"

#include <algorithm>
#include <vector>

#include "gradients.h"

namespace pcoherence {
namespace {

// A block of anchors' distances, one each for student and teacher, is bounded in bytes: beyond the caches anyway
// (blocks that fit them lose more by reading the candidates again), it bounds the memory...
constexpr std::int64_t kBlockBytes = 16 << 20;
// ... and in rows, up to kMaxBlock; 64 is where the products themselves slow down.
constexpr std::int64_t kMinBlock = 64;

template <class T>
std::int64_t block_rows(std::int64_t m, std::int64_t n) {
  const std::int64_t fits = kBlockBytes / static_cast<std::int64_t>(sizeof(T)) / padded(n) / 16 * 16;
  return std::min(m, std::clamp(fits, kMinBlock, kMaxBlock));
}

// The candidates' weights as the kernels want them, the same for all anchors or not.
template <class T>
class PaddedWeights {
 public:
  PaddedWeights(const Weighting<T>& given, std::int64_t n, Runtime<T>& runtime) : given_(given), n_(n) {
    if (!given.by_anchor) common_ = pad(given.candidates, runtime.allocate(padded(n)));
  }
  CandidateWeights<T> of(std::int64_t anchor, Workspace& ws) const {
    return given_.by_anchor ? pad(given_.candidates + anchor * n_, ws.weights.need<T>(padded(n_))) : common_;
  }

 private:
  CandidateWeights<T> pad(const T* from, T* to) const {
    for (std::int64_t k = 0; k < n_; ++k) to[k] = from ? from[k] : T(1);
    std::fill(to + n_, to + padded(n_), T(0));
    return {n_, to, kernels().of<T>().weigh(to, n_)};
  }

  const Weighting<T>& given_;
  std::int64_t n_;
  CandidateWeights<T> common_;
};

template <class T>
class Coherence {
 public:
  Coherence(const Options& options, const GivenPoints<T>& student, const GivenPoints<T>& teacher,
            const Weighting<T>& weights, Runtime<T>& runtime)
      : options_(options),
        weights_(weights),
        runtime_(runtime),
        student_(student),
        teacher_(teacher),
        candidates_(weights, student.n, runtime),
        team_(runtime.threads()),
        m_(student.m),
        n_(student.n),
        symmetric_(fits_symmetric(student_) && fits_symmetric(teacher_)),
        rows_(symmetric_ ? m_ : block_rows<T>(m_, n_)),
        student_block_(runtime.allocate((symmetric_ ? padded(n_) : rows_) * padded(n_))),
        teacher_block_(runtime.allocate((symmetric_ ? padded(n_) : rows_) * padded(n_))),
        near_(rows_),
        sums_(rows_) {
    Cloud<T>::prepare(student_, teacher_, runtime, team_);
  }

  Status run(Results<T>& results) {
    const bool want = results.gradient_anchors != nullptr || results.gradient_candidates != nullptr;
    FeatureGradient<T> gradient(student_, results.gradient_anchors, results.gradient_candidates, symmetric_, runtime_);
    std::vector<Outcome> outcomes(rows_);
    for (std::int64_t begin = 0; begin < m_; begin += rows_) {
      const std::int64_t count = std::min(rows_, m_ - begin);
      products(student_, student_block_, begin, count);
      products(teacher_, teacher_block_, begin, count);
      team_.run(runtime_, count, 1 + kGrain / n_, [&](std::int64_t i, Workspace& ws) {
        T* student = student_block_ + i * padded(n_);
        student_.distances(student, student, begin + i, false, &near_[i]);
        // Out of place: they are read once, and need not go back to memory.
        T* teacher = ws.teacher.need<T>(padded(n_));
        teacher_.distances(teacher_block_ + i * padded(n_), teacher, begin + i, !options_.soft_teacher(), nullptr);
        const AnchorRow<T> row{.student = student,
                               .teacher = teacher,
                               .gradient = want ? student : nullptr,
                               .coefficient = weights_.coefficient(begin + i),
                               .chain = student_.chain(),
                               .chain_root = student_.chain_root(),
                               .student_unit = student_.unit(),
                               .teacher_unit = teacher_.unit()};
        outcomes[i] =
            kernels().of<T>().anchor(options_, candidates_.of(begin + i, ws), row, weights_.excluded(begin + i), ws);
      });
      for (std::int64_t i = 0; i < count; ++i) {
        if (outcomes[i].status != Status::ok) return outcomes[i].status;
        if (results.losses != nullptr) results.losses[begin + i] = static_cast<T>(outcomes[i].loss);
        results.total += weights_.coefficient(begin + i) * outcomes[i].loss;
        sums_[i] = outcomes[i].stored;
      }
      if (want) gradient.add(student_block_, sums_.data(), begin, count, near_, team_);
    }
    gradient.finish();
    if (results.gradient_anchors != nullptr) student_.pull_anchors(results.gradient_anchors);
    if (results.gradient_candidates != nullptr) student_.pull_candidates(results.gradient_candidates);
    return Status::ok;
  }

 private:
  static bool fits_symmetric(const Cloud<T>& cloud) {
    const std::int64_t size = padded(cloud.input().n);
    return cloud.same() && cloud.traits().products && size * size * sizeof(T) <= kSymmetricBytes;
  }

  void products(const Cloud<T>& cloud, T* block, std::int64_t begin, std::int64_t rows) {
    if (symmetric_)
      cloud.symmetric_products(block, runtime_);
    else
      cloud.products(block, begin, rows, runtime_);
  }

  const Options& options_;
  const Weighting<T>& weights_;
  Runtime<T>& runtime_;
  Cloud<T> student_, teacher_;
  PaddedWeights<T> candidates_;
  Team team_;
  std::int64_t m_, n_;
  bool symmetric_;  // the candidates are the anchors, and all distances are held at once
  std::int64_t rows_;
  T *student_block_, *teacher_block_;            // [rows, padded(n)]
  std::vector<std::vector<std::int32_t>> near_;  // [rows] see RowKernels::finish_distances
  std::vector<double> sums_;                     // [rows] of V
};

}  // namespace

template <class T>
Status coherence(const Options& options, const GivenPoints<T>& student, const GivenPoints<T>& teacher,
                 const Weighting<T>& weights, Results<T>& results, Runtime<T>& runtime) {
  return Coherence<T>(options, student, teacher, weights, runtime).run(results);
}

template <class T>
Status coherence_from_distances(const Options& options, const T* student, const T* teacher, std::int64_t m,
                                std::int64_t n, const Weighting<T>& weights, Results<T>& results, Runtime<T>& runtime) {
  T* gradient = results.gradient_anchors;
  const PaddedWeights<T> candidates(weights, n, runtime);
  Team team(runtime.threads());
  const std::int64_t ld = padded(n);
  std::vector<Outcome> outcomes(m);
  team.run(runtime, m, 1 + kGrain / n, [&](std::int64_t i, Workspace& ws) {
    const auto copy = [&](Buffer& buffer, const T* distances) {
      T* row = buffer.need<T>(ld);
      std::copy(distances + i * n, distances + (i + 1) * n, row);
      std::fill(row + n, row + ld, T(0));
      return row;
    };
    T* row = copy(ws.student, student);
    const AnchorRow<T> a{.student = row,
                         .teacher = copy(ws.teacher, teacher),
                         .gradient = gradient != nullptr ? row : nullptr,
                         .coefficient = weights.coefficient(i)};
    outcomes[i] = kernels().of<T>().anchor(options, candidates.of(i, ws), a, weights.excluded(i), ws);
    if (gradient != nullptr) std::copy(row, row + n, gradient + i * n);
  });
  for (std::int64_t i = 0; i < m; ++i) {
    if (outcomes[i].status != Status::ok) return outcomes[i].status;
    if (results.losses != nullptr) results.losses[i] = static_cast<T>(outcomes[i].loss);
    results.total += weights.coefficient(i) * outcomes[i].loss;
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
  template Status coherence<T>(const Options&, const GivenPoints<T>&, const GivenPoints<T>&, const Weighting<T>&,   \
                               Results<T>&, Runtime<T>&);                                                           \
  template Status coherence_from_distances<T>(const Options&, const T*, const T*, std::int64_t, std::int64_t,       \
                                              const Weighting<T>&, Results<T>&, Runtime<T>&);                       \
  template Status soft_ranks<T>(const T*, const T*, bool, const T*, T*, std::int64_t, std::int64_t, double, Method, \
                                Runtime<T>&);
PCOH_INSTANTIATE(float)
PCOH_INSTANTIATE(double)
#undef PCOH_INSTANTIATE

}  // namespace pcoherence
