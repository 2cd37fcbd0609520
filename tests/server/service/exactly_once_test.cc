// Mutations over RPC: a repeat is answered and not run, whatever happened in between.
#include <functional>
#include <thread>

#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

class ExactlyOnceTest : public ::testing::Test {
 protected:
  ExactlyOnceTest() { client.Create(); }

  Service service;
  Client client{service.address()};
};

TEST_F(ExactlyOnceTest, EveryMutationIsAnsweredTwiceAndRunOnce) {
  const v1::ForwardRequest forward = client.TrainRequest();
  const v1::ForwardResponse forwarded = client.Do(forward);
  EXPECT_EQ(client.Do(forward).SerializeAsString(), forwarded.SerializeAsString());
  client.Took();
  EXPECT_EQ(client.Describe().forward_count(), 1u);
  EXPECT_EQ(client.Describe().outstanding_contexts(), 1);

  v1::BackwardRequest backward = client.BackwardRequestFor(forwarded.context_id());
  backward.mutable_input_grad()->mutable_inline_();
  const v1::BackwardResponse answer = client.Do(backward);
  const std::string gradients = client.Parameters(true);
  EXPECT_EQ(client.Do(backward).SerializeAsString(), answer.SerializeAsString());
  client.Took();
  EXPECT_EQ(client.Parameters(true), gradients);

  const v1::ApplyGradientsRequest apply = client.ApplyRequest();
  const v1::ApplyGradientsResponse applied = client.Do(apply);
  const std::string weights = client.Parameters();
  EXPECT_EQ(client.Do(apply).SerializeAsString(), applied.SerializeAsString());
  client.Took();
  EXPECT_EQ(client.Parameters(), weights);
  EXPECT_EQ(client.Describe().step(), 1);

  const v1::SetParametersRequest set = client.SetRequest();
  client.Do(set);
  client.Took();
  client.Back(client.Train());
  const std::string before = client.Parameters(true);
  client.Do(client.ZeroRequest());
  client.Took();
  client.Back(client.Train());
  v1::ZeroGradientsRequest old = client.ZeroRequest();
  old.mutable_mutation()->set_sequence(7);
  EXPECT_TRUE(client.Send(old).ok()) << "a repeat";
  EXPECT_NE(client.Parameters(true), std::string(before.size(), '\0')) << "it zeroed nothing";
}

TEST_F(ExactlyOnceTest, ARepeatIsAnsweredThoughTheWorldHasChanged) {
  v1::ForwardRequest request = client.TrainRequest();
  request.clear_training();  // as the stack says
  const MappedRegion region = client.Region();
  *request.mutable_output() = TargetOf(region.id, 0);
  const v1::ForwardResponse first = client.Do(request);
  client.Took();
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(region.id);
  client.Do(release);
  EXPECT_EQ(client.Do(request).SerializeAsString(), first.SerializeAsString());
  client.Back(first.context_id());
  v1::UpdateStackRequest update;
  update.set_name("s");
  update.set_training(false);
  client.Do(update);
  EXPECT_EQ(client.Do(request).SerializeAsString(), first.SerializeAsString());
  v1::DeleteStackRequest remove;
  remove.set_name("s");
  client.Do(remove);
  EXPECT_EQ(client.Do(request).SerializeAsString(), first.SerializeAsString());
}

TEST_F(ExactlyOnceTest, OtherBodiesGapsAndMissingSequences) {
  client.Train(1);
  const v1::Stack before = client.Describe();
  v1::ForwardRequest other = client.TrainRequest(5);
  other.mutable_mutation()->set_sequence(1);
  EXPECT_THAT(client.Send(other), IsStatus(kExists, "mutation.sequence: 1"));
  v1::ZeroGradientsRequest zero = client.ZeroRequest();
  zero.mutable_mutation()->set_sequence(1);
  EXPECT_THAT(client.Send(zero), IsStatus(kExists, "mutation.sequence: 1"));

  // Each mutation, beyond the next, with sequence 0 and without one.
  const auto each = [&](auto request) {
    request.mutable_mutation()->set_sequence(3);
    EXPECT_THAT(client.Send(request), IsStatus(kPrecondition, "the next is 2"));
    request.mutable_mutation()->set_sequence(0);
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "mutation.sequence: 0"));
    request.clear_mutation();
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "mutation: is needed"));
  };
  each(client.TrainRequest());
  each(client.BackwardRequestFor("c"));
  each(client.ApplyRequest());
  each(client.ZeroRequest());
  each(client.SetRequest());

  v1::ForwardRequest mixed = client.TrainRequest();
  mixed.mutable_mutation()->set_session_id(Client(service.address()).session_id);
  EXPECT_THAT(client.Send(mixed), IsStatus(kInvalid, "mutation.session_id"));
  EXPECT_EQ(client.Describe().SerializeAsString(), before.SerializeAsString());
}

