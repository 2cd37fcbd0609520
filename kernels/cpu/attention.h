// Scaled dot-product attention and its gradient, dense, packed, causal or not: one path for every
// shape. No matrix [S, S] is kept: a thread works on one block of queries of one head at a time.
// Saved for Backward: two fp32 numbers a query, its largest score and one over its sum of
// exponentials. Not their logarithm in one: beside a mask of -10000 that would lose the sum's
// digits, and so the recomputed probabilities have Forward's bits.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

size_t AttentionSaved(const LayerDims& dims);
size_t AttentionWorkspaceBytes(const LayerDims& dims, int threads);

absl::Status Attention(const Context& context, const Workspace& ws, const AttentionArgs& args);
// Heads are shared out whole: with fewer than B*A of them some threads idle.
absl::Status AttentionBackward(const Context& context, const Workspace& ws,
                               const AttentionBackwardArgs& args);

}  // namespace lamina::cpu
