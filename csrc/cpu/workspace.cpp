#include "workspace.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define PCOH_MMAP
#endif

namespace pcoherence {

bool poison_workspace = false;

namespace {

// Blocks of distances are read down their columns too, one page for every row: pages of 2 MiB, where the system has
// them, save most of the page faults and of the address translation.
constexpr std::size_t kHugePage = 2 << 20;

// From this size on memory comes from the system's pages and goes back to them, or is kept in the pool. In the heap a
// large block cannot be joined again to what was beside it once something small stays there, and training would grow
// by one with every call. 64 KiB: the square of 128 float32 points.
constexpr std::size_t kPooled = 64 << 10;

// Sizes of pooled blocks are multiples of this, so that calls of nearly the same size share them.
constexpr std::size_t kPageUnit = 64 << 10;

#if defined(PCOH_MMAP)

Block allocate_pages(std::size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const std::size_t unit = huge ? kHugePage : kPageUnit;
  bytes = (bytes + unit - 1) / unit * unit;
  const std::size_t mapped = bytes + (huge ? kHugePage : 0);
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (!huge) return {memory, bytes};
  // Aligned by giving back what lies before and behind.
  char* begin = static_cast<char*>(memory);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(memory) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  if (before < kHugePage) munmap(begin + before + bytes, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // a hint: without it everything works, more slowly
#endif
  return {begin + before, bytes};
}
void free_pages(Block block) { munmap(block.data, block.bytes); }

#endif

// Aligned by hand, with the distance to the heap's own block in front: what aligned_alloc gives back, glibc's heap
// cuts into pieces.
Block allocate_from_heap(std::size_t bytes) {
  char* memory = static_cast<char*>(std::malloc(bytes + kAlignment));
  if (memory == nullptr) throw std::bad_alloc();
  const std::size_t shift = kAlignment - reinterpret_cast<std::uintptr_t>(memory) % kAlignment;  // 1 .. 64
  memory[shift - 1] = static_cast<char>(shift);
  return {memory + shift, bytes};
}
void free_to_heap(Block block) {
  char* memory = static_cast<char*>(block.data);
  std::free(memory - memory[-1]);
}

Block allocate(std::size_t bytes) {
#if defined(PCOH_MMAP)
  if (bytes >= kPooled) return allocate_pages(bytes);
#endif
  return allocate_from_heap(bytes);
}

void release(Block block) {
#if defined(PCOH_MMAP)
  if (block.bytes >= kPooled) return free_pages(block);
#endif
  free_to_heap(block);
}

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  std::size_t bytes = 0;
};

// Never destroyed: threads may outlive the end of main.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

Block take_block(std::size_t bytes) {
  if (bytes >= kPooled) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    auto& blocks = pool().blocks;
    for (auto it = blocks.begin(); it != blocks.end(); ++it)
      if (bytes <= it->bytes && it->bytes <= 2 * bytes) {  // more would keep large ones from those who need them
        const Block found = *it;
        blocks.erase(it);
        pool().bytes -= found.bytes;
        return found;
      }
  }
  return allocate(bytes);
}

void return_block(Block block) noexcept {
  if (block.data == nullptr) return;
  if (block.bytes < kPooled) return release(block);
  const std::lock_guard<std::mutex> lock(pool().mutex);
  auto& blocks = pool().blocks;
  try {
    blocks.push_back(block);
  } catch (const std::bad_alloc&) {
    return release(block);  // no memory to remember it
  }
  pool().bytes += block.bytes;
  while (pool().bytes > kPoolBytes) {
    pool().bytes -= blocks.front().bytes;
    release(blocks.front());
    blocks.erase(blocks.begin());
  }
}

void* Buffer::need_bytes(std::size_t bytes) {
  if (bytes > block_.bytes) {
    return_block(block_);
    block_ = {};
    block_ = take_block(bytes);
  }
  if (poison_workspace) std::memset(block_.data, 0xff, bytes);
  return block_.data;
}

}  // namespace pcoherence
