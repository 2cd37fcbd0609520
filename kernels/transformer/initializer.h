// Initial weights: normal numbers that depend on (seed, parameter, element) alone, so that a stack
// starts the same on every backend and for any number of threads.
#pragma once

#include <cstdint>

#include "lamina/transformer/config.h"
#include "parameters.h"

namespace lamina {

// Standard normal numbers for elements [0, count) of parameter number `parameter` (its index in
// ParameterLayout::parameters()), times `deviation`. Philox bits, Box-Muller in double; at most 6.8
// deviations out. Uses as many threads as the machine has for large counts.
void FillNormal(uint64_t seed, uint64_t parameter, double deviation, float* out, int64_t count);

// Deviation of a matrix of this role.
double InitialDeviation(const StackConfig& config, ParameterRole role);

// The fp32 initial values of parameter `parameter`: normal matrices, zero biases, unit gammas.
void FillInitial(const StackConfig& config, const ParameterLayout& layout, int64_t parameter,
                 float* out);

}  // namespace lamina
