// Purpose: the warpgroup-level tensor core instructions for 16-bit operands (PTX ISA,
// "wgmma.mma_async"), on tiles of 64 rows and 64, 128 or 256 columns.
//
// Four neighbouring warps, a warpgroup, multiply together; each has 16 rows of the result, in
// fragments as of mma.cuh. Products run asynchronously: between BeginProducts and
// WaitForProducts nothing may touch their registers. Tiles in shared memory have rows of 128 bytes,
// whose 16-byte chunks are exchanged (Swizzled) so that neither rows nor columns of chunks meet in
// one bank; they begin at multiples of 1024 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/mbarrier.cuh"

namespace lamina::cuda {

constexpr int kWarpgroup = 128;  // threads
constexpr int kSwizzledRows = 64;
constexpr int kSwizzledBytes = kSwizzledRows * 128;

// Where chunk `chunk` (eight elements) of row `row` lies in a tile, in bytes.
__device__ __forceinline__ int Swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// A tile as the instructions are told of it: groups of 8 rows 1024 bytes apart, chunks exchanged
// over 128 bytes. `next` matters only where an operand is wider than a tile and has its columns:
// how far behind the tile the one with its next 64 lies, in bytes.
__device__ __forceinline__ uint64_t DescribeTile(const void* tile, uint32_t next = 16) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{next >> 4} << 16) |
         ((SharedAddress(tile) & 0x3FFFFu) >> 4);
}

// A tile with rows of 64 bytes: groups of 8 rows 512 bytes apart, chunks exchanged over 64 bytes,
// as the copy engine does it. It begins at a multiple of 512 bytes.
__device__ __forceinline__ uint64_t DescribeNarrowTile(const void* tile) {
  return (uint64_t{2} << 62) | (uint64_t{512 >> 4} << 32) | (uint64_t{1} << 16) |
         ((SharedAddress(tile) & 0x3FFFFu) >> 4);
}

// From one step of 16 to the next, along a tile's rows and along its columns.
constexpr uint64_t kStepAlongRow = 32 >> 4;
constexpr uint64_t kStepAlongColumn = 16 * 128 >> 4;

// Registers written before are there for the products that follow.
__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all groups but the last kPending are done.
template <int kPending>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of a product's registers to before the wait for it.
template <int kTiles>
__device__ __forceinline__ void PinProduct(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

// A barrier of the warpgroup's threads alone.
__device__ __forceinline__ void WarpgroupBarrier() {
  const int id = 1 + static_cast<int>(threadIdx.x) / kWarpgroup;
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kWarpgroup) : "memory");
}

// Takes or gives back registers, for warpgroups of different roles: so many a thread from here on.
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The 32 registers of c, as results of a product alone and as what it adds to.
#define LAMINA_PRODUCT_NEW(c)                                                                     \
  "=&f"(c[0][0]), "=&f"(c[0][1]), "=&f"(c[0][2]), "=&f"(c[0][3]), "=&f"(c[1][0]), "=&f"(c[1][1]), \
      "=&f"(c[1][2]), "=&f"(c[1][3]), "=&f"(c[2][0]), "=&f"(c[2][1]), "=&f"(c[2][2]),             \
      "=&f"(c[2][3]), "=&f"(c[3][0]), "=&f"(c[3][1]), "=&f"(c[3][2]), "=&f"(c[3][3]),             \
      "=&f"(c[4][0]), "=&f"(c[4][1]), "=&f"(c[4][2]), "=&f"(c[4][3]), "=&f"(c[5][0]),             \
      "=&f"(c[5][1]), "=&f"(c[5][2]), "=&f"(c[5][3]), "=&f"(c[6][0]), "=&f"(c[6][1]),             \
      "=&f"(c[6][2]), "=&f"(c[6][3]), "=&f"(c[7][0]), "=&f"(c[7][1]), "=&f"(c[7][2]),             \
      "=&f"(c[7][3])
