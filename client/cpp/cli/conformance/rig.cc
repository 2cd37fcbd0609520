#include "cli/conformance/rig.h"

#include <cstring>
#include <functional>
#include <numeric>
#include <random>

#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace lamina::conformance {
namespace {

void SetInlineShape(const std::vector<int64_t>& shape, v1::DataType dtype, v1::Tensor* tensor) {
  tensor->set_dtype(dtype);
  for (const int64_t extent : shape) tensor->add_shape(extent);
}

}  // namespace

v1::StackConfig SmallConfig() {
  v1::StackConfig config;
  config.set_batch_size(3);
  config.set_max_seq_length(5);
  config.set_hidden_size(16);
  config.set_intermediate_size(24);
  config.set_heads(2);
  config.set_num_hidden_layers(2);
  config.set_seed(7);
  return config;
}

std::vector<int64_t> ActivationShape(const v1::StackConfig& config) {
  return {config.batch_size(), config.max_seq_length(), config.hidden_size()};
}

int64_t Elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Floats Values(int64_t count, uint32_t seed) {
  std::minstd_rand random(seed);
  Floats values(static_cast<size_t>(count));
  for (float& value : values) {
    value = static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
  }
  return values;
}

v1::Tensor Inline(const std::vector<int64_t>& shape, const Floats& values) {
  v1::Tensor tensor;
  SetInlineShape(shape, v1::DATA_TYPE_FLOAT32, &tensor);
  tensor.set_inline_data(values.data(), values.size() * sizeof(float));
  return tensor;
}

v1::Tensor Inline(const std::vector<int64_t>& shape, const std::vector<int32_t>& values) {
  v1::Tensor tensor;
  SetInlineShape(shape, v1::DATA_TYPE_INT32, &tensor);
  tensor.set_inline_data(values.data(), values.size() * sizeof(int32_t));
  return tensor;
}

v1::Tensor InSlice(const std::vector<int64_t>& shape, const v1::Slice& slice) {
  v1::Tensor tensor;
  SetInlineShape(shape, v1::DATA_TYPE_FLOAT32, &tensor);
  *tensor.mutable_slice() = slice;
  return tensor;
}

v1::TensorTarget InlineTarget() {
  v1::TensorTarget target;
  target.mutable_inline_();
  return target;
}

v1::TensorTarget SliceTarget(const v1::Slice& slice) {
  v1::TensorTarget target;
  *target.mutable_slice() = slice;
  return target;
}

Floats FloatsOf(const v1::Tensor& tensor) {
  Require(tensor.dtype() == v1::DATA_TYPE_FLOAT32, "a tensor of an fp32 stack has dtype ",
          v1::DataType_Name(tensor.dtype()));
  Require(tensor.has_inline_data(), "a tensor that was not asked into a slice has no inline_data");
  const std::vector<int64_t> shape(tensor.shape().begin(), tensor.shape().end());
  const size_t bytes = static_cast<size_t>(Elements(shape)) * sizeof(float);
  Require(tensor.inline_data().size() == bytes, "a tensor has ", tensor.inline_data().size(),
          " bytes; its shape takes ", bytes);
  Floats values(bytes / sizeof(float));
  std::memcpy(values.data(), tensor.inline_data().data(), bytes);
  return values;
}

std::string Bytes(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializeToCodedStream(&coded);
  }
  return bytes;
}

OwnSession::OwnSession(Daemon& daemon) : daemon_(daemon) {
  v1::CreateSessionRequest request;
  request.set_client_name("lamina conformance");
  id_ = daemon.Ok(request).session_id();
}

OwnSession::~OwnSession() {
  v1::DeleteSessionRequest request;
  request.set_session_id(id_);
  daemon_.Finally(request);
}

v1::Mutation OwnSession::Next() const {
  v1::Mutation mutation;
  mutation.set_session_id(id_);
  mutation.set_sequence(sequence());
  return mutation;
}

OwnStack::OwnStack(Daemon& daemon, const v1::StackConfig& config)
    : daemon_(daemon), name_(daemon.NewName()) {
  v1::CreateStackRequest request;
  request.set_name(name_);
  *request.mutable_config() = config;
  config_ = daemon.Ok(request).stack().config();
}

