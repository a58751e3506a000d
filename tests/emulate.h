// A group of threads on the host, for tests of the kernels where there is no GPU: fibers that take turns at barriers.
//
// Between two barriers every thread runs alone, in an order that a seed permutes anew each time: a missing barrier
// shows as a result that depends on the seed. Under ThreadSanitizer, which takes fibers for threads that only barriers
// order, it shows where it changes no result. Memory of a group starts as 0xFF bytes: NaN, and indices that no array
// has.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../csrc/cuda/group.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
// What takes turns, and is no part of what is emulated.
#define PCOH_NOT_SANITIZED __attribute__((no_sanitize("thread")))
#else
#define PCOH_NOT_SANITIZED
#endif

namespace pcoherence::cuda {

struct Emulation {
  int threads = 0;          // of a row's group, a multiple of 32; 0: as the plan says
  std::int64_t shared = 0;  // bytes of fast memory; 0: as the plan says
  unsigned seed = 0;        // order of turns; 0: ascending
};

// Runs body(thread) for all threads, which meet in wait().
class Team {
 public:
  struct Barrier {
    int size = 0, arrived = 0;
    unsigned turn = 0;
    // Addresses that ThreadSanitizer orders by, one for odd turns and one for even: a fast thread may release the next
    // turn before a slow one has acquired this.
    char order[2] = {};
  };

  Team(int threads, const Emulation& how) : how_(how), random_(how.seed), fibers_(threads) {}

  PCOH_NOT_SANITIZED void run(const std::function<void(int)>& body) {
    body_ = &body;
    scheduler_.adopt_current();
    release(&body_);
    const int threads = static_cast<int>(fibers_.size());
    for (int t = 0; t < threads; ++t) start(t);
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (int left = threads; left > 0;) {
      if (how_.seed != 0) std::shuffle(order.begin(), order.end(), random_);
      for (const int t : order) {
        if (fibers_[t].done) continue;
        current_ = t;
        if (_setjmp(scheduler_.state) == 0) resume(t);
        left -= fibers_[t].done;
      }
    }
    acquire(&body_);
  }

  // `orders`: memory written before is seen after.
  PCOH_NOT_SANITIZED void wait(Barrier& b, bool orders) {
    const unsigned turn = b.turn;
    if (orders) release(b.order + turn % 2);
    if (++b.arrived == b.size) {
      b.arrived = 0;
      ++b.turn;
    }
    while (b.turn == turn)
      if (_setjmp(fibers_[current_].state) == 0) resume_scheduler();
    if (orders) acquire(b.order + turn % 2);
  }

 private:
#if defined(__SANITIZE_THREAD__)
  // What a sanitizer takes for a thread.
  struct Sanitized {
    void* fiber = nullptr;
    PCOH_NOT_SANITIZED void adopt_current() { fiber = __tsan_get_current_fiber(); }
    PCOH_NOT_SANITIZED void create() { fiber = __tsan_create_fiber(0); }
    PCOH_NOT_SANITIZED void switch_to() { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
  };
  static void release(void* p) { __tsan_release(p); }
  static void acquire(void* p) { __tsan_acquire(p); }
#else
  struct Sanitized {
    void adopt_current() {}
    void create() {}
    void switch_to() {}
  };
  static void release(void*) {}
  static void acquire(void*) {}
#endif
  static constexpr std::size_t kStack = 256 << 10;
  // Kept: a launch has many blocks.
  struct Stack : Sanitized {
    std::unique_ptr<char[]> memory = std::make_unique_for_overwrite<char[]>(kStack);
  };
  struct Fiber : Sanitized {
    ucontext_t first;
    jmp_buf state;
    bool started = false, done = false;
  };

