// The threads of a call.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

#include "runtime.h"
#include "workspace.h"

namespace pcoherence {

// Elements of a row's work that pay for a thread.
inline constexpr std::int64_t kGrain = 4096;

// One scratch area for each thread, and the first exception of any of them: none can leave a parallel region by itself.
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

}  // namespace pcoherence
