// LayerService: each RPC's work, by slice and inline, and each status that the contract lists.
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "server/service/conversions.h"
#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

class LayerServiceTest : public ::testing::Test {
 protected:
  LayerServiceTest() { client.Create(); }

  // Nothing that a refused call may not change has changed.
  void ExpectUnchanged() {
    const v1::Stack now = client.Describe();
    EXPECT_EQ(now.SerializeAsString(), before.SerializeAsString());
    EXPECT_EQ(client.Parameters(), parameters);
    EXPECT_EQ(client.Parameters(true), gradients);
    EXPECT_TRUE(client.Send(client.EvalRequest()).ok()) << "it serves on";
  }
  void Remember() {
    before = client.Describe();
    parameters = client.Parameters();
    gradients = client.Parameters(true);
  }

  Service service;
  Client client{service.address()};
  v1::Stack before;
  std::string parameters, gradients;
};

TEST_F(LayerServiceTest, ForwardInEvaluation) {
  v1::ForwardRequest request = client.EvalRequest();
  const v1::ForwardResponse answer = client.Do(request);
  EXPECT_EQ(answer.output().inline_data().size(), kBytes);
  EXPECT_EQ(answer.output().dtype(), v1::DATA_TYPE_FLOAT32);
  ASSERT_EQ(answer.output().shape_size(), 3);
  EXPECT_EQ(answer.output().shape(2), kH);
  EXPECT_EQ(answer.context_id(), "");
  EXPECT_EQ(answer.input_transport(), v1::TRANSPORT_INLINE);
  EXPECT_EQ(answer.output_transport(), v1::TRANSPORT_INLINE);
  EXPECT_GT(answer.timing().compute_seconds(), 0);
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  request.mutable_output()->mutable_inline_();
  EXPECT_EQ(client.Do(request).output().SerializeAsString(), answer.output().SerializeAsString());
}

TEST_F(LayerServiceTest, SlicesGiveTheSameBitsAndTouchNothingElse) {
  const v1::ForwardRequest plain = client.EvalRequest();
  const v1::Tensor expected = client.Do(plain).output();
  const MappedRegion region = client.Region();
  std::memset(region.data, 0x5A, region.length);
  std::memcpy(region.data + 256, plain.input().inline_data().data(), kBytes);
  v1::ForwardRequest request = plain;
  *request.mutable_input() = SliceOf(region.id, 256);
  *request.mutable_output() = TargetOf(region.id, 256 + kBytes);
  const v1::ForwardResponse answer = client.Do(request);
  EXPECT_EQ(answer.input_transport(), v1::TRANSPORT_MEMFD);
  EXPECT_EQ(answer.output_transport(), v1::TRANSPORT_MEMFD);
  EXPECT_EQ(answer.output().slice().SerializeAsString(),
            request.output().slice().SerializeAsString());
  EXPECT_EQ(std::string(region.data + 256 + kBytes, kBytes), expected.inline_data());
  EXPECT_EQ(std::string(region.data + 256, kBytes), plain.input().inline_data());
  EXPECT_EQ(std::string(region.data, 256), std::string(256, 0x5A));
  const size_t rest = region.length - 256 - 2 * kBytes;
  EXPECT_EQ(std::string(region.data + 256 + 2 * kBytes, rest), std::string(rest, 0x5A));
}

TEST_F(LayerServiceTest, StagedAsOnACardTheBitsAreTheSame) {
  Service staged({.host_memory = false});
  Client other(staged.address());
  other.Create();
  const MappedRegion region = other.Region();
  v1::ForwardRequest request = other.TrainRequest();
  const v1::ForwardResponse expected = client.Do(client.TrainRequest());
  client.Took();
  std::memcpy(region.data, request.input().inline_data().data(), kBytes);
  *request.mutable_input() = SliceOf(region.id, 0);
  *request.mutable_output() = TargetOf(region.id, 4096);
  const std::string context = other.Do(request).context_id();
  other.Took();
  EXPECT_EQ(std::string(region.data + 4096, kBytes), expected.output().inline_data());
  v1::BackwardRequest backward = other.BackwardRequestFor(context);
  std::memcpy(region.data + 8192, backward.output_grad().inline_data().data(), kBytes);
  *backward.mutable_output_grad() = SliceOf(region.id, 8192);
  *backward.mutable_input_grad() = TargetOf(region.id, 12288);
  other.Do(backward);
  v1::BackwardRequest plain = client.BackwardRequestFor(expected.context_id());
  plain.mutable_input_grad()->mutable_inline_();
  EXPECT_EQ(client.Do(plain).input_grad().inline_data(), std::string(region.data + 12288, kBytes));
}