#define LAMINA_PRODUCT_ADD(c)                                                                   \
  "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),     \
      "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), \
      "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), \
      "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), \
      "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), \
      "+f"(c[7][2]), "+f"(c[7][3])
// `a` names the left operand: a register list, or a tile in %34 with its order.
#define LAMINA_PRODUCT(type, add, a, tail)                                              \
  "{\n.reg .pred adds;\n"                                                               \
  "setp.ne.b32 adds, " add                                                              \
  ", 0;\n"                                                                              \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                           \
  " "                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " a \
  ", %32, adds, 1, 1, " tail ";\n}"

// One step of 16 of c = a b, or with kAdd of c += a b: a from registers, as PackA makes it; b from
// a tile. With kColumns b's columns are the tile's columns, otherwise its rows.
template <typename T, bool kAdd, bool kColumns>
__device__ __forceinline__ void ProductStep(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool kBF16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBF16 || std::is_same_v<T, __half>, "16-bit operands");
  if constexpr (kBF16 && kAdd) {
    asm volatile(LAMINA_PRODUCT("bf16", "1", "{%34, %35, %36, %37}", "%33")
                 : LAMINA_PRODUCT_ADD(c)
                 : "l"(b), "n"(kColumns), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  } else if constexpr (kBF16 && !kAdd) {
    asm volatile(LAMINA_PRODUCT("bf16", "0", "{%34, %35, %36, %37}", "%33")
                 : LAMINA_PRODUCT_NEW(c)
                 : "l"(b), "n"(kColumns), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  } else if constexpr (!kBF16 && kAdd) {
    asm volatile(LAMINA_PRODUCT("f16", "1", "{%34, %35, %36, %37}", "%33")
                 : LAMINA_PRODUCT_ADD(c)
                 : "l"(b), "n"(kColumns), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  } else if constexpr (!kBF16 && !kAdd) {
    asm volatile(LAMINA_PRODUCT("f16", "0", "{%34, %35, %36, %37}", "%33")
                 : LAMINA_PRODUCT_NEW(c)
                 : "l"(b), "n"(kColumns), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
  }
}

// The same with a from a tile; with kTransposed its rows are the tile's columns.
template <typename T, bool kAdd, bool kTransposed, bool kColumns>
__device__ __forceinline__ void ProductStep(float (&c)[8][4], uint64_t a, uint64_t b) {
  constexpr bool kBF16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBF16 || std::is_same_v<T, __half>, "16-bit operands");
  if constexpr (kBF16 && kAdd) {
    asm volatile(LAMINA_PRODUCT("bf16", "1", "%34", "%35, %33")
                 : LAMINA_PRODUCT_ADD(c)
                 : "l"(b), "n"(kColumns), "l"(a), "n"(kTransposed));
  } else if constexpr (kBF16 && !kAdd) {
    asm volatile(LAMINA_PRODUCT("bf16", "0", "%34", "%35, %33")
                 : LAMINA_PRODUCT_NEW(c)
                 : "l"(b), "n"(kColumns), "l"(a), "n"(kTransposed));
  } else if constexpr (!kBF16 && kAdd) {
    asm volatile(LAMINA_PRODUCT("f16", "1", "%34", "%35, %33")
                 : LAMINA_PRODUCT_ADD(c)
                 : "l"(b), "n"(kColumns), "l"(a), "n"(kTransposed));
  } else if constexpr (!kBF16 && !kAdd) {
    asm volatile(LAMINA_PRODUCT("f16", "0", "%34", "%35, %33")
                 : LAMINA_PRODUCT_NEW(c)
                 : "l"(b), "n"(kColumns), "l"(a), "n"(kTransposed));
  }
}

#undef LAMINA_PRODUCT
#undef LAMINA_PRODUCT_ADD
#undef LAMINA_PRODUCT_NEW

// 128 columns wide: the 64 registers of c, which a product adds to.
#define LAMINA_PRODUCT_128_ADD(c)                                                                 \
  "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),       \
      "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),   \
      "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),   \
      "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),   \
      "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),   \
      "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]),   \
      "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), \
      "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]),             \
      "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]),             \
      "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]),             \
      "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]),             \
      "+f"(c[15][2]), "+f"(c[15][3])
