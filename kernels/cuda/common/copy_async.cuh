// Purpose: copies from device to shared memory that a thread starts and waits for later (PTX ISA,
// "cp.async", "cp.async.bulk").
#pragma once

#include <cstdint>

#include "common/mbarrier.cuh"

namespace lamina::cuda {

// Starts to copy 16 bytes; where not `inside`, to write 16 zero bytes. Both pointers are aligned to
// 16 bytes; `src` must be a valid address either way.
__device__ __forceinline__ void CopyAsync16(void* dst_shared, const void* src, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(SharedAddress(dst_shared)), "l"(src), "r"(inside ? 16 : 0)
               : "memory");
}

// The same for 4 and 8 bytes, aligned to as many.
template <int kBytes>
__device__ __forceinline__ void CopyAsyncSmall(void* dst_shared, const void* src, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(SharedAddress(dst_shared)), "l"(src), "n"(kBytes), "r"(inside ? kBytes : 0)
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

// Starts to copy `bytes`, a multiple of 16, and to tell the barrier of it, whose phase must expect
// them. Both pointers are aligned to 16 bytes.
__device__ __forceinline__ void CopyBulk(uint32_t dst_shared, const void* src, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst_shared),
      "l"(src), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void CopyBulk(void* dst_shared, const void* src, uint32_t bytes,
                                         uint64_t* barrier) {
  CopyBulk(SharedAddress(dst_shared), src, bytes, SharedAddress(barrier));
}

}  // namespace lamina::cuda
