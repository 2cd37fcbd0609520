// Purpose: barriers in shared memory that threads arrive at and wait for separately (PTX ISA,
// "mbarrier"), for pipelines of tiles.
#pragma once

#include <cstdint>

namespace lamina::cuda {

// A phase ends when `arrivals` arrivals have been counted, and the next one begins. One thread
// calls this; a block's barrier makes it known to the others.
__device__ __forceinline__ void StartBarrier(uint64_t* barrier, uint32_t arrivals) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n.reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address)
      : "memory");
}

// Arrives when all asynchronous copies that this thread has started so far have landed.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
}

// Waits for the end of a phase: that of the first, third, ... with `parity` 0, of the second,
// fourth, ... with 1. With 1 it returns at once from a barrier in its first phase.
__device__ __forceinline__ void WaitForPhase(uint64_t* barrier, uint32_t parity) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n}" ::"r"(address),
      "r"(parity)
      : "memory");
}

}  // namespace lamina::cuda
