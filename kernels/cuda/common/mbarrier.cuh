// Purpose: barriers in shared memory that threads and copies arrive at and that are waited for
// separately (PTX ISA, "mbarrier"), for pipelines of tiles; and the fence that goes with them.
#pragma once

#include <cstdint>

namespace lamina::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A phase ends when `arrivals` arrivals have been counted, and the next one begins. One thread
// calls this; a block's barrier makes it known to the others.
__device__ __forceinline__ void StartBarrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(SharedAddress(barrier))
      : "memory");
}

// One lane of each warp arrives, when all of the warp have got here, and tells of what all of them
// have done: an arrival a warp. compute-sanitizer's racecheck credits it with that lane's stores
// only: where others then load what a warp has stored, each thread arrives for itself.
__device__ __forceinline__ void ArriveByWarp(uint64_t* barrier) {
  __syncwarp();
  if ((threadIdx.x & 31u) == 0) Arrive(barrier);
}

// Arrives; the phase then also waits for `bytes` of bulk copies to land.
__device__ __forceinline__ void ArriveAndExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void ArriveAndExpect(uint64_t* barrier, uint32_t bytes) {
  ArriveAndExpect(SharedAddress(barrier), bytes);
}

// Arrives at the barrier that block `rank` of the cluster has in the same place. It tells that
// block of reads that are over; of what this thread wrote it tells only its own block, as an order
// of writes within the cluster costs a thousand cycles.
__device__ __forceinline__ void ArriveAt(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(SharedAddress(barrier)),
      "r"(rank)
      : "memory");
}

// Arrives when all asynchronous copies that this thread has started so far have landed.
__device__ __forceinline__ void ArriveAfterCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Waits for the end of a phase: that of the first, third, ... with `parity` 0, of the second,
// fourth, ... with 1. With 1 it returns at once from a barrier in its first phase.
__device__ __forceinline__ void WaitForPhase(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void WaitForPhase(uint64_t* barrier, uint32_t parity) {
  WaitForPhase(SharedAddress(barrier), parity);
}

// Whether it has ended, without waiting.
__device__ __forceinline__ bool HasPhaseEnded(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(ended)
      : "r"(SharedAddress(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

// What this thread wrote to shared memory by ordinary stores or copies, or has seen of others', is
// there for warpgroup products and for bulk copies ("fence.proxy.async").
__device__ __forceinline__ void ShareWithEngines() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace lamina::cuda