TEST_F(ExactlyOnceTest, AFailureUsesNoSequenceUp) {
  v1::ForwardRequest bad = client.TrainRequest();
  *bad.mutable_input() = InlineNoise(1, {1, 1, 1});
  EXPECT_EQ(client.Send(bad).code(), kInvalid);
  EXPECT_EQ(client.Send(bad).code(), kInvalid) << "a failure is not replayed, it is run again";
  client.Train();
  client.Train();
  EXPECT_EQ(client.Send(client.TrainRequest()).code(), kExhausted);
  client.Do(client.ZeroRequest());
}

TEST_F(ExactlyOnceTest, OnlyTheWindowIsKept) {
  std::vector<v1::ZeroGradientsRequest> requests;
  for (int i = 0; i < MutationLog::kReplayWindow + 2; ++i) {
    requests.push_back(client.ZeroRequest());
    client.Do(requests.back());
    client.Took();
  }
  EXPECT_TRUE(client.Send(requests[2]).ok());
  EXPECT_THAT(client.Send(requests[1]), IsStatus(kExists, "no longer kept"));
}

TEST_F(ExactlyOnceTest, SessionsCountForThemselves) {
  Client other(service.address());
  const std::string mine = client.Train(), theirs = other.Train();
  EXPECT_NE(mine, theirs);
  EXPECT_THAT(client.Send(client.BackwardRequestFor(theirs)), IsStatus(kNotFound, "context"));
  other.Back(theirs);
  client.Back(mine);
}

TEST_F(ExactlyOnceTest, RepeatsThatCrossRunOnce) {
  const v1::ForwardRequest request = client.TrainRequest();
  std::vector<std::string> answers(8);
  std::vector<std::thread> threads;
  for (std::string& answer : answers) {
    threads.emplace_back([&] { answer = client.Do(request).SerializeAsString(); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& answer : answers) EXPECT_EQ(answer, answers[0]);
  EXPECT_EQ(client.Describe().forward_count(), 1u);
}

TEST_F(ExactlyOnceTest, MutationsSentAtOnceRunInTheirOrder) {
  // Applied out of order they would give other weights, or be refused.
  const std::string context = client.Train();
  std::vector<std::function<absl::Status()>> calls;
  const auto queue = [&](auto request) {
    calls.emplace_back([this, request] { return client.Send(request); });
    client.Took();
  };
  queue(client.BackwardRequestFor(context));
  v1::ApplyGradientsRequest apply = client.ApplyRequest();
  queue(apply);
  apply.set_learning_rate(0.02);
  *apply.mutable_mutation() = client.Next();
  queue(apply);
  queue(client.ZeroRequest());
  std::vector<absl::Status> statuses(calls.size());
  {
    // The first one waits for the device until all have arrived.
    Blocker blocker(service.engine());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < calls.size(); ++i) {
      threads.emplace_back([&, i] {
        // One that overtakes its predecessor on the way is told of a gap and comes again.
        do statuses[i] = calls[i]();
        while (statuses[i].code() == kPrecondition);
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    blocker.Release();
    for (std::thread& thread : threads) thread.join();
  }
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(client.Describe().step(), 2);
  const std::string gradients = client.Parameters(true);
  EXPECT_EQ(gradients, std::string(gradients.size(), '\0'));
}

}  // namespace
}  // namespace lamina::testing
