// Purpose: element conversion, and moving eight neighbouring elements as 16-byte accesses.
//
// Eight elements are the unit everywhere because one Philox call covers eight neighbouring columns:
// one 16-byte access for bf16 and fp16, two for fp32. Loads are ordinary ones, never the read-only
// path: several ops may run in place.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lamina::cuda {

template <typename T>
__device__ __forceinline__ float ToFloat(T v) {
  return static_cast<float>(v);
}
template <>
__device__ __forceinline__ float ToFloat<__nv_bfloat16>(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <>
__device__ __forceinline__ float ToFloat<__half>(__half v) {
  return __half2float(v);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T FromFloat(float v);
template <>
__device__ __forceinline__ float FromFloat<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float v) {
  return __float2half_rn(v);
}

// Two elements as one 32-bit register, `low` in the low half: the order in which tensor cores and
// memory have them.
template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);
template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 UnpackPair(uint32_t pair);
template <>
__device__ __forceinline__ float2 UnpackPair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
template <>
__device__ __forceinline__ float2 UnpackPair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Eight elements as memory has them: what a load that is to be waited for later leaves.
template <typename T>
struct Raw8 {
  uint4 words[sizeof(T) / 2];
};

// `p` aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ Raw8<T> LoadRaw8(const T* p) {
  Raw8<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    raw.words[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void Unpack8(const Raw8<T>& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = UnpackPair<T>(words[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}
template <>
__device__ __forceinline__ void Unpack8<float>(const Raw8<float>& raw, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    v[4 * i] = __uint_as_float(raw.words[i].x);
    v[4 * i + 1] = __uint_as_float(raw.words[i].y);
    v[4 * i + 2] = __uint_as_float(raw.words[i].z);
    v[4 * i + 3] = __uint_as_float(raw.words[i].w);
  }
}

// `p` aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void Load8(const T* p, float (&v)[8]) {
  Unpack8(LoadRaw8(p), v);
}

// Rounded as memory will have them.
template <typename T>
__device__ __forceinline__ Raw8<T> Pack8(const float (&v)[8]) {
  return {{make_uint4(PackPair<T>(v[0], v[1]), PackPair<T>(v[2], v[3]), PackPair<T>(v[4], v[5]),
                      PackPair<T>(v[6], v[7]))}};
}
template <>
__device__ __forceinline__ Raw8<float> Pack8<float>(const float (&v)[8]) {
  Raw8<float> raw;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    raw.words[i] = make_uint4(__float_as_uint(v[4 * i]), __float_as_uint(v[4 * i + 1]),
                              __float_as_uint(v[4 * i + 2]), __float_as_uint(v[4 * i + 3]));
  }
  return raw;
}

// `p` aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ void StoreRaw8(T* p, const Raw8<T>& raw) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    reinterpret_cast<uint4*>(p)[i] = raw.words[i];
  }
}

// Stores v, and leaves it as T has it.
template <typename T>
__device__ __forceinline__ void StoreAndKeep8(T* p, float (&v)[8]) {
  const Raw8<T> raw = Pack8<T>(v);
  StoreRaw8(p, raw);
  Unpack8(raw, v);
}
template <typename T>
__device__ __forceinline__ void Store8(T* p, const float (&v)[8]) {
  StoreRaw8(p, Pack8<T>(v));
}

// The same for a run-time choice of width: 8 elements as above, or one element in v[0].
template <typename T, int kWidth>
__device__ __forceinline__ void LoadWide(const T* p, float (&v)[kWidth]) {
  if constexpr (kWidth == 8) {
    Load8(p, v);
  } else {
    static_assert(kWidth == 1, "8 elements or one");
    v[0] = ToFloat(*p);
  }
}
template <typename T, int kWidth>
__device__ __forceinline__ void StoreWide(T* p, const float (&v)[kWidth]) {
  if constexpr (kWidth == 8) {
    Store8(p, v);
  } else {
    static_assert(kWidth == 1, "8 elements or one");
    *p = FromFloat<T>(v[0]);
  }
}

// Whether every pointer given allows 16-byte accesses. A null pointer does.
template <typename... Pointers>
inline bool Aligned16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ... | uintptr_t{0}) & 15u) == 0;
}

}  // namespace lamina::cuda