// With the operands a, b and b's order, and a condition for the sum.
#define LAMINA_PRODUCT_128(type, add, a, b, tail)                                              \
  "{\n.reg .pred adds;\n"                                                                      \
  "setp.ne.b32 adds, " add                                                                     \
  ", 0;\n"                                                                                     \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
  " {"                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63}, " a ", " b ", adds, 1, 1, " tail ";\n}"

// One step of 16 of c = a b, or with `adds` of c += a b, 128 columns wide, both operands from
// tiles: a's columns are its tile's, b's are its tiles' with kColumns, otherwise their rows.
template <typename T, bool kColumns>
__device__ __forceinline__ void ProductStep(float (&c)[16][4], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(LAMINA_PRODUCT_128("bf16", "%66", "%64", "%65", "0, %67")
                 : LAMINA_PRODUCT_128_ADD(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kColumns));
  } else {
    static_assert(std::is_same_v<T, __half>, "16-bit operands");
    asm volatile(LAMINA_PRODUCT_128("f16", "%66", "%64", "%65", "0, %67")
                 : LAMINA_PRODUCT_128_ADD(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kColumns));
  }
}

// One step of 16 of c += a b, 128 columns wide: a from registers, as PackA makes it; b's columns
// are those of two tiles.
template <typename T>
__device__ __forceinline__ void ProductStep(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(LAMINA_PRODUCT_128("bf16", "1", "{%64, %65, %66, %67}", "%68", "1")
                 : LAMINA_PRODUCT_128_ADD(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    static_assert(std::is_same_v<T, __half>, "16-bit operands");
    asm volatile(LAMINA_PRODUCT_128("f16", "1", "{%64, %65, %66, %67}", "%68", "1")
                 : LAMINA_PRODUCT_128_ADD(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}
#undef LAMINA_PRODUCT_128
#undef LAMINA_PRODUCT_128_ADD

// 256 columns wide: the 128 registers of c.
#define LAMINA_PRODUCT_256_ADD(c)                                                                 \
  "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),       \
      "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),   \
      "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),   \
      "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),   \
      "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),   \
      "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]),   \
      "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), \
      "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]),             \
      "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]),             \
      "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]),             \
      "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]),             \
      "+f"(c[15][2]), "+f"(c[15][3]), "+f"(c[16][0]), "+f"(c[16][1]), "+f"(c[16][2]),             \
      "+f"(c[16][3]), "+f"(c[17][0]), "+f"(c[17][1]), "+f"(c[17][2]), "+f"(c[17][3]),             \
      "+f"(c[18][0]), "+f"(c[18][1]), "+f"(c[18][2]), "+f"(c[18][3]), "+f"(c[19][0]),             \
      "+f"(c[19][1]), "+f"(c[19][2]), "+f"(c[19][3]), "+f"(c[20][0]), "+f"(c[20][1]),             \
      "+f"(c[20][2]), "+f"(c[20][3]), "+f"(c[21][0]), "+f"(c[21][1]), "+f"(c[21][2]),             \
      "+f"(c[21][3]), "+f"(c[22][0]), "+f"(c[22][1]), "+f"(c[22][2]), "+f"(c[22][3]),             \
      "+f"(c[23][0]), "+f"(c[23][1]), "+f"(c[23][2]), "+f"(c[23][3]), "+f"(c[24][0]),             \
      "+f"(c[24][1]), "+f"(c[24][2]), "+f"(c[24][3]), "+f"(c[25][0]), "+f"(c[25][1]),             \
      "+f"(c[25][2]), "+f"(c[25][3]), "+f"(c[26][0]), "+f"(c[26][1]), "+f"(c[26][2]),             \
      "+f"(c[26][3]), "+f"(c[27][0]), "+f"(c[27][1]), "+f"(c[27][2]), "+f"(c[27][3]),             \
      "+f"(c[28][0]), "+f"(c[28][1]), "+f"(c[28][2]), "+f"(c[28][3]), "+f"(c[29][0]),             \
      "+f"(c[29][1]), "+f"(c[29][2]), "+f"(c[29][3]), "+f"(c[30][0]), "+f"(c[30][1]),             \
      "+f"(c[30][2]), "+f"(c[30][3]), "+f"(c[31][0]), "+f"(c[31][1]), "+f"(c[31][2]),             \
      "+f"(c[31][3])
