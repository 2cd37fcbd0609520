// The products inside attention: too small for a library call each, and chained through one
// thread's cache. Accumulators stay in registers; B's columns come in vectors, A's elements are
// broadcast, so A may have any strides (its transpose costs nothing).
#pragma once

#include "simd/vec.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

inline constexpr int64_t kPanel = 64;  // columns

// c [m, n] = a b, or c += a b.
struct SmallProduct {
  int64_t m = 0, n = 0, k = 0;  // n a multiple of 16: pad
  const float* a = nullptr;     // element (i, p) at a[i * a_row + p * a_column]
  int64_t a_row = 0, a_column = 1;
  // Element (p, j) at b[j / 64 * b_panel + p * b_row + j % 64]. Row-major with b_panel = 64; or
  // packed in panels of 64 columns.
  const float* b = nullptr;
  int64_t b_row = 0, b_panel = kPanel;
  float* c = nullptr;  // row-major
  int64_t c_row = 0;
  bool accumulate = false;
};

template <int kRows, int kVectors>
LAMINA_INLINE void ProductTile(const SmallProduct& s, const float* a, const float* b, float* c) {
  F sum[kRows][kVectors];
  LAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = s.accumulate ? Load(c + i * s.c_row + j * kLanes) : F{};
  }
  const int64_t a_row = s.a_row;
  for (int64_t p = 0; p < s.k; ++p) {
    F column[kVectors];
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) column[j] = Load(b + j * kLanes);
    LAMINA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const F element = Splat(a[i * a_row]);
      LAMINA_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[i][j] += element * column[j];
    }
    a += s.a_column;
    b += s.b_row;
  }
  LAMINA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LAMINA_UNROLL
    for (int j = 0; j < kVectors; ++j) Store(c + i * s.c_row + j * kLanes, sum[i][j]);
  }
}

// All rows of one strip of columns.
template <int kVectors>
void ProductStrip(const SmallProduct& s, const float* b, float* c) {
  // As many rows as leave registers for B's vectors and A's element.
  constexpr int kRows = kLanes == 16 ? (kVectors > 2 ? 4 : 8) : (kVectors > 1 ? 6 : 8);
  int64_t i = 0;
  for (; i + kRows <= s.m; i += kRows)
    ProductTile<kRows, kVectors>(s, s.a + i * s.a_row, b, c + i * s.c_row);
  const float* a = s.a + i * s.a_row;
  float* rest = c + i * s.c_row;
  switch (s.m - i) {
    case 1:
      return ProductTile<1, kVectors>(s, a, b, rest);
    case 2:
      return ProductTile<2, kVectors>(s, a, b, rest);
    case 3:
      return ProductTile<3, kVectors>(s, a, b, rest);
    case 4:
      return ProductTile<4, kVectors>(s, a, b, rest);
    case 5:
      return ProductTile<5, kVectors>(s, a, b, rest);
    case 6:
      return ProductTile<6, kVectors>(s, a, b, rest);
    case 7:
      return ProductTile<7, kVectors>(s, a, b, rest);
    default:
      return;
  }
}

inline void Multiply(const SmallProduct& s) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  for (int64_t j = 0; j < s.n;) {
    const int64_t left_in_panel = kPanel - j % kPanel;
    const int64_t left = (s.n - j < left_in_panel ? s.n - j : left_in_panel) / kLanes;
    const int64_t vectors = left < kMost ? left : kMost;
    const float* b = s.b + j / kPanel * s.b_panel + j % kPanel;
    float* c = s.c + j;
    if constexpr (kMost == 4) {
      if (vectors == 4) ProductStrip<4>(s, b, c);
      if (vectors == 3) ProductStrip<3>(s, b, c);
    }
    if (vectors == 2) ProductStrip<2>(s, b, c);
    if (vectors == 1) ProductStrip<1>(s, b, c);
    j += vectors * kLanes;
  }
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
