// Every CUDA kernel on emulated thread blocks under ThreadSanitizer, for which a barrier that is missing is a race. The
// other tests see it only where it changes a result.
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/cuda/launch.h"

extern "C" void pcoherence_emulate(int threads, long shared, unsigned seed);
extern "C" int pcoherence_kernels_not_run();

namespace {

using namespace pcoherence;
using namespace pcoherence::cuda;

template <class T>
std::vector<T> random(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<T> uniform(0, 1);
  std::vector<T> values(count);
  for (T& v : values) v = uniform(generator);
  return values;
}

// Of floats more than kScratchBytes, and no multiple of a warp.
constexpr int kMany = 1030;

template <class T>
struct Problem {
  static constexpr int m = 2, width = 5;
  int n;
  std::vector<T> x = random<T>(m * width, 1), c = random<T>(n * width, 2), weights = random<T>(n, 3);
  std::vector<T> student = random<T>(m * n, 4), teacher = random<T>(m * n, 5), gradient = student;
  std::vector<T> ones = std::vector<T>(m, 1), points = x, candidates = c;
  std::vector<double> losses = std::vector<double>(m), sums = losses;
  std::vector<double> anchor_shrinks = losses, candidate_shrinks = std::vector<double>(n);
  std::vector<std::int64_t> self = {0, 1};
  int status = 0;
  T total = 0;
  std::vector<char> workspace;

  explicit Problem(int count) : n(count) {}

  Summation<T> summation(Method method, const Plan& p) {
    // Not as copy_table() lays them: other numbers, by the same accesses.
    const DeviceTables<T> tables{
        grid_table<T>(Kernel::sigmoid).values.data(), grid_table<T>(Kernel::slope).values.data(),
        grid_table<T>(Kernel::softplus).values.data(), series<T>().sigmoid, series<T>().softplus};
    workspace.resize(p.workspace_bytes() + 16);
    return {method, p.bins, p.reserve, tables, &status};
  }
  char* memory() { return workspace.data() + (16 - reinterpret_cast<std::uintptr_t>(workspace.data()) % 16) % 16; }

  // near: 0: without a neighbourhood.
  void rows(Method method, Objective objective, double temperature, bool soft_teacher, bool weighted, double near = 0) {
    const Plan p = plan<T>(current_device(), m, n, method);
    RowTask<T> task{};
    task.options.objective = objective;
    task.options.temperature = temperature;
    task.options.teacher_temperature = soft_teacher ? temperature : 0;
    task.sums = summation(method, p);
    task.rows = m;
    task.n = n;
    task.student = student.data();
    task.teacher = teacher.data();
    task.weights = weighted ? weights.data() : nullptr;
    task.self = self.data();
    task.coefficients = ones.data();
    task.chain = 1;
    task.chain_root = true;
    task.gradient = gradient.data();
    task.losses = losses.data();
    task.options.neighbourhood = near;
    launch(SmallTask<T>{.row = task, .features = false}, p, memory(), nullptr);
  }

  void soft_ranks(Method method, bool backward) {
    const Plan p = plan<T>(current_device(), m, n, method);
    const SoftRankTask<T> task{
        summation(method, p), m,   n, student.data(), weights.data(), false, backward ? teacher.data() : nullptr,
        gradient.data(),      0.05};
    launch(task, p, memory(), nullptr);
  }

  void small(bool directions) {
    const Plan p = plan<T>(current_device(), m, n, Method::automatic);
    MetricTraits traits{};
    traits.directions = directions;
    traits.root = !directions;
    traits.factor = directions ? 0.5 : 1;
    SmallTask<T> task{};
    task.features = true;
    task.student = {x.data(), c.data(), width, false, traits, anchor_shrinks.data(), candidate_shrinks.data()};
    if (!directions) task.student.anchor_shrinks = task.student.candidate_shrinks = nullptr;
    task.teacher = task.student;
    task.teacher.anchor_shrinks = task.teacher.candidate_shrinks = nullptr;
    task.student_distances = student.data();
    task.teacher_distances = teacher.data();
    task.row.sums = summation(Method::automatic, p);
    task.row.rows = m;
    task.row.n = n;
    task.row.student = student.data();
    task.row.teacher = teacher.data();
    task.row.coefficients = ones.data();
    task.row.chain = 1;
    task.row.gradient = gradient.data();
    task.row.losses = losses.data();
    launch(task, p, memory(), nullptr);
    launch(SmallGradientTask<T>{task.student, m, n, gradient.data(), points.data(), candidates.data(), losses.data(),
                                ones.data(), &total},
           nullptr);
  }

  // One far outlier on both sides, of a row that is looked at by a sample and crowds some of its buckets.
  void outlier(bool weighted) {
    for (int i = 0; i < m; ++i) {
      student[i * n + 3] = teacher[i * n + 5] = T(1e4);
      for (int k = 40; k < 80; ++k) teacher[i * n + k] = T(0.5);
    }
    rows(Method::automatic, Objective::mse, 0.1, false, weighted);
  }

  // Some of the teacher's distances tie.
  void neighbourhood(Objective objective, bool weighted, int tied) {
    for (int k = 0; k < tied; ++k) teacher[k] = T(0.5);
    rows(Method::automatic, objective, 0.1, false, weighted, 0.4);
  }

