#include "workspace.h"

#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pcoherence {

bool poison_workspace = false;

// Blocks of distances are read down their columns too, one page for every row: pages of 2 MiB, where the system has
// them, save most of the page faults and of the address translation.
static constexpr std::size_t kHugePage = 2 << 20;

void* Buffer::need_bytes(std::size_t bytes) {
  if (bytes > bytes_) {
    std::free(data_);
    bytes_ = 0;
    const bool huge = bytes >= 2 * kHugePage;
    if (huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    data_ = std::aligned_alloc(huge ? kHugePage : 64, bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
#if defined(__linux__)
    if (huge) madvise(data_, bytes, MADV_HUGEPAGE);  // a hint: without it everything works, more slowly
#endif
  }
  if (poison_workspace) std::memset(data_, 0xff, bytes);
  return data_;
}

namespace {

// What the pool holds at most: the two square blocks of the largest symmetric problem (pipeline.cpp), and as much again
// as a quarter for features and gradients.
constexpr std::size_t kPoolBytes = std::size_t(160) << 20;
// Smaller buffers are the allocator's own business.
constexpr std::size_t kPooledBuffer = 1 << 20;

std::mutex pool_mutex;
std::vector<std::unique_ptr<Buffer>> pool;  // oldest first

}  // namespace

std::unique_ptr<Buffer> take_buffer(std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  for (auto it = pool.begin(); it != pool.end(); ++it)
    if (bytes <= (*it)->bytes() && (*it)->bytes() <= 2 * bytes) {
      auto found = std::move(*it);
      pool.erase(it);
      return found;
    }
  return std::make_unique<Buffer>();
}

void return_buffer(std::unique_ptr<Buffer> buffer) {
  if (buffer->bytes() < kPooledBuffer) return;
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(std::move(buffer));
  std::size_t total = 0;
  for (const auto& kept : pool) total += kept->bytes();
  for (; total > kPoolBytes; pool.erase(pool.begin())) total -= pool.front()->bytes();
}

}  // namespace pcoherence