OwnStack::~OwnStack() {
  v1::DeleteStackRequest request;
  request.set_name(name_);
  daemon_.Finally(request);
}

v1::Stack OwnStack::Describe() const {
  v1::GetStackRequest request;
  request.set_name(name_);
  return daemon_.Ok(request).stack();
}

Rig::Rig(Daemon& of, const v1::StackConfig& config)
    : daemon(of),
      session(of),
      stack(of, config),
      shape(ActivationShape(config)),
      x(Inline(shape, Values(Elements(shape), 1))),
      dy(Inline(shape, Values(Elements(shape), 2))) {}

v1::ForwardRequest Rig::Evaluate() const { return Evaluate(x); }

v1::ForwardRequest Rig::Evaluate(const v1::Tensor& input) const {
  v1::ForwardRequest request;
  request.set_stack(stack.name());
  request.set_session_id(session.id());
  request.set_training(false);
  *request.mutable_input() = input;
  return request;
}

v1::ForwardRequest Rig::Train() const {
  v1::ForwardRequest request = Evaluate();
  request.set_training(true);
  *request.mutable_mutation() = session.Next();
  return request;
}

v1::BackwardRequest Rig::Backward(const std::string& context_id) const {
  v1::BackwardRequest request;
  request.set_stack(stack.name());
  *request.mutable_mutation() = session.Next();
  request.set_context_id(context_id);
  *request.mutable_output_grad() = dy;
  *request.mutable_input_grad() = InlineTarget();
  return request;
}

v1::ApplyGradientsRequest Rig::Apply(double learning_rate) const {
  v1::ApplyGradientsRequest request;
  request.set_stack(stack.name());
  *request.mutable_mutation() = session.Next();
  request.set_learning_rate(learning_rate);
  return request;
}

v1::ZeroGradientsRequest Rig::Zero() const {
  v1::ZeroGradientsRequest request;
  request.set_stack(stack.name());
  *request.mutable_mutation() = session.Next();
  return request;
}

v1::ReleaseContextRequest Rig::Release(const std::string& context_id) const {
  v1::ReleaseContextRequest request;
  request.set_stack(stack.name());
  request.set_session_id(session.id());
  request.set_context_id(context_id);
  return request;
}

v1::SetParametersRequest Rig::Set(const std::string& parameter, const v1::Tensor& values) const {
  v1::SetParametersRequest request;
  request.set_stack(stack.name());
  *request.mutable_mutation() = session.Next();
  v1::NamedTensor* named = request.add_tensors();
  named->set_name(parameter);
  *named->mutable_tensor() = values;
  return request;
}

v1::GetParametersRequest Rig::Parameters(const std::vector<std::string>& names) const {
  v1::GetParametersRequest request;
  request.set_stack(stack.name());
  for (const std::string& name : names) request.add_names(name);
  return request;
}

v1::GetGradientsRequest Rig::Gradients(const std::vector<std::string>& names) const {
  v1::GetGradientsRequest request;
  request.set_stack(stack.name());
  for (const std::string& name : names) request.add_names(name);
  return request;
}

StackState Rig::State() const {
  const v1::Stack now = stack.Describe();
  StackState state{.step = now.step(),
                   .skipped_steps = now.skipped_steps(),
                   .outstanding_contexts = now.outstanding_contexts(),
                   .forward_count = now.forward_count(),
                   .parameters = Bytes(daemon.Ok(Parameters()))};
  if (now.config().training()) state.gradients = Bytes(daemon.Ok(Gradients()));
  return state;
}

void Rig::RequireUnchanged(const StackState& before, const std::string& after_what) const {
  const StackState now = State();
  const auto same = [&](const char* what, const auto& a, const auto& b) {
    Require(a == b, after_what, " has changed the stack's ", what);
  };
  same("step", now.step, before.step);
  same("skipped_steps", now.skipped_steps, before.skipped_steps);
  same("outstanding_contexts", now.outstanding_contexts, before.outstanding_contexts);
  same("forward_count", now.forward_count, before.forward_count);
  same("parameters", now.parameters, before.parameters);
  same("gradients", now.gradients, before.gradients);
}

}  // namespace lamina::conformance
