// Calls of an Execute stream of which the device still runs what they left, while the next is
// enqueued. The device is CountingBackend, whose marks pass when a test says so.
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/server/service/ahead_rig.h"

namespace lamina::testing {
namespace {

using std::chrono::milliseconds;

class InFlightTest : public AheadTest {
 protected:
  using Stream = grpc::ClientReaderWriter<v1::ExecuteRequest, v1::ExecuteResponse>;

  InFlightTest() : context_(NewContext()), stream_(client.layer->Execute(context_.get())) {
    // Ops of one evaluation.
    const int64_t ops = service.backend().ops;
    client.Do(client.EvalRequest());
    each_ = service.backend().ops - ops;
    before_ = service.backend().ops;
    waits_ = service.backend().mark_waits;
  }
  ~InFlightTest() override {
    service.backend().hold_marks = false;
    context_->TryCancel();
    v1::ExecuteResponse rest;
    while (stream_->Read(&rest)) {
    }
    (void)stream_->Finish();
  }

  // An evaluation from one place of the region to another.
  v1::ExecuteRequest Eval(int i) const {
    v1::ForwardRequest request = Slice(At(i));
    *request.mutable_output() = TargetOf(region.id, At(kCalls + i));
    return Item(request);
  }
  // The next mutations of the session: a training Forward, and a Backward of an earlier item.
  v1::ExecuteRequest Train(int i) {
    v1::ForwardRequest request = Slice(At(i));
    *request.mutable_output() = TargetOf(region.id, At(kCalls + i));
    request.set_training(true);
    *request.mutable_mutation() = client.Next();
    client.Took();
    return Item(request);
  }
  v1::ExecuteRequest Back(uint64_t forward, int i) {
    v1::ExecuteRequest item;
    v1::BackwardRequest& request = *item.mutable_backward();
    request = client.BackwardRequestFor("");
    client.Took();
    *request.mutable_output_grad() = SliceOf(region.id, At(i));
    *request.mutable_input_grad() = TargetOf(region.id, At(kCalls + i));
    item.set_context_of(forward);
    return item;
  }
  uint64_t Send(v1::ExecuteRequest item) {
    item.set_id(++last_id_);
    EXPECT_TRUE(stream_->Write(item));
    return last_id_;
  }
  v1::ExecuteResponse Hear() {
    v1::ExecuteResponse answer;
    EXPECT_TRUE(stream_->Read(&answer));
    EXPECT_EQ(answer.id(), ++last_heard_);
    return answer;
  }
  void Finish() {
    stream_->WritesDone();
    v1::ExecuteResponse none;
    EXPECT_FALSE(stream_->Read(&none));
    EXPECT_TRUE(FromGrpc(stream_->Finish()).ok());
    context_ = NewContext();  // for the fixture's end
    stream_ = client.layer->Execute(context_.get());
  }
  // Evaluations whose ops have been enqueued since the fixture began.
  int64_t Enqueued() { return (service.backend().ops - before_) / each_; }
  void WaitUntilEnqueued(int64_t evaluations) {
    WaitUntil([&] { return Enqueued() >= evaluations; });
  }
  // Of this many calls the device has the work, and somebody waits for the first.
  void WaitUntilLeft(int64_t evaluations) {
    WaitUntilEnqueued(evaluations);
    WaitUntil([&] { return service.backend().mark_waits > waits_; });
    std::this_thread::sleep_for(milliseconds(10));
  }
  std::string Result(int i) const { return {region.data + At(kCalls + i), kBytes}; }
  // The session's watermark; it is this service's first one.
  uint64_t Applied() { return service.mutations().For(1)->applied(); }
  std::string Gradients() { return client.Parameters(/*gradients=*/true); }

  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<Stream> stream_;
  int64_t each_ = 0, before_ = 0, waits_ = 0;
  uint64_t last_id_ = 0, last_heard_ = 0;
};

// --- order ---

TEST_F(InFlightTest, TheNextIsEnqueuedWhileOneRunsAndAnswersKeepTheirOrder) {
  service.backend().hold_marks = true;
  for (int i = 0; i < kCalls; ++i) Send(Eval(i));
  WaitUntilLeft(2);
  std::atomic<bool> heard{false};
  std::thread reader([&] {
    for (int i = 0; i < kCalls; ++i) {
      const v1::ExecuteResponse answer = Hear();
      heard = true;
      EXPECT_EQ(answer.code(), 0) << answer.message();
      EXPECT_EQ(Result(i), expected[static_cast<size_t>(i)]) << i;
      EXPECT_GT(answer.forward().timing().compute_seconds(), 0);
      // What it waited for is in it, and nothing twice.
      if (i < 2) {
        EXPECT_GE(answer.forward().timing().queue_seconds(), 0.04) << i;
      }
      EXPECT_LT(answer.forward().timing().compute_seconds(), 0.04) << i;
    }
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(Enqueued(), 2) << "one runs, one is enqueued behind it";
  EXPECT_FALSE(heard) << "a result is answered when it is there";
  service.backend().hold_marks = false;
  service.backend().late_marks = true;
  reader.join();
  EXPECT_EQ(Enqueued(), kCalls);
  EXPECT_EQ(service.Metric("lamina_steps_total{direction=\"forward_eval\"}"), 2.0 * kCalls + 1);
  Finish();
}

TEST_F(InFlightTest, WhatIsSoonOverIsNotLeft) {
  for (int i = 0; i < kCalls; ++i) {
    Send(Eval(i));
    EXPECT_EQ(Hear().code(), 0);
    EXPECT_EQ(Result(i), expected[static_cast<size_t>(i)]);
  }
  EXPECT_EQ(service.backend().mark_waits, waits_);
}

TEST_F(InFlightTest, CallsThatCannotBeLeftWaitForThoseThatWere) {
  service.backend().late_marks = true;
  Send(Eval(0));
  Send(Item(Slice(At(1))));  // its output is in the message
  v1::ExecuteRequest refused = Eval(2);
  refused.mutable_forward()->set_stack("nothing");
  Send(refused);
  Send(Eval(3));
  v1::ForwardRequest lengths = Slice(At(4));
  *lengths.mutable_output() = TargetOf(region.id, At(kCalls + 4));
  *lengths.mutable_lengths() = InlineIntegers({8, 8, 8});
  Send(Item(lengths));
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().forward().output().inline_data(), expected[1]);
  EXPECT_EQ(Hear().code(), static_cast<int>(kNotFound));
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), 0);
  for (const int i : {0, 3, 4}) EXPECT_EQ(Result(i), expected[static_cast<size_t>(i)]) << i;
  Finish();
}

TEST_F(InFlightTest, AnInputThatAStepStillWritesIsNotCopiedAhead) {
  service.backend().hold_marks = true;
  service.backend().hold_op = 0;
  Send(Eval(0));
  WaitUntil([&] { return service.backend().holding.load(); });
  Send(Eval(1));
  v1::ForwardRequest third = Slice(At(kCalls));  // what the first gives
  *third.mutable_output() = TargetOf(region.id, At(kCalls + 2));
  Send(Item(third));
  Send(Eval(3));
  std::this_thread::sleep_for(milliseconds(30));  // they are read
  service.backend().holding = false;
  WaitUntilLeft(2);
  EXPECT_EQ(service.backend().ahead_copies, 0)
      << "the first did not know its next, and that of the second is still written";
  service.backend().hold_marks = false;
  for (int i = 0; i < 4; ++i) EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(service.backend().ahead_copies, 1) << "of the fourth";
  v1::ForwardRequest again = client.EvalRequest();
  again.mutable_input()->set_inline_data(expected[0]);
  EXPECT_EQ(Result(2), client.Do(again).output().inline_data());
}

// Large results: their copies to the host run beside what is enqueued next, and whatever reads or
// writes the same bytes comes after them.
TEST_F(InFlightTest, ResultsAreCopiedOutBesideTheNextStep) {
  constexpr size_t kMiB = size_t{1} << 20;
  const std::vector<int64_t> shape{2048, kS, kH};  // 1 MiB
  v1::StackConfig config = TinyProto();
  config.set_batch_size(shape[0]);
  client.Create("wide", config);
  const MappedRegion memory = client.Region(8 * kMiB);
  const auto place = [&](size_t at) { return std::string(memory.data + at * kMiB, kMiB); };
  const auto forward = [&](uint64_t from, uint64_t to) {
    v1::ForwardRequest request = client.EvalRequest();
    request.set_stack("wide");
    *request.mutable_input() = SliceOf(memory.id, from * kMiB, kMiB, shape);
    *request.mutable_output() = TargetOf(memory.id, to * kMiB, kMiB);
    return request;
  };
  std::memcpy(memory.data, InlineNoise(5, shape).inline_data().data(), kMiB);
  std::vector<std::string> chain{place(0)};  // each the stack's output for the one before
  for (int i = 0; i < 4; ++i) {
    client.Do(forward(0, 1));
    chain.push_back(place(1));
    std::memcpy(memory.data, chain.back().data(), kMiB);
  }
  std::memcpy(memory.data, chain[0].data(), kMiB);
  std::memset(memory.data + kMiB, 0, 7 * kMiB);
  EXPECT_EQ(service.backend().behind_copies, 0) << "nobody was behind those";

  service.backend().hold_marks = true;
  Send(Item(forward(0, 1)));
  Send(Item(forward(1, 2)));
  Send(Item(forward(2, 1)));  // over what the first has written
  Send(Item(forward(1, 3)));
  Send(Item(forward(0, 4)));
  WaitUntil([&] { return service.backend().behind_copies == 2; });
  EXPECT_EQ(place(2), std::string(kMiB, '\0')) << "it is on its way";
  service.backend().hold_marks = false;
  service.backend().late_marks = true;
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(service.backend().behind_copies, 5);
  EXPECT_EQ(place(2), chain[2]);
  EXPECT_EQ(place(1), chain[3]);
  EXPECT_EQ(place(3), chain[4]);
  EXPECT_EQ(place(4), chain[1]);
}

TEST_F(InFlightTest, OthersTakeTheirTurns) {
  service.backend().hold_marks = true;
  for (int i = 0; i < kCalls; ++i) Send(Eval(i));
  WaitUntilLeft(2);
  Client other(service.address());
  // The device (which is at leisure really) is theirs, though this stream has more to do.
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(other.Do(other.EvalRequest(3)).output().inline_data(), expected[2]);
  EXPECT_EQ(Enqueued(), 2 + 3);
  service.backend().hold_marks = false;
  for (int i = 0; i < kCalls; ++i) EXPECT_EQ(Hear().code(), 0);
}

TEST_F(InFlightTest, ManyStreamsAtATime) {
  service.backend().mark_us = 100;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([this] {
      Client other(service.address());
      const MappedRegion memory = other.Region();
      const auto context = NewContext();
      const auto stream = other.layer->Execute(context.get());
      for (uint64_t id = 1; id <= 40; ++id) {
        const size_t i = id % kCalls;
        std::memcpy(memory.data + At(static_cast<int>(i)), inputs[i].data(), kBytes);
        v1::ExecuteRequest item;
        item.set_id(id);
        *item.mutable_forward() = other.EvalRequest();
        *item.mutable_forward()->mutable_input() = SliceOf(memory.id, At(static_cast<int>(i)));
        *item.mutable_forward()->mutable_output() =
            TargetOf(memory.id, At(kCalls + static_cast<int>(i)));
        ASSERT_TRUE(stream->Write(item));
        if (id < 4) continue;  // so many at a time
        v1::ExecuteResponse answer;
        ASSERT_TRUE(stream->Read(&answer));
        EXPECT_EQ(answer.id(), id - 3);
        EXPECT_EQ(answer.code(), 0) << answer.message();
        const size_t done = (id - 3) % kCalls;
        EXPECT_EQ(std::string(memory.data + At(kCalls + static_cast<int>(done)), kBytes),
                  expected[done]);
      }
      stream->WritesDone();
      v1::ExecuteResponse answer;
      while (stream->Read(&answer)) EXPECT_EQ(answer.code(), 0) << answer.message();
      EXPECT_TRUE(FromGrpc(stream->Finish()).ok());
    });
  for (std::thread& thread : threads) thread.join();
}

// --- ends ---

TEST_F(InFlightTest, CancelAndDeadlineEndNothingThatIsEnqueued) {
  service.backend().hold_marks = true;
  v1::ExecuteRequest first = Eval(0);
  first.set_timeout_seconds(0.05);
  const uint64_t one = Send(first), two = Send(Eval(1)), three = Send(Eval(2));
  v1::ExecuteRequest late = Eval(3);
  late.set_timeout_seconds(0.05);
  Send(late);
  WaitUntilLeft(2);
  for (const uint64_t id : {one, two, three}) {
    v1::ExecuteRequest cancel;
    cancel.set_id(++last_id_);
    cancel.set_cancel(id);
    EXPECT_TRUE(stream_->Write(cancel));
  }
  std::this_thread::sleep_for(milliseconds(80));
  service.backend().hold_marks = false;
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), static_cast<int>(kCancelled));
  EXPECT_EQ(Hear().code(), static_cast<int>(kDeadline));
  EXPECT_EQ(Result(1), expected[1]);
}

