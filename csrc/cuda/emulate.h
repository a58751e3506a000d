// A group of threads on the host, for tests of the kernels where there is no GPU: fibers that take turns at barriers.
//
// Between two barriers every thread runs alone, in an order that a seed permutes anew each time: a missing barrier
// shows as a result that depends on the seed. With `real_threads` the same code runs on std::threads, for sanitizers.
// Memory of a group starts as 0xFF bytes: NaN, and indices that no array has.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "group.h"

namespace pcoherence::cuda {

struct Emulation {
  int threads = 0;          // of a row's group, a multiple of 32; 0: as the plan says
  std::int64_t shared = 0;  // bytes of fast memory; 0: as the plan says
  unsigned seed = 0;        // order of turns; 0: ascending
  bool real_threads = false;
};

// Runs body(thread) for all threads, which meet in wait().
class Team {
 public:
  // With a lock of its own: who meets elsewhere is not ordered by it, or races would be hidden.
  struct Barrier {
    int size = 0, arrived = 0;
    unsigned turn = 0;
    std::mutex mutex;
    std::condition_variable changed;
  };

  Team(int threads, const Emulation& how) : how_(how), random_(how.seed), fibers_(how.real_threads ? 0 : threads) {
    threads_ = threads;
  }

  void run(const std::function<void(int)>& body) {
    if (how_.real_threads) {
      std::vector<std::thread> team;
      for (int t = 0; t < threads_; ++t) team.emplace_back(body, t);
      for (auto& t : team) t.join();
      return;
    }
    body_ = &body;
    for (int t = 0; t < threads_; ++t) start(t);
    std::vector<int> order(threads_);
    std::iota(order.begin(), order.end(), 0);
    for (int left = threads_; left > 0;) {
      if (how_.seed != 0) std::shuffle(order.begin(), order.end(), random_);
      for (const int t : order) {
        if (fibers_[t].done) continue;
        current_ = t;
        if (_setjmp(scheduler_) == 0) resume(t);
        left -= fibers_[t].done;
      }
    }
  }

  bool real_threads() const { return how_.real_threads; }

  void wait(Barrier& b) {
    std::unique_lock<std::mutex> lock(b.mutex, std::defer_lock);
    if (how_.real_threads) lock.lock();
    const unsigned turn = b.turn;
    if (++b.arrived == b.size) {
      b.arrived = 0;
      ++b.turn;
      b.changed.notify_all();
      return;
    }
    while (b.turn == turn) {
      if (how_.real_threads) {
        b.changed.wait(lock);
      } else if (_setjmp(fibers_[current_].state) == 0) {
        _longjmp(scheduler_, 1);
      }
    }
  }

 private:
  struct Fiber {
    ucontext_t first;
    jmp_buf state;
    bool started = false, done = false;
  };
  static constexpr std::size_t kStack = 256 << 10;

  void start(int t) {
    Fiber& f = fibers_[t];
    static std::vector<std::unique_ptr<char[]>> stacks;  // kept: a launch has many blocks
    while (static_cast<int>(stacks.size()) <= t) stacks.push_back(std::make_unique_for_overwrite<char[]>(kStack));
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = stacks[t].get();
    f.first.uc_stack.ss_size = kStack;
    f.first.uc_link = nullptr;
    const auto self = reinterpret_cast<std::uintptr_t>(this);
    makecontext(&f.first, reinterpret_cast<void (*)()>(&Team::enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }
  static void enter(unsigned high, unsigned low) {
    auto* team = reinterpret_cast<Team*>((std::uintptr_t(high) << 32) | low);
    (*team->body_)(team->current_);
    team->fibers_[team->current_].done = true;
    _longjmp(team->scheduler_, 1);
  }
  void resume(int t) {
    if (fibers_[t].started) _longjmp(fibers_[t].state, 1);
    fibers_[t].started = true;
    setcontext(&fibers_[t].first);
  }

  Emulation how_;
  std::minstd_rand random_;
  int threads_ = 0, current_ = 0;
  std::vector<Fiber> fibers_;
  const std::function<void(int)>* body_ = nullptr;
  jmp_buf scheduler_;
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
    unsigned met = 0;  // lanes that have come to a shuffle, ever
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
  std::vector<Warp> warps;
  std::vector<double> scratch;
  const char* shared = nullptr;  // fast memory besides the scratch
  std::size_t shared_bytes = 0;
};

class EmulatedGroup {
 public:
  EmulatedGroup(Block& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return block_.all.size; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  int warps() const { return threads() / kWarp; }
  void sync() { block_.team.wait(block_.all); }
  void sync_warp() { block_.team.wait(own().barrier); }
  char* scratch() const { return reinterpret_cast<char*>(block_.scratch.data()); }
  bool in_fast(const void* p) const { return block_.in_fast(p); }
  template <class V>
  V* fast(V* p) const {
    if (!in_fast(p)) std::abort();  // a GPU would go to an address of something else
    return p;
  }
  int add(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
  void lower(int* p, int v) {
    for (int there = __atomic_load_n(p, __ATOMIC_RELAXED); v < there;)
      if (__atomic_compare_exchange_n(p, &there, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
  }
  int swap_if(int* p, int expected, int v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  }

  template <class V>
  V shuffle(V v, int lane) {
    put(v);
    meet();
    v = get<V>(lane);
    meet();
    return v;
  }
  template <class V>
  V shuffle_xor(V v, int mask) {
    return shuffle(v, lane() ^ mask);
  }
  unsigned ballot(bool condition) {
    put(int(condition));
    meet();
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= unsigned(get<int>(l)) << l;
    meet();
    return bits;
  }

 private:
  Block::Warp& own() const { return block_.warps[thread_ / kWarp]; }

  // The lanes of a warp. On a GPU shuffles order no memory but their own; neither do these for a sanitizer.
  void meet() {
    if (!block_.team.real_threads()) return sync_warp();
    const unsigned before = __atomic_fetch_add(&own().met, 1, __ATOMIC_RELAXED), all = (before / kWarp + 1) * kWarp;
    while (static_cast<int>(__atomic_load_n(&own().met, __ATOMIC_RELAXED) - all) < 0) std::this_thread::yield();
  }
  template <class V>
  void put(const V& v) {
    static_assert(sizeof(V) <= sizeof(own().slots[0]) && sizeof(V) % 4 == 0);
    unsigned words[sizeof(V) / 4];
    std::memcpy(words, &v, sizeof v);
    for (unsigned i = 0; i < sizeof(V) / 4; ++i) __atomic_store_n(own().slots[lane()] + i, words[i], __ATOMIC_RELAXED);
  }
  template <class V>
  V get(int lane) const {
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
