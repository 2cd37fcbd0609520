// Fences: a call that waits for a number of its client's, and one that leaves a number behind.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

class FenceTest : public ::testing::TestWithParam<bool> {
 protected:
  FenceTest() {
    client.Create();
    plain = client.EvalRequest();
    expected = client.Do(plain).output().inline_data();
  }

  static v1::Fence At(const std::string& region, uint64_t offset, uint64_t value) {
    v1::Fence fence;
    *fence.mutable_slice() = TargetOf(region, offset, 8).slice();
    fence.set_value(value);
    return fence;
  }
  v1::Fence At(uint64_t offset, uint64_t value) const { return At(region.id, offset, value); }
  std::atomic_ref<uint64_t> Number(uint64_t offset) const {
    return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(region.data + offset));
  }

  Service service{{.ready_cap = absl::Milliseconds(200), .host_memory = GetParam()}};
  Client client{service.address()};
  MappedRegion region = client.Region();
  v1::ForwardRequest plain;
  std::string expected;
};

TEST_P(FenceTest, ACallBeginsOnceItsNumberIsReached) {
  // What is there when the call comes is not what it is to compute with.
  std::memset(region.data + 4096, 0xFF, kBytes);
  v1::ForwardRequest request = plain;
  *request.mutable_input() = SliceOf(region.id, 4096);
  *request.mutable_ready() = At(64, 7);
  Number(64) = 6;
  v1::ForwardResponse answer;
  std::atomic<bool> back{false};
  std::thread call([&] {
    EXPECT_OK(client.Send(request, &answer));
    back = true;
  });
  // Others go on, this session's too.
  Client other(service.address());
  v1::ForwardRequest theirs = other.EvalRequest();
  EXPECT_EQ(other.Do(theirs).output().inline_data(), expected);
  EXPECT_EQ(client.Do(plain).output().inline_data(), expected);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_FALSE(back);
  std::memcpy(region.data + 4096, plain.input().inline_data().data(), kBytes);
  Number(64) = 8;  // beyond is reached too
  call.join();
  EXPECT_EQ(answer.output().inline_data(), expected);
}

TEST_P(FenceTest, OneThatIsReachedCostsNothing) {
  Number(0) = 1;
  v1::ForwardRequest request = plain;
  *request.mutable_ready() = At(0, 1);
  EXPECT_EQ(client.Do(request).output().inline_data(), expected);
}

TEST_P(FenceTest, OneThatNeverComesEndsTheCallAlone) {
  const v1::Stack before = client.Describe();
  v1::ForwardRequest request = client.TrainRequest();
  *request.mutable_ready() = At(0, 2);
  Number(0) = 1;
  EXPECT_THAT(client.Send(request),
              IsStatus(kPrecondition, "ready.value: 2 was not reached within 200ms, there is 1"));
  grpc::ClientContext soon;
  soon.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(100));
  v1::ForwardResponse response;
  EXPECT_THAT(FromGrpc(client.layer->Forward(&soon, request, &response)), IsStatus(kDeadline, ""));
  EXPECT_EQ(client.Describe().SerializeAsString(), before.SerializeAsString());
  // The sequence is unused, once the call that nobody waits for any more has ended too.
  Number(0) = 2;
  EXPECT_OK(client.Send(request));
  client.Took();
}

