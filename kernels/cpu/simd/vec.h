// Vectors of this translation unit's instruction set: 4 (baseline), 8 (AVX2) or 16 (AVX-512) fp32
// lanes, over the compiler's vector extension; intrinsics only where that has no word for it.
#pragma once

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

#define LAMINA_INLINE inline __attribute__((always_inline))
#define LAMINA_UNROLL _Pragma("GCC unroll 16")

inline constexpr int kLanes = LAMINA_CPU_ISA_LEVEL == 2 ? 16 : LAMINA_CPU_ISA_LEVEL == 1 ? 8 : 4;

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef uint64_t Q __attribute__((vector_size(kLanes * 4)));
typedef uint16_t H __attribute__((vector_size(kLanes * 2)));
typedef double D __attribute__((vector_size(kLanes * 4)));     // half as many lanes
typedef float HalfF __attribute__((vector_size(kLanes * 2)));  // half as many lanes

template <typename To, typename From>
LAMINA_INLINE To Bits(From v) {
  return __builtin_bit_cast(To, v);
}
LAMINA_INLINE F Splat(float v) { return F{} + v; }
LAMINA_INLINE F Select(I mask, F a, F b) { return mask ? a : b; }
// b where either is NaN
LAMINA_INLINE F Max(F a, F b) { return a > b ? a : b; }
LAMINA_INLINE F Abs(F v) { return Bits<F>(Bits<I>(v) & 0x7FFFFFFF); }

LAMINA_INLINE F Sqrt(F v) {
#if LAMINA_CPU_ISA_LEVEL == 2
  return _mm512_sqrt_ps(v);
#elif LAMINA_CPU_ISA_LEVEL == 1
  return _mm256_sqrt_ps(v);
#else
  return _mm_sqrt_ps(v);
#endif
}

// Lane by lane in a fixed tree, so that every run gives the same bits.
LAMINA_INLINE float Sum(F v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  LAMINA_UNROLL
  for (int width = kLanes / 2; width > 0; width /= 2) {
    LAMINA_UNROLL
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}
LAMINA_INLINE float Largest(F v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  float m = lane[0];
  LAMINA_UNROLL
  for (int i = 1; i < kLanes; ++i) m = lane[i] > m ? lane[i] : m;
  return m;
}

// --- loads and stores, converting from and to fp32 ---

LAMINA_INLINE F Load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
LAMINA_INLINE void Store(float* p, F v) { __builtin_memcpy(p, &v, sizeof(v)); }

LAMINA_INLINE H LoadBits(const void* p) {
  H v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
LAMINA_INLINE F Load(const BF16* p) {
  return Bits<F>(__builtin_convertvector(LoadBits(p), U) << 16);
}
LAMINA_INLINE void Store(BF16* p, F v) {
  const U u = Bits<U>(v);
  const U rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const U quiet = (u >> 16) | 0x40u;
  const U result = (u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded;
  const H h = __builtin_convertvector(result, H);
  __builtin_memcpy(p, &h, sizeof(h));
}

LAMINA_INLINE F Load(const F16* p) {
#if LAMINA_CPU_ISA_LEVEL == 2
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif LAMINA_CPU_ISA_LEVEL == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const U u = __builtin_convertvector(LoadBits(p), U);
  const U magnitude = u & 0x7FFFu;
  const U special = 0x7F800000u | (magnitude << 13) | (magnitude > 0x7C00u ? U{} + 0x400000u : U{});
  const U finite = Bits<U>(Bits<F>(magnitude << 13) * 0x1p112f);  // as in half.h
  return Bits<F>((magnitude >= 0x7C00u ? special : finite) | ((u & 0x8000u) << 16));
#endif
}
LAMINA_INLINE void Store(F16* p, F v) {
#if LAMINA_CPU_ISA_LEVEL == 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LAMINA_CPU_ISA_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = ToF16(v[i]);
#endif
}

// --- rows whose length is no multiple of the lanes ---

struct Whole {};
struct Part {
  int64_t lanes;  // the first this many, 1 to kLanes - 1
};

template <typename E>
LAMINA_INLINE F Load(const E* p, Whole) {
  return Load(p);
}
template <typename E>
LAMINA_INLINE F Load(const E* p, Part part) {  // zero in the other lanes
  E lane[kLanes] = {};
  __builtin_memcpy(lane, p, static_cast<size_t>(part.lanes) * sizeof(E));
  return Load(lane);
}
template <typename E>
LAMINA_INLINE void Store(E* p, F v, Whole) {
  Store(p, v);
}
template <typename E>
LAMINA_INLINE void Store(E* p, F v, Part part) {
  E lane[kLanes];
  Store(lane, v);
  __builtin_memcpy(p, lane, static_cast<size_t>(part.lanes) * sizeof(E));
}
// v with `other` in the lanes beyond the part.
LAMINA_INLINE F Keep(F v, float, Whole) { return v; }
LAMINA_INLINE F Keep(F v, float other, Part part) {
  float lane[kLanes];
  Store(lane, v);
  for (int64_t i = part.lanes; i < kLanes; ++i) lane[i] = other;
  return Load(lane);
}

// body(j, Whole or Part) for j = 0, kLanes, ... below n.
template <typename Body>
LAMINA_INLINE void Lanes(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, Whole{});
  if (j < n) body(j, Part{n - j});
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
