// Rounding to the stack's dtypes and their bits, apart from any backend's code: round to nearest,
// ties to even, from double in one step.
#pragma once

#include <cstdint>
#include <vector>

#include "lamina/kernels/dtype.h"

namespace lamina::testing {

// `value` as the float dtype holds it; too large gives infinity.
double Round(DType dtype, double value);
std::vector<double> Round(DType dtype, std::vector<double> values);

// The bits of values of a float dtype, dense, and back. Encode rounds. A NaN becomes a quiet one.
std::vector<uint8_t> Encode(DType dtype, const std::vector<double>& values);
std::vector<double> Decode(DType dtype, const std::vector<uint8_t>& bytes);

// Unit roundoff: the largest relative error of one rounding to nearest.
double UnitRoundoff(DType dtype);
// The largest error of one rounding near zero, where the relative bound does not hold: half the
// subnormals' spacing in fp16, and in fp32 and bf16 the smallest normal, so that hardware that
// flushes subnormals passes.
double Tiny(DType dtype);

// Deterministic values, the same on every machine: uniform in (offset - spread, offset + spread),
// rounded to `dtype`.
std::vector<double> Noise(DType dtype, uint64_t seed, int64_t count, double spread = 1.0,
                          double offset = 0.0);

}  // namespace lamina::testing