TEST_P(FenceTest, OfACancelledCallEndsAtOnce) {
  Service patient({.host_memory = GetParam()});  // with a cap of 60 s
  Client other(patient.address());
  other.Create();
  const MappedRegion memory = other.Region();
  v1::ForwardRequest request = other.EvalRequest();
  *request.mutable_ready() = At(memory.id, 0, 1);
  grpc::ClientContext context;
  std::thread call([&] {
    v1::ForwardResponse response;
    EXPECT_THAT(FromGrpc(other.layer->Forward(&context, request, &response)),
                IsStatus(kCancelled, ""));
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  context.TryCancel();
  call.join();
  v1::DeleteSessionRequest end;
  end.set_session_id(other.session_id);
  other.Do(end);
  WaitUntil([&] { return patient.ended() == std::vector<std::string>{"deleted"}; });
}

TEST_P(FenceTest, DoneIsStoredByACallThatSucceedsAndByNoOther) {
  v1::ForwardRequest request = client.TrainRequest();
  *request.mutable_output() = TargetOf(region.id, 4096);
  *request.mutable_done() = At(8, 41);
  const std::string context = client.Do(request).context_id();
  client.Took();
  EXPECT_EQ(Number(8), 41u);
  v1::BackwardRequest back = client.BackwardRequestFor(context);
  *back.mutable_done() = At(8, 42);
  back.set_context_id("nothing");
  EXPECT_FALSE(client.Send(back).ok());
  EXPECT_EQ(Number(8), 41u);
  back.set_context_id(context);
  *back.mutable_ready() = At(8, 41);
  EXPECT_OK(client.Send(back));
  client.Took();
  EXPECT_EQ(Number(8), 42u);
}

TEST_P(FenceTest, ParametersWaitToo) {
  v1::SetParametersRequest set = client.SetRequest();
  *set.mutable_ready() = At(0, 1);
  EXPECT_THAT(client.Send(set), IsStatus(kPrecondition, "ready.value: 1"));
  v1::GetParametersRequest get;
  get.set_stack("s");
  get.add_names("layers.0.norm_w");
  get.set_session_id(client.session_id);
  *get.mutable_ready() = At(0, 1);
  EXPECT_THAT(client.Send(get), IsStatus(kPrecondition, "ready.value: 1"));
  Number(0) = 1;
  EXPECT_OK(client.Send(get));
  EXPECT_OK(client.Send(set));
  client.Took();
}

TEST_P(FenceTest, AreCheckedLikeEveryHandle) {
  for (const bool ready : {true, false}) {
    const std::string name = ready ? "ready" : "done";
    v1::ForwardRequest request = plain;
    const auto with = [&](const v1::Fence& fence) {
      *(ready ? request.mutable_ready() : request.mutable_done()) = fence;
      return client.Send(request);
    };
    EXPECT_THAT(with(At(0, 0)), IsStatus(kInvalid, name + ".value"));
    EXPECT_THAT(with(At(4, 1)), IsStatus(kInvalid, name + ".slice.offset_bytes"));
    EXPECT_THAT(with(At(region.length, 1)), IsStatus(kInvalid, name + ".slice"));
    EXPECT_THAT(with(At(std::string(32, '0'), 0, 1)), IsStatus(kNotFound, name + ".slice"));
    v1::Fence wide = At(0, 1);
    wide.mutable_slice()->set_size_bytes(16);
    EXPECT_THAT(with(wide), IsStatus(kInvalid, name + ".slice.size_bytes"));
    EXPECT_THAT(with(v1::Fence()), IsStatus(kInvalid, name + ".value"));
    if (!GetParam()) {
      const MappedRegion device = client.Region(1, v1::REGION_KIND_DEVICE);
      EXPECT_THAT(with(At(device.id, 0, 1)), IsStatus(kInvalid, "REGION_KIND_MEMFD"));
    }
  }
}

TEST_P(FenceTest, OnAStreamOthersGoAfterTheOneThatWaits) {
  const auto context = NewContext();
  const auto stream = client.layer->Execute(context.get());
  v1::ExecuteRequest item;
  item.set_id(1);
  *item.mutable_forward() = plain;
  *item.mutable_forward()->mutable_ready() = At(16, 1);
  ASSERT_TRUE(stream->Write(item));
  item.set_id(2);
  item.mutable_forward()->clear_ready();
  ASSERT_TRUE(stream->Write(item));
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  Number(16) = 1;
  v1::ExecuteResponse answer;
  for (const uint64_t id : {1u, 2u}) {
    ASSERT_TRUE(stream->Read(&answer));
    EXPECT_EQ(answer.id(), id);
    EXPECT_EQ(answer.code(), 0) << answer.message();
    EXPECT_EQ(answer.forward().output().inline_data(), expected);
  }
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

INSTANTIATE_TEST_SUITE_P(Backends, FenceTest, ::testing::Values(true, false),
                         [](const auto& p) { return p.param ? "host" : "card"; });

}  // namespace
}  // namespace lamina::testing