TEST_F(LayerServiceTest, ATrainingStep) {
  const v1::ForwardResponse forward = client.Do(client.TrainRequest());
  client.Took();
  EXPECT_NE(forward.context_id(), "");
  EXPECT_EQ(client.Describe().forward_count(), 1u);
  EXPECT_EQ(client.Describe().outstanding_contexts(), 1);
  EXPECT_EQ(client.Parameters(true), std::string(client.Parameters().size(), '\0'));

  v1::BackwardRequest request = client.BackwardRequestFor(forward.context_id());
  const v1::BackwardResponse unwanted = client.Do(request);
  client.Took();
  EXPECT_FALSE(unwanted.has_input_grad());
  EXPECT_EQ(unwanted.output_transport(), v1::TRANSPORT_UNSPECIFIED);
  const std::string once = client.Parameters(true);
  EXPECT_NE(once, std::string(once.size(), '\0'));
  EXPECT_EQ(client.Describe().outstanding_contexts(), 0);

  request = client.BackwardRequestFor(client.Train());
  *request.mutable_mutation() = client.Next();
  request.mutable_input_grad()->mutable_inline_();
  const v1::BackwardResponse wanted = client.Do(request);
  client.Took();
  EXPECT_EQ(wanted.input_grad().inline_data().size(), kBytes);
  EXPECT_EQ(wanted.input_transport(), v1::TRANSPORT_INLINE);
  EXPECT_EQ(wanted.output_transport(), v1::TRANSPORT_INLINE);

  const std::string weights = client.Parameters();
  const v1::ApplyGradientsResponse applied = client.Do(client.ApplyRequest());
  client.Took();
  EXPECT_TRUE(applied.applied());
  EXPECT_EQ(applied.step(), 1);
  EXPECT_GT(applied.grad_norm(), 0);
  EXPECT_NE(client.Parameters(), weights);
  client.Do(client.ZeroRequest());
  client.Took();
  EXPECT_EQ(client.Parameters(true), std::string(once.size(), '\0'));
}

TEST_F(LayerServiceTest, ReleaseContext) {
  v1::ReleaseContextRequest request;
  request.set_stack("s");
  request.set_session_id(client.session_id);
  request.set_context_id(client.Train());
  Client other(service.address());
  v1::ReleaseContextRequest foreign = request;
  foreign.set_session_id(other.session_id);
  EXPECT_THAT(other.Send(foreign), IsStatus(kNotFound, "context"));
  EXPECT_TRUE(client.Send(request).ok());
  EXPECT_EQ(client.Describe().outstanding_contexts(), 0);
  EXPECT_THAT(client.Send(request), IsStatus(kNotFound, "context"));
  request.set_stack("none");
  EXPECT_EQ(client.Send(request).code(), kNotFound);
}

TEST_F(LayerServiceTest, TrainingIsTheStacksOwnWhereTheRequestDoesNotSay) {
  v1::ForwardRequest request = client.TrainRequest();
  request.clear_training();
  EXPECT_NE(client.Do(request).context_id(), "");
  client.Took();
  request = client.EvalRequest();
  request.clear_training();
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "mutation"));

  v1::StackConfig evaluating = TinyProto();
  evaluating.set_training(false);
  client.Create("e", evaluating);
  request.set_stack("e");
  EXPECT_EQ(client.Do(request).context_id(), "");
  *request.mutable_mutation() = client.Next();
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "mutation: an evaluation"));
  EXPECT_EQ(client.Next().sequence(), 2u) << "it used no sequence up";
  client.Do(client.TrainRequest());
  request.clear_mutation();
  request.set_stack("none");
  EXPECT_THAT(client.Send(request), IsStatus(kNotFound, "none"));
}