  PCOH_NOT_SANITIZED void start(int t) {
    Fiber& f = fibers_[t];
    static std::vector<Stack> stacks;
    while (static_cast<int>(stacks.size()) <= t) stacks.emplace_back().create();
    static_cast<Sanitized&>(f) = stacks[t];
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = stacks[t].memory.get();
    f.first.uc_stack.ss_size = kStack;
    f.first.uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&f.first, reinterpret_cast<void (*)()>(&Team::enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  PCOH_NOT_SANITIZED static void enter(unsigned high, unsigned low) {
    auto* team = reinterpret_cast<Team*>((std::uintptr_t(high) << 32) | low);
    acquire(&team->body_);
    (*team->body_)(team->current_);
    team->fibers_[team->current_].done = true;
    release(&team->body_);
    team->resume_scheduler();
  }
  PCOH_NOT_SANITIZED void resume(int t) {
    Fiber& f = fibers_[t];
    f.switch_to();
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.first);
  }
  PCOH_NOT_SANITIZED void resume_scheduler() {
    scheduler_.switch_to();
    _longjmp(scheduler_.state, 1);
  }

  Emulation how_;
  std::minstd_rand random_;
  int current_ = 0;
  std::vector<Fiber> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  Fiber scheduler_;
};

// What the threads of a group share.
struct Block {
  Block(int threads, const Emulation& how) : team(threads, how), warps(threads / kWarp), scratch(kScratchBytes / 8) {
    all.size = threads;
    for (Warp& w : warps) w.barrier.size = kWarp;
    std::memset(scratch.data(), 0xFF, kScratchBytes);
  }
  struct Warp {
    Team::Barrier barrier;
    unsigned slots[kWarp][16];
  };
  bool in_fast(const void* p) const {
    const auto within = [p](const void* begin, std::size_t bytes) {
      const auto at = reinterpret_cast<std::uintptr_t>(p), first = reinterpret_cast<std::uintptr_t>(begin);
      return at >= first && at < first + bytes;
    };
    return within(shared, shared_bytes) || within(scratch.data(), kScratchBytes);
  }
  Team team;
  Team::Barrier all;
  long barriers = 0;      // that all threads have passed
  long slow_atomics = 0;  // on memory that is not fast
  std::vector<Warp> warps;
  std::vector<double> scratch;
  const char* shared = nullptr;  // fast memory besides the scratch
  std::size_t shared_bytes = 0;
};

class EmulatedGroup : public OneElement {
 public:
  EmulatedGroup(Block& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return block_.all.size; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  int warps() const { return threads() / kWarp; }
  void sync() {
    if (thread_ == 0) ++block_.barriers;
    block_.team.wait(block_.all, true);
  }
  void sync_warp() { block_.team.wait(own().barrier, true); }
  char* scratch() const { return reinterpret_cast<char*>(block_.scratch.data()); }
  bool in_fast(const void* p) const { return block_.in_fast(p); }
  template <class V>
  V* fast(V* p) const {
    if (!in_fast(p)) std::abort();  // a GPU would go to an address of something else
    return p;
  }
  template <class V>
  V add(V* p, V v) {
    if (!in_fast(p)) __atomic_fetch_add(&block_.slow_atomics, 1, __ATOMIC_RELAXED);
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  }
  void lower(int* p, int v) {
    for (int there = __atomic_load_n(p, __ATOMIC_RELAXED); v < there;)
      if (__atomic_compare_exchange_n(p, &there, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
  void set(unsigned* p, unsigned bits) { __atomic_fetch_or(p, bits, __ATOMIC_RELAXED); }
  static unsigned peek(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
  int swap_if(int* p, int expected, int v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  }

  template <class V>
  V shuffle(V v, int lane) {
    give(v);
    meet();
    v = take<V>(lane);
    meet();
    return v;
  }
  template <class V>
  V shuffle_xor(V v, int mask) {
    return shuffle(v, lane() ^ mask);
  }
  unsigned match(int v) {
    give(v);
    meet();
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= unsigned(take<int>(l) == v) << l;
    meet();
    return bits;
  }
  unsigned ballot(bool condition) {
    const unsigned same = match(condition);
    return condition ? same : ~same;
  }

 private:
  Block::Warp& own() const { return block_.warps[thread_ / kWarp]; }

  // The lanes of a warp. On a GPU shuffles order no memory but their own.
  void meet() { block_.team.wait(own().barrier, false); }
  template <class V>
  void give(const V& v) {
    static_assert(sizeof(V) <= sizeof(own().slots[0]) && sizeof(V) % 4 == 0);
    unsigned words[sizeof(V) / 4];
    std::memcpy(words, &v, sizeof v);
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) __atomic_store_n(own().slots[lane()] + i, words[i], __ATOMIC_RELAXED);
  }
  template <class V>
  V take(int lane) const {
    unsigned words[sizeof(V) / 4];
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) words[i] = __atomic_load_n(own().slots[lane] + i, __ATOMIC_RELAXED);
    V v;
    std::memcpy(&v, words, sizeof v);
    return v;
  }

  Block& block_;
  int thread_;
};

}  // namespace pcoherence::cuda