#define LAMINA_PRODUCT_256(type)                                                               \
  "{\n.reg .pred adds;\n"                                                                      \
  "setp.ne.b32 adds, %130, 0;\n"                                                               \
  "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
  " {"                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, " \
  "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
  "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "   \
  "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127}, "                                                            \
  "%128, %129, adds, 1, 1, 0, %131;\n}"

// One step of 16 of c += a b, or c = a b without `adds`, both from tiles, 256 columns wide.
template <typename T, bool kColumns>
__device__ __forceinline__ void ProductStep(float (&c)[32][4], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(LAMINA_PRODUCT_256("bf16")
                 : LAMINA_PRODUCT_256_ADD(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kColumns));
  } else {
    static_assert(std::is_same_v<T, __half>, "16-bit operands");
    asm volatile(LAMINA_PRODUCT_256("f16")
                 : LAMINA_PRODUCT_256_ADD(c)
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(kColumns));
  }
}
#undef LAMINA_PRODUCT_256
#undef LAMINA_PRODUCT_256_ADD

// c = a b^T over a depth of 64: both tiles' rows are 64 long.
template <typename T>
__device__ __forceinline__ void MultiplyRowsOfTiles(float (&c)[8][4], uint64_t a, uint64_t b) {
  ProductStep<T, false, false, false>(c, a, b);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    ProductStep<T, true, false, false>(c, a + k * kStepAlongRow, b + k * kStepAlongRow);
  }
}

// The same, a in registers.
template <typename T>
__device__ __forceinline__ void MultiplyRowsOfTile(float (&c)[8][4], const uint32_t (&a)[4][4],
                                                   uint64_t b) {
  ProductStep<T, false, false>(c, a[0], b);
#pragma unroll
  for (int k = 1; k < 4; ++k) ProductStep<T, true, false>(c, a[k], b + k * kStepAlongRow);
}

// c += a b, a in registers, its columns the tile's rows.
template <typename T>
__device__ __forceinline__ void MultiplyTile(float (&c)[8][4], const uint32_t (&a)[4][4],
                                             uint64_t b) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ProductStep<T, true, true>(c, a[k], b + k * kStepAlongColumn);
}

// c += a b, or without kAdd c = a b, both tiles.
template <typename T, bool kAdd>
__device__ __forceinline__ void MultiplyTiles(float (&c)[8][4], uint64_t a, uint64_t b) {
  ProductStep<T, kAdd, false, true>(c, a, b);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    ProductStep<T, true, false, true>(c, a + k * kStepAlongRow, b + k * kStepAlongColumn);
  }
}

// c += a^T b, or without kAdd c = a^T b, both tiles.
template <typename T, bool kAdd = true>
__device__ __forceinline__ void MultiplyTransposedTile(float (&c)[8][4], uint64_t a, uint64_t b) {
  ProductStep<T, kAdd, true, true>(c, a, b);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    ProductStep<T, true, true, true>(c, a + k * kStepAlongColumn, b + k * kStepAlongColumn);
  }
}

}  // namespace lamina::cuda