TEST_F(LayerServiceTest, LayerRanges) {
  v1::ForwardRequest request = client.EvalRequest();
  const v1::Tensor whole = client.Do(request).output();
  request.mutable_layers()->set_begin(0);
  request.mutable_layers()->set_end(1);
  *request.mutable_input() = client.Do(request).output();
  request.mutable_layers()->set_begin(1);
  request.mutable_layers()->set_end(2);
  EXPECT_EQ(client.Do(request).output().inline_data(), whole.inline_data());
  Remember();
  for (const auto& [begin, end] :
       std::vector<std::pair<int64_t, int64_t>>{{0, 0}, {1, 1}, {2, 1}, {0, 3}, {-1, 1}, {2, 3}}) {
    request.mutable_layers()->set_begin(begin);
    request.mutable_layers()->set_end(end);
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "layers"));
  }
  ExpectUnchanged();
}

TEST_F(LayerServiceTest, MaskAndLengthsAgree) {
  v1::ForwardRequest masked = client.EvalRequest(), counted = client.EvalRequest();
  const int32_t lengths[kB] = {3, 8, 1};
  v1::Tensor* t = counted.mutable_lengths();
  t->set_dtype(v1::DATA_TYPE_INT32);
  t->add_shape(kB);
  t->set_inline_data(lengths, sizeof(lengths));
  float mask[kB][kS];
  for (int b = 0; b < kB; ++b)
    for (int s = 0; s < kS; ++s)
      mask[b][s] = s < lengths[b] ? 0.0f : -std::numeric_limits<float>::infinity();
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{kB, 1, 1, kS}, {kB, kS}}) {
    *masked.mutable_mask() = InlineNoise(1, shape);
    masked.mutable_mask()->set_inline_data(mask, sizeof(mask));
    const std::string a = client.Do(masked).output().inline_data();
    const std::string b = client.Do(counted).output().inline_data();
    EXPECT_NE(a, client.Do(client.EvalRequest()).output().inline_data());
    for (size_t i = 0; i < kBytes; i += 4) {
      float x = 0, y = 0;
      std::memcpy(&x, a.data() + i, 4);
      std::memcpy(&y, b.data() + i, 4);
      ASSERT_NEAR(x, y, 1e-5);
    }
  }
}