TEST_F(InFlightTest, ARegionStaysWhileAStepUsesIt) {
  const MappedRegion device = client.Region(1, v1::REGION_KIND_DEVICE);
  std::memcpy(device.data, inputs[0].data(), kBytes);
  service.backend().hold_marks = true;
  v1::ForwardRequest request = client.EvalRequest();
  *request.mutable_input() = SliceOf(device.id, 0);
  *request.mutable_output() = TargetOf(device.id, 8192);
  Send(Item(request));
  WaitUntilLeft(1);
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(device.id);
  client.Do(release);
  EXPECT_GT(service.backend().shared_bytes, 0u);
  service.backend().hold_marks = false;
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(std::string(device.data + 8192, kBytes), expected[0]);
  WaitUntil([&] { return service.backend().shared_bytes == 0; });
}

TEST_F(InFlightTest, ASessionEndsOnceItsStepsAreOver) {
  Client witness(service.address());
  service.backend().hold_marks = true;
  Send(Train(0));
  Send(Train(1));
  Send(Eval(2));
  WaitUntilLeft(2);
  v1::DeleteSessionRequest remove;
  remove.set_session_id(client.session_id);
  std::thread deleting([&] { client.Do(remove); });
  WaitUntil([&] { return service.sessions().live_sessions() == 1; });
  std::this_thread::sleep_for(milliseconds(30));
  EXPECT_TRUE(service.ended().empty());
  EXPECT_EQ(service.sessions().live_regions(), 1);
  service.backend().hold_marks = false;
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), static_cast<int>(kNotFound));
  deleting.join();
  WaitUntil([&] { return service.ended().size() == 1; });
  // Its regions go after its contexts.
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0);
}

