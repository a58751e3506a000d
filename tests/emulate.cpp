// The launcher on the host: see emulate.h. Built by tests only, together with ops.cpp, in place of launch_*.cu.
#include "emulate.h"

#include "../csrc/cuda/instances.h"
#include "../csrc/cuda/plan.h"
#include "../csrc/cuda/work.h"

namespace pcoherence::cuda {

Emulation emulation;                  // set by tests
long barriers = 0, slow_atomics = 0;  // of blocks of rows; see Block

template <class T>
Plan plan(const Device& device, std::int64_t rows, std::int64_t n, Method method) {
  Plan p = plan_for<T, EmulatedGroup>(device, rows, n, method);
  if (emulation.threads == 0 && emulation.shared == 0) return p;
  if (emulation.threads != 0) p.threads = emulation.threads;
  if (emulation.shared != 0) {
    p.shared = emulation.shared;
    p.reserve = std::min(p.reserve, (p.shared - kScratchBytes) / 2);
  }
  p.workspace = (task_bytes<T, EmulatedGroup>(n, p.threads, p.bins) + 255) / 256 * 256;
  return p;
}

// Nobody has compiled it for a device.
template <class T>
Resources resources(RowKernel, const Plan&) {
  return {};
}

// Whether the kernel of each task has run, of all that are instantiated.
std::vector<const bool*>& kernels() {
  static std::vector<const bool*> all;
  return all;
}
template <class Task>
struct Launches {
  static inline bool ran = false;
  static inline const bool listed = (kernels().push_back(&ran), true);
  static void note() { ran = listed; }
};

template <class Task>
void launch(const Task& task, const Plan& plan, char* workspace, Stream) {
  Launches<Task>::note();
  std::vector<double> shared((plan.shared + 7) / 8);
  // One block after another, each with the row numbers that it would have on a GPU.
  for (int b = 0; b < plan.blocks; ++b) {
    Block block(plan.threads, emulation);
    block.shared = reinterpret_cast<const char*>(shared.data());
    block.shared_bytes = plan.shared;
    std::memset(shared.data(), 0xFF, plan.shared);
    std::memset(workspace + b * plan.workspace, 0xFF, plan.workspace);
    block.team.run([&](int thread) {
      EmulatedGroup g(block, thread);
      for (std::int64_t r = b; r < rows_of(task); r += plan.blocks) {
        work(g, task, r,
             Arena(reinterpret_cast<char*>(shared.data()), plan.shared - kScratchBytes, workspace + b * plan.workspace,
                   plan.workspace));
        g.sync();
      }
    });
    barriers += block.barriers;
    slow_atomics += block.slow_atomics;
  }
}

template <class Task>
void launch(const Task& task, Stream) {
  Launches<Task>::note();
  const Shape s = shape(task);
  for (std::int64_t x = 0; x < s.x; ++x)
    for (int y = 0; y < s.y; ++y) {
      Block block(s.threads, emulation);
      block.team.run([&](int thread) {
        EmulatedGroup g(block, thread);
        work(g, task, x, y);
      });
    }
}

const char* last_error() { return nullptr; }

// A small one, so that a few rows already share a block.
const Device& current_device() {
  static const Device device{4, 227 << 10, 228 << 10};
  return device;
}

PCOH_INSTANTIATE(float)
#ifdef PCOH_RACES  // float64 has the same barriers
template Plan plan<double>(const Device&, std::int64_t, std::int64_t, Method);
#else
PCOH_INSTANTIATE(double)
#endif
PCOH_INSTANTIATE_SOFT_RANK

}  // namespace pcoherence::cuda

// threads, shared: see Emulation; 0 leaves them to the plan.
extern "C" long pcoherence_barriers() { return pcoherence::cuda::barriers; }
extern "C" long pcoherence_slow_atomics() { return pcoherence::cuda::slow_atomics; }
extern "C" int pcoherence_kernels_not_run() {
  int left = 0;
  for (const bool* ran : pcoherence::cuda::kernels()) left += !*ran;
  return left;
}
extern "C" void pcoherence_emulate(int threads, long shared, unsigned seed) {
  pcoherence::cuda::emulation = {threads, shared, seed};
}