TEST_F(LayerServiceTest, APackedStepIsItsSequencesSteps) {
  constexpr int64_t kTokens = 11;
  const std::vector<int32_t> cumulative = {0, 8, 9, 11};
  const MappedRegion region = client.Region();
  constexpr size_t kRow = kH * sizeof(float);
  v1::ForwardRequest packed = client.TrainRequest();
  *packed.mutable_input() = InlineNoise(1, {kTokens, kH});
  *packed.mutable_cumulative_lengths() = InlineIntegers(cumulative);
  *packed.mutable_output() = TargetOf(region.id, 0, kTokens * kRow);
  const v1::ForwardResponse answer = client.Do(packed);
  client.Took();
  EXPECT_EQ(answer.attention_path(), v1::ATTENTION_PATH_FUSED) << "all that the CPU has";
  EXPECT_EQ(AttentionPathOf({.fused_attention = false}), v1::ATTENTION_PATH_PLAIN);
  EXPECT_THAT(answer.output().shape(), ::testing::ElementsAre(kTokens, kH));
  v1::BackwardRequest backward = client.BackwardRequestFor(answer.context_id());
  *backward.mutable_output_grad() = InlineNoise(2, {kTokens, kH});
  backward.mutable_input_grad()->mutable_inline_();
  const v1::BackwardResponse back = client.Do(backward);
  client.Took();
  EXPECT_THAT(back.input_grad().shape(), ::testing::ElementsAre(kTokens, kH));
  const std::string packed_gradients = client.Parameters(true);
  client.Do(client.ZeroRequest());
  client.Took();

  std::string output, input_grad;
  for (size_t i = 0; i + 1 < cumulative.size(); ++i) {
    const size_t begin = static_cast<size_t>(cumulative[i]) * kRow;
    const int64_t length = cumulative[i + 1] - cumulative[i];
    const size_t bytes = static_cast<size_t>(length) * kRow;
    v1::ForwardRequest one = client.TrainRequest();
    *one.mutable_input() = InlineNoise(1, {1, length, kH});
    one.mutable_input()->set_inline_data(packed.input().inline_data().substr(begin, bytes));
    const v1::ForwardResponse forward = client.Do(one);
    client.Took();
    output += forward.output().inline_data();
    v1::BackwardRequest its = client.BackwardRequestFor(forward.context_id());
    *its.mutable_output_grad() = InlineNoise(2, {1, length, kH});
    its.mutable_output_grad()->set_inline_data(
        backward.output_grad().inline_data().substr(begin, bytes));
    its.mutable_input_grad()->mutable_inline_();
    input_grad += client.Do(its).input_grad().inline_data();
    client.Took();
  }
  const auto error = [](const std::string& a, const std::string& b) {
    return RelativeError(ToDoubles(a, DType::kF32), ToDoubles(b, DType::kF32));
  };
  // fp32 sums in another order.
  EXPECT_LT(error(std::string(region.data, kTokens * kRow), output), 2e-6);
  EXPECT_LT(error(back.input_grad().inline_data(), input_grad), 2e-6);
  EXPECT_LT(error(packed_gradients, client.Parameters(true)), 2e-6);
}

TEST_F(LayerServiceTest, PackedBatchesAreChecked) {
  Remember();
  const MappedRegion region = client.Region(16384);
  const auto with = [&](auto change) {
    v1::ForwardRequest request = client.TrainRequest();
    *request.mutable_input() = InlineNoise(1, {11, kH});
    *request.mutable_cumulative_lengths() = InlineIntegers({0, 8, 11});
    change(request);
    return client.Send(request);
  };
  using R = v1::ForwardRequest;
  const auto lengths = [&](const std::vector<int32_t>& values) {
    return with([&](R& r) { *r.mutable_cumulative_lengths() = InlineIntegers(values); });
  };
  EXPECT_THAT(lengths({0, 8, 7, 11}),
              IsStatus(kInvalid, "cumulative_lengths[2]: is 7; it must be in 9..16"));
  EXPECT_THAT(lengths({0, 8, 8, 11}), IsStatus(kInvalid, "cumulative_lengths[2]: is 8"));
  EXPECT_THAT(lengths({0, 9, 11}),
              IsStatus(kInvalid, "cumulative_lengths[1]: is 9; it must be in 1..8"));
  EXPECT_THAT(lengths({0, 8, 10}),
              IsStatus(kInvalid, "cumulative_lengths[2]: is 10; the last must be 11"));
  EXPECT_THAT(lengths({2, 8, 11}), IsStatus(kInvalid, "cumulative_lengths[0]: is 2"));
  EXPECT_THAT(lengths({0}), IsStatus(kInvalid, "cumulative_lengths.shape"));
  EXPECT_THAT(lengths(std::vector<int32_t>(13, 0)), IsStatus(kInvalid, "cumulative_lengths.shape"));
  EXPECT_THAT(with([](R& r) { *r.mutable_cumulative_lengths() = InlineNoise(1, {3}); }),
              IsStatus(kInvalid, "cumulative_lengths.dtype"));
  EXPECT_THAT(with([](R& r) { r.mutable_cumulative_lengths()->clear_inline_data(); }),
              IsStatus(kInvalid, "cumulative_lengths"));
  EXPECT_THAT(with([&](R& r) {
                *r.mutable_cumulative_lengths() = SliceOf("none", 0, 12, {3});
                r.mutable_cumulative_lengths()->set_dtype(v1::DATA_TYPE_INT32);
              }),
              IsStatus(kNotFound, "cumulative_lengths.slice.region_id"));
  EXPECT_THAT(with([](R& r) {
                *r.mutable_input() = InlineNoise(1, {1, 8, kH});
              }),
              IsStatus(kInvalid, "input.shape: is [1, 8, 16]; with cumulative_lengths"));
  EXPECT_THAT(with([](R& r) {
                *r.mutable_input() = InlineNoise(1, {kB * kS + 1, kH});
              }),
              IsStatus(kInvalid, "T in 1..24"));
  EXPECT_THAT(with([](R& r) { r.clear_cumulative_lengths(); }), IsStatus(kInvalid, "input.shape"));
  EXPECT_THAT(with([&](R& r) {
                const int32_t values[] = {0, 8, 11};
                std::memcpy(region.data + 64, values, sizeof(values));
                *r.mutable_cumulative_lengths() = SliceOf(region.id, 64, 12, {3});
                r.mutable_cumulative_lengths()->set_dtype(v1::DATA_TYPE_INT32);
                *r.mutable_output() = TargetOf(region.id, 0, 11 * kH * 4);
              }),
              IsStatus(kInvalid, "output: overlaps cumulative_lengths"));
  ExpectUnchanged();
  EXPECT_TRUE(with([](R&) {}).ok());
}

