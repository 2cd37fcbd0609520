// Purpose: clusters of blocks, and tiles that the bulk copy engine (TMA) brings to several of them
// at once, or takes back. PTX ISA: "barrier.cluster", "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/mbarrier.cuh"

namespace lamina::cuda {

// Makes initialised barriers known to the copy engine and to the cluster's other blocks, which must
// meet in ClusterSync afterwards.
__device__ __forceinline__ void PublishBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks.
__device__ __forceinline__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts to copy the box of `map` at (x, y), x the contiguous dimension, to `dst` in every block of
// the cluster whose bit is in `blocks`, and to tell each one's `barrier` of it. Outside the matrix
// there are zeros.
__device__ __forceinline__ void StartBox(const CUtensorMap* map, int x, int y, void* dst,
                                         uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(dst)),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier)), "h"(blocks)
      : "memory");
}

// The same into this block alone.
__device__ __forceinline__ void StartBox(const CUtensorMap* map, int x, int y, void* dst,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(SharedAddress(dst)),
      "l"(map), "r"(x), "r"(y), "r"(SharedAddress(barrier))
      : "memory");
}

// Starts to copy a box from `src` to the matrix; what lies outside of it is left out. Boxes that
// one thread has started up to CommitBoxes are a group.
__device__ __forceinline__ void StoreBox(const CUtensorMap* map, int x, int y, const void* src) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(SharedAddress(src))
      : "memory");
}
__device__ __forceinline__ void CommitBoxes() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but this thread's last kPending groups have been read from shared memory, which may
// then be written again.
template <int kPending>
__device__ __forceinline__ void WaitForBoxesRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until they have arrived.
__device__ __forceinline__ void WaitForBoxes() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace lamina::cuda
