// Tensors of messages to memory that the engine may read and write: every check of a handle is
// here.
#pragma once

#include <cstddef>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "lamina/v1/tensor.pb.h"
#include "server/engine/engine.h"
#include "server/session/session_manager.h"

namespace lamina {

// The bytes that a slice names in a region of `session`, which the result keeps mapped.
// `element_size`: what the offset must be a multiple of; `bytes`: what the size must be.
//
// INVALID_ARGUMENT: size != bytes, size > length or offset > length - size, a misaligned offset.
// NOT_FOUND: the region is not this session's.
absl::StatusOr<CallTensor> ResolveSlice(absl::string_view field, const v1::Slice& slice,
                                        size_t bytes, size_t element_size, Session& session);

// A tensor that a call reads. `field` is its path in the request, for messages. An inline tensor
// points into `tensor`, which must outlive the call.
//
// INVALID_ARGUMENT: no dtype, a rank outside 1..4, an extent < 1, a shape whose bytes overflow, no
// storage, an inline size that does not fit the shape or passes the cap, and what ResolveSlice
// refuses.
absl::StatusOr<CallTensor> ResolveInput(absl::string_view field, const v1::Tensor& tensor,
                                        size_t inline_cap, Session& session);

// Where a result of this dtype and shape goes. An absent target, or an inline one, gives a
// CallTensor without data: the engine then provides the bytes. INVALID_ARGUMENT where such a result
// passes the cap.
absl::StatusOr<CallTensor> ResolveTarget(absl::string_view field, const v1::TensorTarget& target,
                                         DType dtype, const Shape& shape, size_t inline_cap,
                                         Session& session);

// Where a fence's number is. Absent: an empty one. INVALID_ARGUMENT: value 0, a region that is not
// in host memory, and what ResolveSlice refuses.
absl::StatusOr<Fence> ResolveFence(absl::string_view field, bool present, const v1::Fence& fence,
                                   Session& session);

// `control`, with what the request's `ready` says to wait for. As ResolveFence.
template <typename Request>
absl::StatusOr<CallControl> WithReady(const Request& request, CallControl control,
                                      Session& session) {
  auto ready = ResolveFence("ready", request.has_ready(), request.ready(), session);
  if (!ready.ok()) return ready.status();
  control.ready = *std::move(ready);
  return control;
}

// How a result went, as an answer says it: the slice that was asked for, or the bytes.
void FillResult(const v1::TensorTarget& target, const CallTensor& where, std::string inline_bytes,
                v1::Tensor* result);

}  // namespace lamina