TEST_F(LayerServiceTest, ForwardRefusesWhatDoesNotFit) {
  Remember();
  const MappedRegion region = client.Region(16384);
  const auto with = [&](auto change) {
    v1::ForwardRequest request = client.TrainRequest();
    change(request);
    return client.Send(request);
  };
  using R = v1::ForwardRequest;
  // The input.
  EXPECT_THAT(with([](R& r) { r.clear_input(); }), IsStatus(kInvalid, "input.dtype"));
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
           {kB + 1, kS, kH}, {kB, kS + 1, kH}, {kB, kS, kH + 1}, {kB * kS, kH}, {kB, kS, 4, 4}}) {
    EXPECT_THAT(with([&](R& r) { *r.mutable_input() = InlineNoise(1, shape); }),
                IsStatus(kInvalid, "input"));
  }
  EXPECT_THAT(with([](R& r) { r.mutable_input()->set_dtype(v1::DATA_TYPE_INT32); }),
              IsStatus(kInvalid, "input"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_input() = SliceOf(region.id, 16384 - kBytes + 4); }),
              IsStatus(kInvalid, "input.slice"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_input() = SliceOf(region.id, 2); }),
              IsStatus(kInvalid, "input.slice.offset_bytes"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_input() = SliceOf(region.id, 0, kBytes - 4); }),
              IsStatus(kInvalid, "input.slice.size_bytes"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_input() = SliceOf("none", 0); }),
              IsStatus(kNotFound, "input.slice.region_id"));
  // The mask and the lengths.
  for (const std::vector<int64_t>& shape :
       std::vector<std::vector<int64_t>>{{kB, kS + 1}, {kB, kS, 1}, {kB - 1, kS}, {kB * kS}}) {
    EXPECT_THAT(with([&](R& r) { *r.mutable_mask() = InlineNoise(1, shape); }),
                IsStatus(kInvalid, "mask"));
  }
  EXPECT_THAT(with([&](R& r) { *r.mutable_lengths() = InlineNoise(1, {kB}); }),
              IsStatus(kInvalid, "lengths"));
  for (const int32_t bad : {0, -1, 9, std::numeric_limits<int32_t>::min()}) {
    const int32_t lengths[kB] = {8, bad, 8};
    EXPECT_THAT(with([&](R& r) {
                  *r.mutable_lengths() = InlineNoise(1, {kB});
                  r.mutable_lengths()->set_dtype(v1::DATA_TYPE_INT32);
                  r.mutable_lengths()->set_inline_data(lengths, sizeof(lengths));
                }),
                IsStatus(kInvalid, "lengths"));
  }
  // The output.
  EXPECT_THAT(with([&](R& r) { *r.mutable_output() = TargetOf(region.id, 0, kBytes + 4); }),
              IsStatus(kInvalid, "output.slice.size_bytes"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_output() = TargetOf(region.id, 16384); }),
              IsStatus(kInvalid, "output.slice"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_output() = TargetOf("none", 0); }),
              IsStatus(kNotFound, "output.slice.region_id"));
  EXPECT_THAT(with([&](R& r) {
                *r.mutable_input() = SliceOf(region.id, 0);
                *r.mutable_output() = TargetOf(region.id, kBytes - 4);
              }),
              IsStatus(kInvalid, "output: overlaps input"));
  // The stack.
  EXPECT_THAT(with([](R& r) { r.set_stack("none"); }), IsStatus(kNotFound, "none"));
  EXPECT_EQ(client.Do(client.TrainRequest()).output().inline_data().size(), kBytes)
      << "none of these used the sequence up";
  client.Took();
  before.set_forward_count(1);
  before.set_outstanding_contexts(1);
  ExpectUnchanged();
}

