#include "workspace.h"

#include <cstring>
#include <new>

namespace pcoherence {

bool poison_workspace = false;

void* Buffer::need_bytes(std::size_t bytes) {
  if (bytes > bytes_) {
    std::free(data_);
    bytes_ = 0;
    data_ = std::aligned_alloc(64, bytes);
    if (data_ == nullptr) throw std::bad_alloc();
    bytes_ = bytes;
  }
  if (poison_workspace) std::memset(data_, 0xff, bytes);
  return data_;
}

}  // namespace pcoherence
