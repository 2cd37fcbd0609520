// The Execute stream: calls in order, each with its own outcome, more on their way than are run.
#include <grpcpp/support/sync_stream.h>

#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/service/execute_stream.h"
#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

// One stream, as a client drives it.
class ExecuteClient {
 public:
  explicit ExecuteClient(Client& client)
      : context_(NewContext()), stream_(client.layer->Execute(context_.get())) {}

  // Sends a call; its id.
  template <typename Fill>
  uint64_t Send(Fill fill) {
    v1::ExecuteRequest request;
    request.set_id(++last_id_);
    fill(request);
    stream_->Write(request);
    return last_id_;
  }
  uint64_t Send(const v1::ForwardRequest& call) {
    return Send([&](v1::ExecuteRequest& r) { *r.mutable_forward() = call; });
  }
  uint64_t Send(const v1::ApplyGradientsRequest& call) {
    return Send([&](v1::ExecuteRequest& r) { *r.mutable_apply_gradients() = call; });
  }
  uint64_t SendBackward(v1::BackwardRequest call, uint64_t context_of) {
    return Send([&](v1::ExecuteRequest& r) {
      *r.mutable_backward() = std::move(call);
      r.set_context_of(context_of);
    });
  }

  v1::ExecuteResponse Receive() {
    v1::ExecuteResponse response;
    if (!stream_->Read(&response)) throw std::runtime_error("the stream has ended");
    return response;
  }
  absl::Status Status(const v1::ExecuteResponse& response) const {
    return {static_cast<absl::StatusCode>(response.code()), response.message()};
  }
  // What the next answer says, which must be that of call `id`.
  absl::Status Outcome(uint64_t id) {
    const v1::ExecuteResponse response = Receive();
    EXPECT_EQ(response.id(), id);
    return Status(response);
  }
  // No more calls; the stream's own end.
  absl::Status Finish() {
    stream_->WritesDone();
    for (v1::ExecuteResponse response; stream_->Read(&response);) ADD_FAILURE() << "unasked";
    return FromGrpc(stream_->Finish());
  }
  grpc::ClientContext& context() { return *context_; }
  grpc::ClientReaderWriter<v1::ExecuteRequest, v1::ExecuteResponse>& stream() { return *stream_; }

 private:
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ExecuteRequest, v1::ExecuteResponse>> stream_;
  uint64_t last_id_ = 0;
};

class ExecuteTest : public ::testing::Test {
 protected:
  ExecuteTest() { client.Create(); }

  // A mutation with the sequence `ahead` beyond the next.
  template <typename Request>
  Request Ahead(Request request, uint64_t ahead) const {
    request.mutable_mutation()->set_sequence(client.sequence + 1 + ahead);
    return request;
  }

  Service service;
  Client client{service.address()};
};

TEST_F(ExecuteTest, ATrainOfCallsGivesTheBitsOfSingleOnes) {
  Client other(service.address());
  other.Create("single");
  const auto single = [](auto request) {
    request.set_stack("single");
    return request;
  };
  ExecuteClient stream(client);
  for (uint64_t step = 0; step < 3; ++step) {
    const uint64_t ahead = 3 * step;
    const uint64_t forward = stream.Send(Ahead(client.TrainRequest(step), ahead));
    v1::BackwardRequest backward = Ahead(client.BackwardRequestFor("", step + 50), ahead + 1);
    backward.mutable_input_grad()->mutable_inline_();
    stream.SendBackward(backward, forward);
    stream.Send(Ahead(client.ApplyRequest(), ahead + 2));
  }
  for (uint64_t step = 0; step < 3; ++step) {
    const v1::ForwardResponse forward = other.Do(single(other.TrainRequest(step)));
    other.Took();
    v1::BackwardRequest backward =
        single(other.BackwardRequestFor(forward.context_id(), step + 50));
    backward.mutable_input_grad()->mutable_inline_();
    const v1::BackwardResponse dx = other.Do(backward);
    other.Took();
    const v1::ApplyGradientsResponse applied = other.Do(single(other.ApplyRequest()));
    other.Took();

    v1::ExecuteResponse answer = stream.Receive();
    EXPECT_EQ(answer.id(), 3 * step + 1);
    EXPECT_EQ(answer.forward().output().inline_data(), forward.output().inline_data());
    answer = stream.Receive();
    EXPECT_EQ(answer.backward().input_grad().inline_data(), dx.input_grad().inline_data());
    answer = stream.Receive();
    EXPECT_EQ(answer.apply_gradients().grad_norm(), applied.grad_norm());
    EXPECT_EQ(answer.apply_gradients().step(), static_cast<int64_t>(step) + 1);
  }
  EXPECT_OK(stream.Finish());
  EXPECT_EQ(client.Describe().outstanding_contexts(), 0);
}