TEST_F(LayerServiceTest, TrainingAskedOfAStackThatDoesNotTrain) {
  v1::StackConfig config = TinyProto();
  config.set_training(false);
  client.Create("e", config);
  v1::ForwardRequest forward = client.TrainRequest();
  forward.set_stack("e");
  EXPECT_THAT(client.Send(forward), IsStatus(kPrecondition, "training"));
  v1::ApplyGradientsRequest apply = client.ApplyRequest();
  apply.set_stack("e");
  EXPECT_THAT(client.Send(apply), IsStatus(kPrecondition, "training"));
  v1::ZeroGradientsRequest zero = client.ZeroRequest();
  zero.set_stack("e");
  EXPECT_THAT(client.Send(zero), IsStatus(kPrecondition, "training"));
}

TEST_F(LayerServiceTest, ContextsRunOutWithTheNumbers) {
  client.Train();
  client.Train();
  Remember();
  EXPECT_THAT(client.Send(client.TrainRequest()), IsStatus(kExhausted, "bytes"));
  ExpectUnchanged();
}

TEST_F(LayerServiceTest, BackwardRefusesWhatDoesNotFit) {
  EXPECT_THAT(client.Send(client.BackwardRequestFor("none")), IsStatus(kPrecondition, "Forward"))
      << "there was none yet";
  const std::string context = client.Train();
  Remember();
  EXPECT_THAT(client.Send(client.BackwardRequestFor("none")), IsStatus(kNotFound, "context"));
  const MappedRegion region = client.Region(16384);
  const auto with = [&](auto change) {
    v1::BackwardRequest request = client.BackwardRequestFor(context);
    change(request);
    return client.Send(request);
  };
  using R = v1::BackwardRequest;
  EXPECT_THAT(with([](R& r) { r.clear_output_grad(); }), IsStatus(kInvalid, "output_grad.dtype"));
  EXPECT_THAT(with([](R& r) {
                *r.mutable_output_grad() = InlineNoise(1, {kB, kS - 1, kH});
              }),
              IsStatus(kInvalid, "output_grad"));
  EXPECT_THAT(with([](R& r) { r.mutable_output_grad()->set_dtype(v1::DATA_TYPE_INT32); }),
              IsStatus(kInvalid, "output_grad"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_output_grad() = SliceOf(region.id, 16384); }),
              IsStatus(kInvalid, "output_grad.slice"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_output_grad() = SliceOf("none", 0); }),
              IsStatus(kNotFound, "output_grad.slice.region_id"));
  EXPECT_THAT(with([&](R& r) { *r.mutable_input_grad() = TargetOf(region.id, 1); }),
              IsStatus(kInvalid, "input_grad.slice.offset_bytes"));
  EXPECT_THAT(with([&](R& r) {
                *r.mutable_output_grad() = SliceOf(region.id, 0);
                *r.mutable_input_grad() = TargetOf(region.id, 0);
              }),
              IsStatus(kInvalid, "input_grad: overlaps"));
  EXPECT_THAT(with([](R& r) { r.set_stack("none"); }), IsStatus(kNotFound, ""));
  Client other(service.address());
  other.Train();
  v1::BackwardRequest foreign = other.BackwardRequestFor(context);
  EXPECT_THAT(other.Send(foreign), IsStatus(kNotFound, "context"));
  before.set_forward_count(2);
  before.set_outstanding_contexts(2);
  ExpectUnchanged();
  client.Back(context);
  EXPECT_THAT(client.Send(client.BackwardRequestFor(context)), IsStatus(kNotFound, "context"))
      << "it was spent";
}

