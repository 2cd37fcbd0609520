// Purpose: the warp-level tensor core instructions for 16-bit operands (PTX ISA, "mma.m16n8k16" and
// "ldmatrix").
//
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two neighbouring elements:
//   A 16x16 [row, k]:  a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)
//   B 16x8  [k, col]:  b0 (2t, g)  b1 (2t + 8, g)               neighbours along k
//   C 16x8  [row, col], fp32:  c0 (g, 2t)  c1 (g, 2t + 1)  c2 (g + 8, 2t)  c3 (g + 8, 2t + 1)
// So C of two neighbouring column tiles, rounded, is A of a product over those columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/convert.cuh"

namespace lamina::cuda {

// c += a b
template <typename T>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void MultiplyAdd<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void MultiplyAdd<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices from shared memory: lane 8 i + r gives the address (aligned to 16 bytes) of row
// r of matrix i; every lane receives elements (g, 2t) and (g, 2t + 1) of matrix i in r[i].
template <typename T>
__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed: elements (2t, g) and (2t + 1, g).
template <typename T>
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The operands of products whose matrices lie row by row in shared memory, kStride elements a row.

// A: rows [row, row + 16) and columns [col, col + 16) of `tile`.
template <int kStride, typename T>
__device__ __forceinline__ void LoadA(uint32_t (&a)[4], const T* tile, int row, int col) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  LoadMatrices(a, tile + (row + (lane & 15)) * kStride + col + (lane >> 4) * 8);
}

// B of a b^T: columns are the tile's rows [row, row + 16), two column tiles; k is [col, col + 16).
// Registers 0, 1 are the first column tile's, 2, 3 the second's.
template <int kStride, typename T>
__device__ __forceinline__ void LoadBFromRows(uint32_t (&b)[4], const T* tile, int row, int col) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  LoadMatrices(b,
               tile + (row + (lane & 7) + (lane >> 4) * 8) * kStride + col + ((lane >> 3) & 1) * 8);
}

// B of a b: k is the tile's rows [row, row + 16); columns are [col, col + 16), two column tiles.
template <int kStride, typename T>
__device__ __forceinline__ void LoadBFromColumns(uint32_t (&b)[4], const T* tile, int row,
                                                 int col) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  LoadMatricesTransposed(b, tile + (row + (lane & 15)) * kStride + col + (lane >> 4) * 8);
}

// A of a product over the columns of C tiles `left` and `right`.
template <typename T>
__device__ __forceinline__ void PackA(uint32_t (&a)[4], const float (&left)[4],
                                      const float (&right)[4]) {
  a[0] = PackPair<T>(left[0], left[1]);
  a[1] = PackPair<T>(left[2], left[3]);
  a[2] = PackPair<T>(right[0], right[1]);
  a[3] = PackPair<T>(right[2], right[3]);
}

}  // namespace lamina::cuda
