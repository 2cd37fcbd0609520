// What most checks stand on: a session and a small stack of the check's own, both gone with it, and
// the requests that a training client makes of them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/conformance/daemon.h"

namespace lamina::conformance {

using Floats = std::vector<float>;

// B 3, S 5, H 16, A 2, I 24, L 2, fp32, Pre-LN, no dropout: all extents differ, so that a swapped
// one shows.
v1::StackConfig SmallConfig();
std::vector<int64_t> ActivationShape(const v1::StackConfig& config);  // [B, S, H], all of it
int64_t Elements(const std::vector<int64_t>& shape);

// Values in [-1, 1), the same for the same seed.
Floats Values(int64_t count, uint32_t seed);
v1::Tensor Inline(const std::vector<int64_t>& shape, const Floats& values);
v1::Tensor Inline(const std::vector<int64_t>& shape, const std::vector<int32_t>& values);
v1::Tensor InSlice(const std::vector<int64_t>& shape, const v1::Slice& slice);  // fp32
v1::TensorTarget InlineTarget();
v1::TensorTarget SliceTarget(const v1::Slice& slice);
// The values of an inline fp32 tensor. Violation: it is none, or its bytes are not its shape's.
Floats FloatsOf(const v1::Tensor& tensor);

// The same message gives the same bytes.
std::string Bytes(const google::protobuf::Message& message);

// A session; deleted by the destructor.
class OwnSession {
 public:
  explicit OwnSession(Daemon& daemon);
  ~OwnSession();
  OwnSession(const OwnSession&) = delete;
  OwnSession& operator=(const OwnSession&) = delete;
  const std::string& id() const { return id_; }

  uint64_t sequence() const { return applied_ + 1; }  // of the next mutation
  v1::Mutation Next() const;
  void Applied() { ++applied_; }

 private:
  Daemon& daemon_;
  std::string id_;
  uint64_t applied_ = 0;
};

// A stack; deleted by the destructor.
class OwnStack {
 public:
  OwnStack(Daemon& daemon, const v1::StackConfig& config);
  ~OwnStack();
  OwnStack(const OwnStack&) = delete;
  OwnStack& operator=(const OwnStack&) = delete;
  const std::string& name() const { return name_; }
  const v1::StackConfig& config() const { return config_; }  // every default filled in
  v1::Stack Describe() const;

 private:
  Daemon& daemon_;
  const std::string name_;
  v1::StackConfig config_;
};

// All of a stack that a call may change.
struct StackState {
  int64_t step = 0, skipped_steps = 0, outstanding_contexts = 0;
  uint64_t forward_count = 0;
  std::string parameters, gradients;  // the answers' bytes; gradients empty with training off
};

class Rig {
 public:
  explicit Rig(Daemon& daemon, const v1::StackConfig& config = SmallConfig());

  Daemon& daemon;
  OwnSession session;
  OwnStack stack;
  const std::vector<int64_t> shape;  // of the largest activation
  const v1::Tensor x;                // an input of that shape, inline
  const v1::Tensor dy;               // and an output's gradient

  // Requests. Mutations carry the session's next sequence.
  v1::ForwardRequest Evaluate() const;
  v1::ForwardRequest Evaluate(const v1::Tensor& input) const;
  v1::ForwardRequest Train() const;
  v1::BackwardRequest Backward(const std::string& context_id) const;
  v1::ApplyGradientsRequest Apply(double learning_rate = 0.01) const;
  v1::ZeroGradientsRequest Zero() const;
  v1::ReleaseContextRequest Release(const std::string& context_id) const;
  v1::SetParametersRequest Set(const std::string& parameter, const v1::Tensor& values) const;
  v1::GetParametersRequest Parameters(const std::vector<std::string>& names = {}) const;
  v1::GetGradientsRequest Gradients(const std::vector<std::string>& names = {}) const;

  // A mutation that must work; the session's sequence goes on.
  template <class Request>
  auto Mutate(const Request& request) {
    auto response = daemon.Ok(request);
    session.Applied();
    return response;
  }
  std::string Context() { return Mutate(Train()).context_id(); }  // of a training Forward

  StackState State() const;
  // Nothing has changed since; names what did.
  void RequireUnchanged(const StackState& before, const std::string& after_what) const;
};

}  // namespace lamina::conformance