TEST_F(ExecuteTest, CallsAreTakenInWhileOneRuns) {
  ExecuteClient stream(client);
  {
    Blocker blocker(service.engine());
    const uint64_t forward = stream.Send(Ahead(client.TrainRequest(), 0));
    stream.SendBackward(Ahead(client.BackwardRequestFor(""), 1), forward);
    stream.Send(client.EvalRequest());
    stream.stream().WritesDone();  // all of it is sent before anything can be answered
  }
  for (uint64_t id = 1; id <= 3; ++id) EXPECT_OK(stream.Outcome(id));
  EXPECT_OK(FromGrpc(stream.stream().Finish()));
}

TEST_F(ExecuteTest, MoreThanItsDepthIsAnsweredToo) {
  ExecuteClient stream(client);
  constexpr uint64_t kCalls = 3 * kExecuteStreamDepth;
  std::thread sender([&] {
    for (uint64_t i = 0; i < kCalls; ++i) stream.Send(client.EvalRequest());
    stream.stream().WritesDone();
  });
  for (uint64_t id = 1; id <= kCalls; ++id) EXPECT_OK(stream.Outcome(id));
  sender.join();
  EXPECT_OK(FromGrpc(stream.stream().Finish()));
}

TEST_F(ExecuteTest, AFailureIsItsOwnAndStopsTheSequenceBehindIt) {
  ExecuteClient stream(client);
  v1::ForwardRequest wrong = Ahead(client.TrainRequest(), 0);
  wrong.mutable_input()->set_dtype(v1::DATA_TYPE_INT32);
  const uint64_t forward = stream.Send(wrong);
  const uint64_t backward = stream.SendBackward(Ahead(client.BackwardRequestFor(""), 1), forward);
  const uint64_t apply = stream.Send(Ahead(client.ApplyRequest(), 2));
  const uint64_t evaluation = stream.Send(client.EvalRequest());
  EXPECT_THAT(stream.Outcome(forward), IsStatus(kInvalid, "input"));
  EXPECT_THAT(stream.Outcome(backward),
              IsStatus(kPrecondition, "context_of: the Forward 1 has failed"));
  EXPECT_THAT(stream.Outcome(apply), IsStatus(kPrecondition, "mutation.sequence"));
  EXPECT_OK(stream.Outcome(evaluation));
  const uint64_t again = stream.Send(Ahead(client.TrainRequest(), 0));
  EXPECT_OK(stream.Outcome(again));
  EXPECT_OK(stream.Finish());
  EXPECT_EQ(client.Describe().forward_count(), 1u);
}

TEST_F(ExecuteTest, WhatContextOfMayName) {
  const std::string mine = client.Train();
  ExecuteClient stream(client);
  const auto refused = [&](const auto& fill, absl::StatusCode code, const std::string& words) {
    EXPECT_THAT(stream.Outcome(stream.Send(fill)), IsStatus(code, words));
  };
  refused(
      [&](v1::ExecuteRequest& r) {
        *r.mutable_backward() = client.BackwardRequestFor("");
        r.set_context_of(77);
      },
      kNotFound, "context_of: 77 is no Forward of this stream");
  refused(
      [&](v1::ExecuteRequest& r) {
        *r.mutable_backward() = client.BackwardRequestFor(mine);
        r.set_context_of(1);
      },
      kInvalid, "context_of: must be 0 where there is a context_id");
  refused(
      [&](v1::ExecuteRequest& r) {
        *r.mutable_forward() = client.EvalRequest();
        r.set_context_of(1);
      },
      kInvalid, "context_of: 1 must be 0 with a call other than");
  const uint64_t evaluation = stream.Send(client.EvalRequest());
  EXPECT_OK(stream.Outcome(evaluation));
  refused(
      [&](v1::ExecuteRequest& r) {
        *r.mutable_backward() = client.BackwardRequestFor("");
        r.set_context_of(evaluation);
      },
      kNotFound, "has a context");

  const uint64_t forward = stream.Send(client.TrainRequest());
  EXPECT_OK(stream.Outcome(forward));
  client.Took();
  const auto release = [&](v1::ExecuteRequest& r) {
    r.mutable_release_context()->set_stack("s");
    r.mutable_release_context()->set_session_id(client.session_id);
    r.set_context_of(forward);
  };
  EXPECT_OK(stream.Outcome(stream.Send(release)));
  refused(release, kNotFound, "context_of");
  // One from before the stream, by its own id.
  EXPECT_OK(stream.Outcome(stream.SendBackward(client.BackwardRequestFor(mine), 0)));
  EXPECT_OK(stream.Finish());
}

