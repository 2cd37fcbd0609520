// Inputs that are copied ahead of their calls' turn, on a device with memory of its own: a train of
// calls gives what single calls give, whatever comes between.
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tests/server/service/ahead_rig.h"

namespace lamina::testing {
namespace {

TEST_F(AheadTest, ATrainGivesWhatSingleCallsGive) {
  std::vector<v1::ExecuteRequest> calls;
  for (int i = 0; i < kCalls; ++i) calls.push_back(Item(Slice(At(i))));
  const int64_t copies = service.backend().host_copies;
  const std::vector<v1::ExecuteResponse> answers = Train(calls);
  for (size_t i = 0; i < kCalls; ++i)
    EXPECT_EQ(answers[i].forward().output().inline_data(), expected[i]) << i;
  EXPECT_EQ(service.backend().ahead_copies, kCalls - 2) << "all but the held one and its next";
  EXPECT_EQ(service.backend().ahead_taken, kCalls - 2);
  EXPECT_EQ(service.backend().host_copies - copies, 2 + kCalls) << "two inputs, all outputs";
}

TEST_F(AheadTest, AnInputThatIsTheResultBeforeItIsNotReadTooEarly) {
  std::vector<v1::ExecuteRequest> calls;
  std::memset(region.data + At(1), 0xFF, kBytes * 2);
  for (int i = 0; i < 4; ++i) {
    v1::ForwardRequest request = Slice(i == 0 ? At(0) : At(i) + (i - 1) * 16);
    if (i < 3) *request.mutable_output() = TargetOf(region.id, At(i + 1) + i * 16);
    calls.push_back(Item(request));
  }
  const std::vector<v1::ExecuteResponse> answers = Train(calls);
  std::string value = inputs[0];
  for (int i = 0; i < 4; ++i) {
    v1::ForwardRequest request = client.EvalRequest();
    request.mutable_input()->set_inline_data(value);
    value = client.Do(request).output().inline_data();
  }
  EXPECT_EQ(answers.back().forward().output().inline_data(), value);
  EXPECT_EQ(service.backend().ahead_copies, 0);
}

TEST_F(AheadTest, TrainingStepsGiveTheSameGradients) {
  v1::StackConfig config = TinyProto();
  config.set_hidden_dropout_ratio(0.1);
  client.Create("s2", config);
  const std::string dy = client.BackwardRequestFor("").output_grad().inline_data();
  std::memcpy(region.data + At(4), dy.data(), kBytes);
  std::vector<v1::ExecuteRequest> calls;
  Client other(service.address());
  std::string reference;
  for (int i = 0; i < 3; ++i) {
    v1::ForwardRequest forward = Slice(At(i));
    forward.set_stack("s2");
    forward.set_training(true);
    *forward.mutable_mutation() = client.Next();
    client.Took();
    calls.push_back(Item(forward));
    v1::ExecuteRequest item;
    *item.mutable_backward() = client.BackwardRequestFor("");
    client.Took();
    item.mutable_backward()->set_stack("s2");
    *item.mutable_backward()->mutable_output_grad() = SliceOf(region.id, At(4));
    *item.mutable_backward()->mutable_input_grad() = TargetOf(region.id, 32768);
    item.set_context_of(calls.size());
    calls.push_back(item);
  }
  for (const v1::ExecuteResponse& answer : Train(calls))
    EXPECT_EQ(answer.code(), 0) << answer.message();
  EXPECT_GE(service.backend().ahead_taken, 4);
  v1::GetGradientsRequest get;
  get.set_stack("s2");
  const std::string ahead = client.Do(get).SerializeAsString();
  v1::DeleteStackRequest remove;
  remove.set_name("s2");
  client.Do(remove);
  other.Create("s2", config);
  for (int i = 0; i < 3; ++i) {
    v1::ForwardRequest forward = other.TrainRequest(static_cast<uint64_t>(i) + 1);
    forward.set_stack("s2");
    const std::string context = other.Do(forward).context_id();
    other.Took();
    v1::BackwardRequest backward = other.BackwardRequestFor(context);
    backward.set_stack("s2");
    other.Do(backward);
    other.Took();
  }
  EXPECT_EQ(other.Do(get).SerializeAsString(), ahead);
}

TEST_F(AheadTest, WhatComesBetweenDoesNotGetIt) {
  std::vector<v1::ExecuteRequest> calls;
  for (int i = 0; i < kCalls; ++i) calls.push_back(Item(Slice(At(i))));
  // Another session's call waits for the device already: it runs between the first two of ours.
  Client other(service.address());
  v1::ForwardRequest theirs = other.EvalRequest(3);
  std::thread call;
  const std::vector<v1::ExecuteResponse> answers = Train(calls, [&] {
    call = std::thread([&] {
      for (int i = 0; i < 3; ++i) EXPECT_EQ(other.Do(theirs).output().inline_data(), expected[2]);
    });
  });
  call.join();
  for (size_t i = 0; i < kCalls; ++i)
    EXPECT_EQ(answers[i].forward().output().inline_data(), expected[i]) << i;
}

TEST_F(AheadTest, ACallThatIsRefusedLeavesNothingToItsNext) {
  std::vector<v1::ExecuteRequest> calls;
  for (int i = 0; i < kCalls; ++i) calls.push_back(Item(Slice(At(i))));
  calls[2].mutable_forward()->mutable_layers()->set_begin(1);  // to 0
  calls[3].mutable_forward()->set_stack("nothing");
  const std::vector<v1::ExecuteResponse> answers = Train(calls);
  EXPECT_EQ(answers[1].forward().output().inline_data(), expected[1]);
  EXPECT_EQ(answers[2].code(), static_cast<int>(kInvalid));
  EXPECT_EQ(answers[3].code(), static_cast<int>(kNotFound));
  EXPECT_EQ(answers[4].forward().output().inline_data(), expected[4]);
}

TEST_F(AheadTest, TheSlicesOfTheNextAreCheckedAsEver) {
  std::vector<v1::ExecuteRequest> calls = {Item(Slice(At(0))), Item(Slice(At(1))),
                                           Item(Slice(region.length)), Item(Slice(At(3)))};
  const std::vector<v1::ExecuteResponse> answers = Train(calls);
  EXPECT_EQ(answers[2].code(), static_cast<int>(kInvalid));
  EXPECT_EQ(answers[3].forward().output().inline_data(), expected[3]);
}

TEST_F(AheadTest, AReleasedRegionDoesNotLinger) {
  std::vector<v1::ExecuteRequest> calls = {Item(Slice(At(0))), Item(Slice(At(1))),
                                           Item(Slice(At(2)))};
  Train(calls);
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(region.id);
  client.Do(release);
  EXPECT_EQ(service.sessions().live_regions(), 0);
}

}  // namespace
}  // namespace lamina::testing
