// Purpose: copies from device to shared memory that a thread starts and waits for later (PTX ISA,
// "cp.async").
#pragma once

#include <cstdint>

namespace lamina::cuda {

// Starts to copy 16 bytes; where not `inside`, to write 16 zero bytes. Both pointers are aligned to
// 16 bytes; `src` must be a valid address either way.
__device__ __forceinline__ void CopyAsync16(void* dst_shared, const void* src, bool inside) {
  const auto dst = static_cast<uint32_t>(__cvta_generic_to_shared(dst_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(dst), "l"(src), "r"(inside ? 16 : 0)
               : "memory");
}

// The same for 4 and 8 bytes, aligned to as many.
template <int kBytes>
__device__ __forceinline__ void CopyAsyncSmall(void* dst_shared, const void* src, bool inside) {
  const auto dst = static_cast<uint32_t>(__cvta_generic_to_shared(dst_shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(dst), "l"(src), "n"(kBytes), "r"(inside ? kBytes : 0)
               : "memory");
}

// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all groups of this thread but the last kPending have landed. Other threads see them
// after a barrier.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lamina::cuda