TEST_F(ExecuteTest, AWaitingCallIsCancelled) {
  ExecuteClient stream(client);
  uint64_t first = 0, second = 0, third = 0;
  {
    Blocker blocker(service.engine());
    first = stream.Send(client.EvalRequest());
    second = stream.Send(Ahead(client.TrainRequest(), 0));
    third = stream.Send(client.EvalRequest());
    stream.Send([&](v1::ExecuteRequest& r) { r.set_cancel(second); });
    stream.Send([&](v1::ExecuteRequest& r) { r.set_cancel(9999); });
    // That the daemon has read so far shows in nothing but time.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  EXPECT_OK(stream.Outcome(first));
  EXPECT_THAT(stream.Outcome(second), IsStatus(kCancelled, "nothing has changed"));
  EXPECT_OK(stream.Outcome(third));
  EXPECT_OK(stream.Finish());
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  client.Train();  // its sequence is free
}

// The test's stack is so small that gRPC's threads run its calls: as on a card, the device's own
// thread runs them here.
class ExecuteOnDeviceTest : public ::testing::Test {
 protected:
  ExecuteOnDeviceTest() { client.Create(); }

  Service service{{.host_memory = false}};
  Client client{service.address()};
};

TEST_F(ExecuteOnDeviceTest, StreamsAndCallsTakeTurns) {
  constexpr uint64_t kSteps = 30;
  const auto drive = [&](const std::string& stack) {
    Client own(service.address());
    own.Create(stack);
    const MappedRegion region = own.Region();
    ExecuteClient stream(own);
    for (uint64_t step = 0; step < kSteps; ++step) {
      v1::ForwardRequest forward = own.TrainRequest(step);
      forward.set_stack(stack);
      *forward.mutable_input() = SliceOf(region.id, 0);
      *forward.mutable_output() = TargetOf(region.id, kBytes);
      forward.mutable_mutation()->set_sequence(2 * step + 1);
      const uint64_t id = stream.Send(forward);
      v1::BackwardRequest backward = own.BackwardRequestFor("");
      backward.set_stack(stack);
      *backward.mutable_output_grad() = SliceOf(region.id, kBytes);
      backward.mutable_mutation()->set_sequence(2 * step + 2);
      stream.SendBackward(backward, id);
    }
    for (uint64_t call = 1; call <= 2 * kSteps; ++call) EXPECT_OK(stream.Outcome(call));
    EXPECT_OK(stream.Finish());
    EXPECT_EQ(own.Describe(stack).forward_count(), kSteps);
  };
  std::vector<std::thread> threads;
  for (const char* stack : {"one", "two"}) threads.emplace_back(drive, stack);
  for (uint64_t i = 0; i < kSteps; ++i) client.Do(client.EvalRequest(i));
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ExecuteOnDeviceTest, ACallThatWaitsForItsTurnIsCancelled) {
  ExecuteClient stream(client);
  uint64_t first = 0;
  {
    Blocker blocker(service.engine());
    first = stream.Send(client.EvalRequest());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    stream.Send([&](v1::ExecuteRequest& r) { r.set_cancel(first); });
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
  EXPECT_THAT(stream.Outcome(first), IsStatus(kCancelled, "nothing has changed"));
  EXPECT_OK(stream.Finish());
}

TEST_F(ExecuteTest, ASessionThatEndsDuringItsCallsIsNoDeadlock) {
  // Whoever of a call's threads lets go of the session last has the device free its contexts.
  for (int round = 0; round < 20; ++round) {
    Client ending(service.address());
    std::thread calls([&] {
      for (int i = 0; i < 50; ++i) {
        if (!ending.Send(ending.EvalRequest()).ok()) return;
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(300 * round));
    v1::DeleteSessionRequest request;
    request.set_session_id(ending.session_id);
    EXPECT_OK(ending.Send(request));
    calls.join();
  }
  client.Do(client.EvalRequest());
}

TEST_F(ExecuteTest, ATimeoutIsACallsOwn) {
  ExecuteClient stream(client);
  const auto with_timeout = [&](double seconds) {
    return [&, seconds](v1::ExecuteRequest& r) {
      *r.mutable_forward() = client.EvalRequest();
      r.set_timeout_seconds(seconds);
    };
  };
  for (const double wrong : {0.0, -1.0, std::nan("")})
    EXPECT_THAT(stream.Outcome(stream.Send(with_timeout(wrong))),
                IsStatus(kInvalid, "timeout_seconds"));
  uint64_t late = 0, patient = 0;
  {
    Blocker blocker(service.engine());
    late = stream.Send(with_timeout(0.05));
    patient = stream.Send(with_timeout(60));
    EXPECT_THAT(stream.Outcome(late), IsStatus(kDeadline, "deadline"));
  }
  EXPECT_OK(stream.Outcome(patient));
  EXPECT_OK(stream.Finish());
}

TEST_F(ExecuteTest, WhatIsNoCall) {
  ExecuteClient stream(client);
  EXPECT_THAT(stream.Outcome(stream.Send([](v1::ExecuteRequest&) {})),
              IsStatus(kInvalid, "call: is needed"));
  const uint64_t good = stream.Send(client.EvalRequest());
  EXPECT_OK(stream.Outcome(good));
  stream.Send([&](v1::ExecuteRequest& r) {
    r.set_id(good);
    *r.mutable_forward() = client.EvalRequest();
  });
  EXPECT_THAT(stream.Finish(),
              IsStatus(kInvalid, "id: 2 must be above that of the message before, 2"));
}

TEST_F(ExecuteTest, ACancelledStreamRunsNothingMore) {
  {
    Blocker blocker(service.engine());
    ExecuteClient stream(client);
    for (uint64_t i = 0; i < 5; ++i) stream.Send(Ahead(client.TrainRequest(i), i));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    stream.context().TryCancel();
    EXPECT_EQ(FromGrpc(stream.stream().Finish()).code(), kCancelled);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  client.Do(client.EvalRequest());  // behind whatever still ran
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  EXPECT_EQ(client.Describe().outstanding_contexts(), 0);
}

TEST_F(ExecuteTest, AnAnswerLostWithItsStreamIsAskedForAgain) {
  const v1::ForwardRequest forward = client.TrainRequest();
  {
    ExecuteClient stream(client);
    stream.Send(forward);
    EXPECT_EQ(stream.Receive().code(), 0);
    stream.context().TryCancel();
    static_cast<void>(stream.stream().Finish());
  }
  ExecuteClient stream(client);
  EXPECT_OK(stream.Outcome(stream.Send(forward)));
  EXPECT_TRUE(client.Send(forward).ok());
  EXPECT_OK(stream.Finish());
  EXPECT_EQ(client.Describe().forward_count(), 1u);
}

TEST_F(ExecuteTest, DrainingAnswersUnavailable) {
  ExecuteClient stream(client);
  EXPECT_OK(stream.Outcome(stream.Send(client.EvalRequest())));
  service.gate().Close(absl::Now());
  EXPECT_THAT(stream.Outcome(stream.Send(client.EvalRequest())),
              IsStatus(absl::StatusCode::kUnavailable, "draining"));
  EXPECT_OK(stream.Finish());
}

TEST_F(ExecuteTest, ShuttingDownEndsIt) {
  ExecuteClient stream(client);
  EXPECT_OK(stream.Outcome(stream.Send(client.EvalRequest())));
  service.server().Shutdown(absl::Now());
  v1::ExecuteResponse response;
  EXPECT_FALSE(stream.stream().Read(&response));
  EXPECT_FALSE(stream.stream().Finish().ok());
}

}  // namespace
}  // namespace lamina::testing
