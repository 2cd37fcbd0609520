// Dynamic loss scaling: what the outcome of a step makes of the scale.
#pragma once

#include "lamina/transformer/config.h"
#include "lamina/transformer/stack.h"

namespace lamina {

// Where a stack begins: 1 unless config.dynamic_loss_scale.
void StartLossScale(const StackConfig& config, StackCounters& counters);

// The rules of DeepSpeed's DynamicLossScaler with consecutive_hysteresis off:
// - A clean step counts; the growth_interval-th since the scale last grew or a gradient last
//   overflowed multiplies the scale by growth_factor, and renews the overflows that are tolerated.
// - An overflow starts the count over. It uses up one of the hysteresis; once a single one is left
//   it stays, and this and every further overflow multiply the scale by backoff_factor, down to
//   min_loss_scale. Clean steps alone do not renew it: only growth does.
// Unlike there, growth ends at StackConfig::kMaxLossScale, so that the scale stays a number.
void AdjustLossScale(const StackConfig& config, bool overflow, StackCounters& counters);

}  // namespace lamina