TEST_F(LayerServiceTest, ContextsOfADeletedStack) {
  const std::string context = client.Train();
  v1::DeleteStackRequest request;
  request.set_name("s");
  client.Do(request);
  EXPECT_THAT(client.Send(client.BackwardRequestFor(context)), IsStatus(kPrecondition, "deleted"));
  EXPECT_THAT(client.Send(client.EvalRequest()), IsStatus(kNotFound, "s"));
  EXPECT_THAT(client.Send(client.ApplyRequest()), IsStatus(kNotFound, "s"));
  EXPECT_THAT(client.Send(client.ZeroRequest()), IsStatus(kNotFound, "s"));
}

TEST_F(LayerServiceTest, ApplyGradientsNamesTheFieldAndItsValue) {
  client.Back(client.Train());
  Remember();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const auto refused = [&](const char* field, auto set, std::vector<double> values) {
    for (const double value : values) {
      v1::ApplyGradientsRequest request = client.ApplyRequest();
      (request.*set)(value);
      EXPECT_THAT(client.Send(request), IsStatus(kInvalid, field)) << value;
    }
  };
  using R = v1::ApplyGradientsRequest;
  refused("learning_rate", &R::set_learning_rate, {-1e-9, nan, inf});
  refused("beta1", &R::set_beta1, {1, -0.1, nan});
  refused("beta2", &R::set_beta2, {1, -0.1, nan});
  refused("epsilon", &R::set_epsilon, {0, -1, nan});
  refused("weight_decay", &R::set_weight_decay, {-0.1, nan, inf});
  refused("max_grad_norm", &R::set_max_grad_norm, {-1, nan});
  refused("loss_scale", &R::set_loss_scale, {0, -1, nan, inf});
  const auto lamb = [&](const char* field, double low, double high) {
    v1::ApplyGradientsRequest request = client.ApplyRequest();
    request.set_optimizer(v1::OPTIMIZER_KIND_LAMB);
    request.set_min_trust_ratio(low);
    request.set_max_trust_ratio(high);
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, field)) << low << " " << high;
  };
  lamb("min_trust_ratio", -1, 1);
  lamb("min_trust_ratio", nan, 1);
  lamb("max_trust_ratio", 0, 0);
  lamb("max_trust_ratio", 2, 1);
  lamb("max_trust_ratio", 0, nan);
  v1::ApplyGradientsRequest request = client.ApplyRequest();
  request.set_optimizer(static_cast<v1::OptimizerKind>(7));
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "optimizer: 7"));
  // LAMB's settings say nothing to AdamW.
  request = client.ApplyRequest();
  request.set_adapt_biases_and_norms(true);
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "adapt_biases_and_norms: is LAMB's"));
  request = client.ApplyRequest();
  request.set_min_trust_ratio(0.5);
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "min_trust_ratio: is LAMB's"));
  request = client.ApplyRequest();
  request.set_optimizer(v1::OPTIMIZER_KIND_ADAMW);
  request.set_max_trust_ratio(2);
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "max_trust_ratio: is LAMB's"));
  ExpectUnchanged();
}

