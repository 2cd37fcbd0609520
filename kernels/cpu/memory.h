// The CPU backend's device memory: host memory that is really there.
#pragma once

#include <cstddef>
#include <mutex>
#include <unordered_map>

#include "absl/status/statusor.h"

namespace lamina::cpu {

// Hands out zeroed or undefined pages; threads: any. What is still out when the object dies is
// given back.
class PageAllocator {
 public:
  PageAllocator() = default;
  ~PageAllocator();
  PageAllocator(const PageAllocator&) = delete;
  PageAllocator& operator=(const PageAllocator&) = delete;

  // At least `bytes`, page-aligned, in huge pages where the kernel gives them. Every page is backed
  // before this returns: no later write can run out of memory, and the first step meets no page
  // faults. RESOURCE_EXHAUSTED, with the numbers, where that is more than is available now. 0 bytes
  // give one page.
  absl::StatusOr<void*> Allocate(size_t bytes);
  // Null is ignored.
  void Free(void* data);

 private:
  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;  // guarded by mutex_
};

}  // namespace lamina::cpu