  // The first anchor's, a sum over more candidates than fast memory holds.
  void small_gradient_in_parts() {
    static_assert(kMany * sizeof(T) > kScratchBytes);
    launch(SmallGradientTask<T>{{x.data(), c.data(), width, false, MetricTraits{}, nullptr, nullptr},
                                1,
                                n,
                                gradient.data(),
                                points.data(),
                                nullptr,
                                losses.data(),
                                ones.data(),
                                &total},
           nullptr);
  }

  void streams() {
    launch(RowSumsTask<T>{m, n, student.data(), sums.data()}, nullptr);
    const std::int64_t words = words_of(n);
    std::vector<unsigned> near(m * words);
    std::vector<double> norms(n, 1);
    std::vector<std::int64_t> first(n);
    for (int k = 0; k < n; ++k) first[k] = k;
    launch(ProductTask<T>{m, n, width, teacher.data(), student.data(), near.data(), norms.data(), norms.data(),
                          x.data(), c.data(), first.data(), 0, false, false, true, T(1)},
           nullptr);
    for (unsigned& word : near) word = 0x10003;
    if (n % 32 != 0)
      for (int i = 0; i < m; ++i) near[(i + 1) * words - 1] &= (1u << n % 32) - 1;
    launch(PullTask<T>{m, n, width, x.data(), c.data(), gradient.data(), n, 1, near.data(), false, points.data()},
           nullptr);
    launch(PullTask<T>{n, m, width, c.data(), x.data(), gradient.data(), 1, n, near.data(), true, candidates.data()},
           nullptr);
    std::vector<double> centre(width), scale(1), memory(centre_memory(width));
    std::vector<std::uint64_t> hashes(n);
    std::vector<int> table(2 * table_size(n)), slots(n);
    std::vector<T> scaled = c;
    for (int k = 0; k < width; ++k) c[3 * width + k] = c[k];  // identical points
    const Identity found{table.data(), table.data() + table_size(n), slots.data(), table_size(n)};
    const auto one = [](auto task) {
      Several<decltype(task)> tasks;
      tasks.add(task);
      launch(tasks, nullptr);
    };
    for (const bool directions : {true, false}) {
      for (const auto stage : {CentreStage::first_mean, CentreStage::first_distances, CentreStage::mean,
                               CentreStage::distances, CentreStage::finish})
        one(CentreTask<T>{stage, n, width, directions, c.data(), centre.data(), scale.data(), memory.data()});
      one(PrepareTask<T>{n, width, directions, c.data(), centre.data(), scale.data(), candidates.data(),
                         directions ? nullptr : scaled.data(), norms.data(), hashes.data(), table.data()});
    }
    one(IdenticalTask<T>{n, width, scaled.data(), hashes.data(), found});
    one(FirstTask<T>{n, found, first.data()});
    launch(ClearTask<T>{m, n, near.data(), gradient.data()}, nullptr);
    std::vector<T> square(n * n, T(1));
    launch(TransposeTask<T>{n, square.data()}, nullptr);
    // All pairs are near.
    std::vector<T> all(n * n);
    std::vector<unsigned> marks(n * words);
    launch(ProductTask<T>{n, n, width, square.data(), all.data(), marks.data(), norms.data(), norms.data(), c.data(),
                          c.data(), first.data(), 0, true, true, true, T(1)},
           nullptr);
  }
};

// float64 has the same barriers: the same templates.
void everything() {
  using Rows = Problem<float>;
  // shared 0: what the plan says, all in fast memory; otherwise all in slow memory.
  for (const long shared : {0L, 4096L + 256}) {
    pcoherence_emulate(64, shared, 0);
    for (const Method method : {Method::grid, Method::scan, Method::pairs}) {
      Rows(20).rows(method, Objective::mse, 0.1, false, false);
      Rows(20).rows(method, Objective::cross_entropy, 0.01, true, true);  // many bins
      Problem<double>(17).soft_ranks(method, true);
    }
    Rows(20).rows(Method::grid, Objective::spearman, 0.01, false, false);
    Rows(200).rows(Method::grid, Objective::mse, 0.05, false, true);  // more than 16 bins, some of which are cut
    Rows(20).rows(Method::automatic, Objective::spearman, 0.1, false, true);
    Rows(9).small(false);
    Rows(9).small(true);
  }
  for (const long shared : {0L, 4096L + 256, 4096L + 6000}) {
    pcoherence_emulate(64, shared, 0);
    Rows(300).outlier(false);
    Rows(300).outlier(true);
  }
  // Places all at a time, in slow memory, in windows.
  for (const long shared : {0L, 4096L + 256, 4096L + 700}) {
    pcoherence_emulate(64, shared, 0);
    for (const Objective objective : {Objective::mse, Objective::cross_entropy}) {
      Rows(300).neighbourhood(objective, false, 0);
      Rows(300).neighbourhood(objective, false, 40);
      Rows(300).neighbourhood(objective, false, 280);  // more than a byte counts
      Rows(300).neighbourhood(objective, true, 0);
    }
  }
  pcoherence_emulate(64, 4096 + 256, 0);
  Rows(40).streams();
  Rows(kMany).small_gradient_in_parts();
}

}  // namespace

int main() {
  everything();
  if (const int left = pcoherence_kernels_not_run(); left != 0) {
    std::printf("kernels that have not run: %d\n", left);
    return 1;
  }
  std::puts("every kernel has run");
}