TEST_F(LayerServiceTest, LambWithoutTrustRatiosIsAdamW) {
  const auto step = [&](auto change) {
    v1::DeleteStackRequest remove;
    remove.set_name("s");
    client.Do(remove);
    client.Create();
    client.Back(client.Train());
    v1::ApplyGradientsRequest request = client.ApplyRequest();
    request.set_weight_decay(0.1);
    change(request);
    EXPECT_TRUE(client.Do(request).applied());
    client.Took();
    return ToDoubles(client.Parameters(), DType::kF32);
  };
  using R = v1::ApplyGradientsRequest;
  const std::vector<double> adamw = step([](R&) {});
  const auto lamb = [](double low, double high) {
    return [=](R& request) {
      request.set_optimizer(v1::OPTIMIZER_KIND_LAMB);
      request.set_min_trust_ratio(low);
      request.set_max_trust_ratio(high);
    };
  };
  EXPECT_LT(RelativeError(step(lamb(1, 1)), adamw), 1e-6) << "every ratio is 1";
  EXPECT_GT(RelativeError(step(lamb(0, 1e9)), adamw), 1e-3);
}

TEST_F(LayerServiceTest, ADynamicLossScaleIsToldAndRepeatedAsItWas) {
  v1::DeleteStackRequest remove;
  remove.set_name("s");
  client.Do(remove);
  v1::StackConfig config = TinyProto();
  config.set_dynamic_loss_scale(true);
  config.set_initial_loss_scale(256);
  config.set_loss_scale_growth_interval(1);
  config.set_loss_scale_hysteresis(1);
  client.Create("s", config);
  EXPECT_EQ(client.Describe().loss_scale(), 256);
  client.Back(client.Train());
  v1::ApplyGradientsRequest apply = client.ApplyRequest();
  const v1::ApplyGradientsResponse grown = client.Do(apply);
  EXPECT_TRUE(grown.applied());
  EXPECT_EQ(grown.loss_scale(), 256);
  EXPECT_EQ(grown.next_loss_scale(), 512);
  EXPECT_EQ(client.Do(apply).SerializeAsString(), grown.SerializeAsString());
  client.Took();
  EXPECT_EQ(client.Describe().loss_scale(), 512) << "a repeat grows nothing";

  v1::BackwardRequest overflow = client.BackwardRequestFor(client.Train());
  *overflow.mutable_mutation() = client.Next();
  const float inf = std::numeric_limits<float>::infinity();
  overflow.mutable_output_grad()->mutable_inline_data()->replace(
      0, sizeof(inf), std::string(reinterpret_cast<const char*>(&inf), sizeof(inf)));
  client.Do(overflow);
  client.Took();
  const std::string weights = client.Parameters();
  apply = client.ApplyRequest();
  const v1::ApplyGradientsResponse skipped = client.Do(apply);
  EXPECT_FALSE(skipped.applied());
  EXPECT_EQ(skipped.loss_scale(), 512);
  EXPECT_EQ(skipped.next_loss_scale(), 256);
  EXPECT_EQ(client.Do(apply).SerializeAsString(), skipped.SerializeAsString());
  EXPECT_EQ(client.Describe().loss_scale(), 256);
  EXPECT_EQ(client.Describe().skipped_steps(), 1);
  EXPECT_EQ(client.Parameters(), weights);
  EXPECT_EQ(service.Metric("lamina_loss_scale"), 256);
}

TEST_F(LayerServiceTest, AGradientThatIsNotFiniteSkipsTheStep) {
  v1::BackwardRequest request = client.BackwardRequestFor(client.Train());
  *request.mutable_mutation() = client.Next();
  const float inf = std::numeric_limits<float>::infinity();
  request.mutable_output_grad()->mutable_inline_data()->replace(
      0, sizeof(inf), std::string(reinterpret_cast<const char*>(&inf), sizeof(inf)));
  client.Do(request);
  client.Took();
  const std::string weights = client.Parameters();
  v1::ApplyGradientsRequest apply = client.ApplyRequest();
  apply.set_zero_gradients(true);
  const v1::ApplyGradientsResponse answer = client.Do(apply);
  client.Took();
  EXPECT_FALSE(answer.applied());
  EXPECT_EQ(answer.step(), 0);
  EXPECT_EQ(client.Parameters(), weights);
  EXPECT_EQ(client.Describe().skipped_steps(), 1);
  EXPECT_EQ(client.Parameters(true), std::string(weights.size(), '\0'));
}

}  // namespace
}  // namespace lamina::testing
