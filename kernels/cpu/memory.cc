#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "machine.h"

namespace lamina::cpu {
namespace {

#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_WRITE = 23;  // Linux 5.14
#endif
constexpr size_t kHugePage = size_t{2} << 20;

absl::Status Exhausted(size_t bytes, size_t available) {
  return absl::ResourceExhaustedError(absl::StrCat("cpu memory: ", bytes, " bytes were asked for, ",
                                                   available, " of ", TotalMemory(),
                                                   " are available"));
}

// Backs every page of the mapping.
bool Populate(char* data, size_t bytes, size_t page) {
  if (madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return true;
  if (errno != EINVAL) return false;  // out of memory, and the kernel says so
  for (size_t i = 0; i < bytes; i += page) static_cast<volatile char*>(data)[i] = 0;
  return true;
}

}  // namespace

PageAllocator::~PageAllocator() {
  for (const auto& [data, bytes] : sizes_) munmap(data, bytes);
}

absl::StatusOr<void*> PageAllocator::Allocate(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<size_t>::max() / 2) return Exhausted(bytes, AvailableMemory());
  const size_t unit = bytes >= kHugePage ? kHugePage : page;
  const size_t rounded = (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
  // One allocation at a time: two must not both be granted what is there only once.
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t available = AvailableMemory();
  if (rounded > available) return Exhausted(bytes, available);
  // Huge pages need a start on their own size: map one more and give the ends back.
  const size_t slack = unit == kHugePage ? kHugePage : 0;
  void* mapping = mmap(nullptr, rounded + slack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return Exhausted(bytes, available);
  char* data = static_cast<char*>(mapping);
  if (slack > 0) {
    const size_t head = (kHugePage - reinterpret_cast<size_t>(data) % kHugePage) % kHugePage;
    if (head > 0) munmap(data, head);
    if (slack > head) munmap(data + head + rounded, slack - head);
    data += head;
    madvise(data, rounded, MADV_HUGEPAGE);  // a wish: small pages do too
  }
  if (!Populate(data, rounded, page)) {
    munmap(data, rounded);
    return Exhausted(bytes, AvailableMemory());
  }
  sizes_.emplace(data, rounded);
  return static_cast<void*>(data);
}

void PageAllocator::Free(void* data) {
  if (data == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sizes_.find(data);
  if (found == sizes_.end()) return;
  munmap(data, found->second);
  sizes_.erase(found);
}

}  // namespace lamina::cpu