TEST_F(InFlightTest, AClientThatGoesLeavesNothing) {
  Client witness(service.address());
  service.backend().hold_marks = true;
  Send(Train(0));
  Send(Train(1));
  WaitUntilLeft(2);
  context_->TryCancel();
  v1::DeleteSessionRequest remove;
  remove.set_session_id(client.session_id);
  std::thread deleting([&] { client.Do(remove); });
  WaitUntil([&] { return service.sessions().live_sessions() == 1; });
  service.backend().hold_marks = false;
  deleting.join();
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  WaitUntil([&] { return witness.Describe().outstanding_contexts() == 0; });
  EXPECT_EQ(witness.Do(witness.EvalRequest(1)).output().inline_data(), expected[0]);
}

TEST_F(InFlightTest, AStackGoesOnceItsStepsAreOver) {
  service.backend().hold_marks = true;
  Send(Eval(0));
  Send(Eval(1));
  WaitUntilLeft(2);
  const size_t bytes = service.backend().live_bytes;
  std::thread deleting([&] {
    v1::DeleteStackRequest remove;
    remove.set_name("s");
    client.Do(remove);
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_EQ(service.backend().live_bytes, bytes);
  service.backend().hold_marks = false;
  deleting.join();
  EXPECT_LT(service.backend().live_bytes, bytes);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(Hear().code(), 0);
    EXPECT_EQ(Result(i), expected[static_cast<size_t>(i)]);
  }
}

TEST_F(InFlightTest, ADaemonThatEndsWaitsForThem) {
  service.backend().hold_marks = true;
  Send(Eval(0));
  Send(Eval(1));
  WaitUntilLeft(2);
  EXPECT_FALSE(service.gate().Close(absl::Now() + absl::Milliseconds(50)));
  std::atomic<bool> drained{false};
  std::thread drain([&] {
    service.engine().Drain();
    drained = true;
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_FALSE(drained);
  service.backend().hold_marks = false;
  EXPECT_TRUE(service.gate().Close(absl::Now() + absl::Seconds(30)));
  drain.join();
  EXPECT_EQ(Hear().code(), 0);
  EXPECT_EQ(Hear().code(), 0);
}

// --- mutations ---

TEST_F(InFlightTest, AMutationIsAppliedOnceItIsOver) {
  std::memcpy(region.data + At(4), inputs[3].data(), kBytes);  // a gradient as good as any
  const v1::ExecuteRequest forward = Train(0), backward = Back(1, 4);
  service.backend().hold_marks = true;
  Send(forward);
  Send(backward);
  WaitUntil([&] { return service.backend().mark_waits > waits_; });
  WaitUntil([&] { return client.Describe().outstanding_contexts() == 0; });
  EXPECT_EQ(Applied(), 0u);
  // A repeat of each, from elsewhere, and the one behind them.
  v1::ForwardResponse again;
  absl::Status repeated, zeroed;
  std::atomic<bool> heard{false};
  std::thread repeat([&] {
    repeated = client.Send(forward.forward(), &again);
    heard = true;
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_FALSE(heard);
  service.backend().hold_marks = false;
  const v1::ExecuteResponse first = Hear(), second = Hear();
  repeat.join();
  EXPECT_EQ(first.code(), 0) << first.message();
  EXPECT_EQ(second.code(), 0) << second.message();
  EXPECT_TRUE(repeated.ok()) << repeated;
  EXPECT_EQ(again.SerializeAsString(), first.forward().SerializeAsString());
  EXPECT_EQ(Applied(), 2u);
  EXPECT_NE(Gradients().find_first_not_of('\0'), std::string::npos);
  v1::ForwardRequest other = forward.forward();
  other.set_training(false);
  EXPECT_EQ(client.Send(other).code(), absl::StatusCode::kAlreadyExists);
}

TEST_F(InFlightTest, TrainingGivesTheSameGradients) {
  std::vector<v1::ExecuteRequest> calls;
  const auto run = [&] {
    std::string answers;
    for (int i = 0; i < 6; ++i) {
      const uint64_t forward = Send(Train(i % 3));
      Send(Back(forward, 4));
    }
    for (int i = 0; i < 12; ++i) {
      const v1::ExecuteResponse answer = Hear();
      EXPECT_EQ(answer.code(), 0) << answer.message();
    }
    answers = Gradients();
    client.Do(client.ZeroRequest());
    client.Took();
    return answers + std::string(region.data + At(kCalls), 5 * 4096);
  };
  const std::string once = run();
  EXPECT_EQ(service.backend().mark_waits, waits_);
  service.backend().late_marks = true;
  EXPECT_EQ(run(), once);
  EXPECT_GT(service.backend().mark_waits, waits_);
  EXPECT_EQ(Applied(), 26u);
}

TEST_F(InFlightTest, ADeviceThatFailsFailsAllOfThem) {
  Send(Train(0));
  EXPECT_EQ(Hear().code(), 0);
  const v1::ExecuteRequest second = Train(1);
  service.backend().hold_marks = true;
  Send(second);
  Send(Eval(2));
  Send(Eval(3));
  WaitUntil([&] { return service.backend().mark_waits > waits_; });
  std::this_thread::sleep_for(milliseconds(20));
  service.backend().fail_marks = true;
  service.backend().hold_marks = false;
  const v1::ExecuteResponse failed = Hear();
  EXPECT_EQ(failed.code(), static_cast<int>(absl::StatusCode::kInternal));
  EXPECT_NE(failed.message().find("a mark failed on demand"), std::string::npos);
  service.backend().fail_marks = false;  // whatever marks say from now on
  const v1::ExecuteResponse behind = Hear();
  EXPECT_EQ(behind.code(), static_cast<int>(absl::StatusCode::kInternal)) << behind.message();
  EXPECT_EQ(Hear().code(), static_cast<int>(kUnavailable));
  EXPECT_EQ(Applied(), 1u) << "what the device did not end is not applied";
  EXPECT_THAT(client.Send(second.forward()), IsStatus(kUnavailable, "the device failed"));
  EXPECT_EQ(service.Metric("lamina_steps_total{direction=\"forward_training\"}"), 1);
}

}  // namespace
}  // namespace lamina::testing
