// The vector kernels: every hot loop of the CPU backend but the large products. They are written
// once over vec.h and compiled for three instruction sets; SelectKernels() takes the best that this
// processor has, so one binary runs on every x86-64.
//
// A kernel works on a range of rows or elements, on the calling thread, and allocates nothing. What
// it computes for a row does not depend on the range, so results do not depend on how work is
// shared out. Pointers need no more alignment than their element.
//
// Letters as in backend.h. `act` pointers are void*: which of a KernelSet's three tables a kernel
// comes from says their dtype.
#pragma once

#include <cstdint>

#include "lamina/kernels/dtype.h"
#include "lamina/kernels/philox.h"

namespace lamina::cpu {

// Rows of fp32 scratch are padded to this many floats: the most that one step of any instruction
// set writes (64 dropout factors, 16 floats a vector).
inline constexpr int64_t kPad = 64;
constexpr int64_t Padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A dropout, read once from its RngState. `on` false: every factor is 1.
struct DropoutKey {
  bool on = false;
  RngState rng{};
  uint32_t stream = 0;
  uint32_t threshold = 65536;
  float scale = 1.0f;
};

struct BiasGeluRows {
  const void* x;     // act [rows, n] or fp32, by the kernel's name
  const void* bias;  // act [n]; null: none
  void* pre;         // act [rows, n]; null: not wanted. May be x
  void* slope;       // act [rows, n], with gelu; null: not wanted. May be x
  void* y;           // act [rows, n]. May be x
  int64_t n;
  bool tanh;  // GELU's form: tanh or erf
  bool gelu;  // false: y = x + bias
};

struct GeluBackwardRows {
  const void* slope;  // act [rows, n]; null: x and y_again are there
  const void* x;      // act [rows, n]
  void* y_again;      // act [rows, n]; may be x
  const void* dy;
  void* dx;       // may be dy
  float* column;  // [n]: receives (not accumulates) the column sums of dx; null: not wanted
  int64_t n;
  bool tanh;  // GELU's form: tanh or erf
};

struct DropoutAddNormRows {
  const void* x;         // act [rows, h]
  const void* bias;      // act [h]; null: none
  const void* residual;  // act [rows, h]; null: none
  DropoutKey dropout;
  void* sum;          // act [rows, h]; null: not wanted
  const void* gamma;  // act [h]; null: no norm
  const void* beta;
  float eps;
  void* y;      // act [rows, h]
  float* mean;  // [rows]; null: not wanted
  float* rstd;
  int64_t h;
};

struct DropoutAddNormBackwardRows {
  const void* dy;    // act [rows, h]; null: no norm
  const void* dsum;  // act [rows, h]; null: zero
  // The normalised values: (sum - mean) * rstd; or, where sum is null, (y - beta) / gamma.
  const void* sum;
  const void* y;     // act [rows, h]
  const void* beta;  // act [h]; with y or y_again
  void* y_again;     // act [rows, h]: the norm's output; null: not wanted. May be dy
  const void* gamma;
  const float* mean;
  const float* rstd;
  DropoutKey dropout;
  void* dresidual;  // act [rows, h]; null: not wanted
  void* dx;         // act [rows, h]; null: not wanted
  // [h]: receive (not accumulate) the range's column sums; null: not wanted
  float* dbias;
  float* dgamma;
  float* dbeta;
  int64_t h;
};

// One head of one sample. Strides are in elements.
struct AttentionHead {
  const void* q;  // act [s, d], row stride qkv_stride; k and v likewise
  const void* k;
  const void* v;
  int64_t qkv_stride;
  int64_t s, d;
  int64_t keys;       // keys at and after this one are masked out; in [0, s]
  bool causal;        // query i sees no key after i
  const float* mask;  // [s], added to the scores; null: none
  float scale;
  DropoutKey dropout;
  uint64_t first_row;  // of the dropout matrix: (b*A + a)*S, or where the head's rows are packed
  float* saved;        // [s, 2]: each query's largest score and one over its sum of exponentials
  // Forward: `saved` is written and may be null. Backward: it is read.
  void* out;  // act [s, d], row stride out_stride
  const void* dout;
  int64_t out_stride;
  void* dq;  // act [s, d], row stride qkv_stride
  void* dk;
  void* dv;
  float* scratch;  // AttentionScratchFloats
};
// Queries are worked on in blocks of this many.
inline constexpr int64_t kQueryBlock = 32;
// Per thread. It is linear in S: the scores of one block of queries, and the head's keys and
// values.
constexpr int64_t AttentionScratchFloats(int64_t s, int64_t d, bool backward) {
  const int64_t sp = Padded(s), dp = Padded(d);
  const int64_t scores = kQueryBlock * (sp + 16);
  const int64_t head = sp * dp;
  const int64_t block = kQueryBlock * dp;
  return backward ? 3 * scores + 6 * head + 3 * block + sp : scores + 2 * head + 2 * block + sp;
}

struct AdamWElements {
  float* master;
  void* weights;  // act; null: none
  const float* grad;
  float* m;
  float* v;
  float grad_scale;
  float lr, beta1, beta2, eps, weight_decay, correction1, correction2;
};

// Elements of one segment: `weight_decay` is zero where the segment has none.
struct LambElements {
  float* master;
  void* weights;  // act; null: none
  const float* grad;
  float* m;
  float* v;
  float grad_scale;
  float beta1, beta2, eps, weight_decay, correction1, correction2;
};
struct LambSquares {
  double weight = 0.0, update = 0.0;  // sums of w^2 and of u^2
};

// What depends on the stack's dtype.
struct ActKernels {
  // pre = x + bias; y = gelu(pre), or pre itself; slope = gelu'(pre). x is act. With pre or slope
  // wanted, GELU sees pre rounded to act.
  void (*bias_gelu)(const BiasGeluRows&, int64_t begin, int64_t end);
  // The same with x in fp32: the epilogue of a product in fp32.
  void (*bias_gelu_f32)(const BiasGeluRows&, int64_t begin, int64_t end);
  // dx = dy * slope; by x: slope = gelu'(x), rounded to act, and y_again = gelu(x).
  void (*gelu_backward)(const GeluBackwardRows&, int64_t begin, int64_t end);
  // scratch: 2 * Padded(h) floats.
  void (*dropout_add_norm)(const DropoutAddNormRows&, int64_t begin, int64_t end, float* scratch);
  // scratch: 2 * Padded(h) floats.
  void (*dropout_add_norm_backward)(const DropoutAddNormBackwardRows&, int64_t begin, int64_t end,
                                    float* scratch);
  // out[n] receives the column sums of rows [begin, end) of x [*, n].
  void (*column_sum)(const void* x, int64_t n, int64_t begin, int64_t end, float* out);
  // Queries [begin, end); `pack`: scratch does not hold this head's keys and values yet.
  void (*attention)(const AttentionHead&, int64_t begin, int64_t end, bool pack);
  void (*attention_backward)(const AttentionHead&);
  void (*to_f32)(const void* src, float* dst, int64_t n);
  void (*from_f32)(const float* src, void* dst, int64_t n);
  void (*adamw)(const AdamWElements&, int64_t begin, int64_t end);
  // w -= step * u, from the m and v that lamb_moments left.
  void (*lamb_step)(const LambElements&, int64_t begin, int64_t end, float step);
};

struct KernelSet {
  const char* isa;
  ActKernels f32, bf16, f16;
  const ActKernels& of(DType t) const {
    return t == DType::kBF16 ? bf16 : t == DType::kF16 ? f16 : f32;
  }
  double (*sum_squares)(const float* x, int64_t n);
  // m and v of a LAMB step; master stays.
  LambSquares (*lamb_moments)(const LambElements&, int64_t begin, int64_t end);
  // dst[0, n) += src[0, n)
  void (*add)(const float* src, float* dst, int64_t n);
};

// The best for this processor. The environment variable LAMINA_CPU_ISA (baseline, avx2, avx512) may
// ask for less; what the processor lacks is never taken.
const KernelSet& SelectKernels();

// One translation unit each.
extern const KernelSet kBaselineKernels;
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;

}  // namespace lamina::cpu
