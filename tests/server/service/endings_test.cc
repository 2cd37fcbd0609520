// Calls that are cut short, sessions that end under running calls, a full queue, a failed device,
// and the drain: each answers as the contract says, and leaves nothing behind.
#include <chrono>
#include <cstring>
#include <thread>

#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

// A call on a thread of its own.
class Async {
 public:
  template <typename Request>
  Async(Client& client, const Request& request)
      : thread_([this, &client, request] { status_ = client.Send(request); }) {}
  ~Async() {
    if (thread_.joinable()) thread_.join();
  }
  absl::Status Join() {
    thread_.join();
    return status_;
  }

 private:
  absl::Status status_;
  std::thread thread_;
};

bool Queued(Service& service, int calls) { return service.Metric("lamina_queue_depth") == calls; }

class EndingsTest : public ::testing::Test {
 protected:
  explicit EndingsTest(const ServiceOptions& options = {})
      : service(options), client(service.address()) {
    client.Create();
  }

  Service service;
  Client client;
};

TEST_F(EndingsTest, ADeadlineInTheQueueChangesNothing) {
  const v1::ForwardRequest request = client.TrainRequest();
  {
    Blocker blocker(service.engine());
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    v1::ForwardResponse response;
    EXPECT_EQ(FromGrpc(client.layer->Forward(&context, request, &response)).code(), kDeadline);
    WaitUntil([&] { return Queued(service, 0); });
  }
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  EXPECT_TRUE(client.Send(request).ok()) << "its sequence is free";
  EXPECT_EQ(client.Describe().forward_count(), 1u);
}

TEST_F(EndingsTest, ACancelledCallInTheQueueChangesNothing) {
  const v1::ForwardRequest request = client.TrainRequest();
  {
    Blocker blocker(service.engine());
    const auto context = NewContext();
    std::thread canceller([&] {
      WaitUntil([&] { return Queued(service, 1); });
      context->TryCancel();
    });
    v1::ForwardResponse response;
    EXPECT_EQ(FromGrpc(client.layer->Forward(context.get(), request, &response)).code(),
              kCancelled);
    canceller.join();
    // The server's side learns of it soon after.
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  WaitUntil([&] {
    return service.Metric("lamina_admission_rejections_total{reason=\"cancelled\"}") > 0 ||
           client.Describe().forward_count() > 0;
  });
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  EXPECT_TRUE(client.Send(request).ok());
}

TEST_F(EndingsTest, AMutationThatWaitsForItsPredecessorCanBeCutShort) {
  const v1::ForwardRequest first = client.TrainRequest();
  client.Took();
  const v1::ForwardRequest second = client.TrainRequest();
  Blocker blocker(service.engine());
  Async running(client, first);
  WaitUntil([&] { return Queued(service, 1); });
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  v1::ForwardResponse response;
  EXPECT_EQ(FromGrpc(client.layer->Forward(&context, second, &response)).code(), kDeadline);
  blocker.Release();
  EXPECT_TRUE(running.Join().ok());
  EXPECT_TRUE(client.Send(second).ok());
  EXPECT_EQ(client.Describe().forward_count(), 2u);
}

// --- a session that ends under a running call ---

TEST_F(EndingsTest, ADeletedSessionsRunningCallFinishesInItsRegions) {
  const MappedRegion region = client.Region();
  v1::ForwardRequest request = client.TrainRequest();
  std::memcpy(region.data, request.input().inline_data().data(), kBytes);
  *request.mutable_input() = SliceOf(region.id, 0);
  *request.mutable_output() = TargetOf(region.id, 8192);
  Client witness(service.address());
  const std::string expected =
      witness.Do(witness.EvalRequest()).output().inline_data();  // no dropout: the same
  {
    Blocker blocker(service.engine());
    Async running(client, request);
    WaitUntil([&] { return Queued(service, 1); });
    v1::DeleteSessionRequest remove;
    remove.set_session_id(client.session_id);
    EXPECT_TRUE(client.Send(remove).ok()) << "it does not wait for the device";
    EXPECT_EQ(client.Send(request).code(), kNotFound) << "no new call";
    EXPECT_EQ(service.sessions().live_regions(), 1) << "held by the call";
    EXPECT_TRUE(service.ended().empty());
    blocker.Release();
    EXPECT_TRUE(running.Join().ok());
  }
  EXPECT_EQ(std::string(region.data + 8192, kBytes), expected);
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(service.ended(), std::vector<std::string>{"deleted"});
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0) << "its context went with it";
}

// In the middle of a step, which another mutation of the session and a call of another one wait
// for.
class MidStepTest : public EndingsTest, public ::testing::WithParamInterface<std::string> {
 protected:
  MidStepTest() : stream_context(NewContext()) {
    stream = client.sessions->KeepAlive(stream_context.get());
    v1::KeepAliveRequest hello;
    hello.set_session_id(client.session_id);
    v1::KeepAliveResponse response;
    EXPECT_TRUE(stream->Write(hello) && stream->Read(&response));
  }
  ~MidStepTest() override {
    stream_context->TryCancel();
    (void)stream->Finish();
  }

  // Ends the client's session in the way that the case is called; it is gone when this returns.
  void End() {
    if (GetParam() == "deleted") {
      v1::DeleteSessionRequest request;
      request.set_session_id(client.session_id);
      EXPECT_TRUE(client.Send(request).ok());
    } else if (GetParam() == "keep_alive_closed") {
      stream->WritesDone();
    } else {
      stream_context->TryCancel();
    }
    WaitUntil([&] { return service.sessions().live_sessions() == 1; });
    EXPECT_TRUE(service.ended().empty()) << "a call holds it";
  }

  void Hold(int64_t op) { service.backend().hold_op = op; }
  void WaitUntilHeld() {
    WaitUntil([&] { return service.backend().holding.load(); });
  }
  void LetGo() { service.backend().holding = false; }

  const std::unique_ptr<grpc::ClientContext> stream_context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::KeepAliveRequest, v1::KeepAliveResponse>> stream;
};

TEST_P(MidStepTest, AForwardFinishesInItsRegionsAndLeavesNoContext) {
  Client witness(service.address());
  const std::string expected = witness.Do(witness.EvalRequest()).output().inline_data();
  const MappedRegion region = client.Region();
  v1::ForwardRequest first = client.TrainRequest();
  *first.mutable_output() = TargetOf(region.id, 0);
  client.Took();
  v1::ForwardRequest second = client.TrainRequest();
  *second.mutable_output() = TargetOf(region.id, 8192);
  Hold(3);
  Async running(client, first);
  WaitUntilHeld();
  Async waiting(client, second), other(witness, witness.EvalRequest());
  WaitUntil([&] { return Queued(service, 1); });
  // The one that waits for its turn has found its session by then.
  WaitUntil([&] {
    return service.Metric(
               "grpc_server_started_total{grpc_method=\"Forward\",grpc_service=\"lamina."
               "v1.LayerService\",grpc_type=\"unary\"}") == 4;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  End();
  EXPECT_EQ(client.Send(client.EvalRequest()).code(), kNotFound) << "no new call";
  EXPECT_EQ(service.sessions().live_regions(), 1);
  LetGo();
  EXPECT_TRUE(running.Join().ok());
  EXPECT_TRUE(waiting.Join().ok());
  EXPECT_TRUE(other.Join().ok()) << "the other session did not notice";
  EXPECT_EQ(std::string(region.data, kBytes), expected);
  EXPECT_EQ(std::string(region.data + 8192, kBytes), expected);
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_EQ(service.ended(), std::vector<std::string>{GetParam()});
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(service.sessions().region_bytes(), 0u);
  EXPECT_EQ(witness.Describe().forward_count(), 2u);
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0);
}

TEST_P(MidStepTest, ABackwardAddsItsGradientsWholly) {
  Client witness(service.address());
  witness.Back(witness.Train());
  const std::string expected = witness.Parameters(/*gradients=*/true);
  witness.Do(witness.ZeroRequest());
  const std::string context = client.Train();
  Hold(3);
  Async running(client, client.BackwardRequestFor(context));
  WaitUntilHeld();
  End();
  LetGo();
  EXPECT_TRUE(running.Join().ok());
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_EQ(witness.Parameters(/*gradients=*/true), expected);
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0);
}

INSTANTIATE_TEST_SUITE_P(Ends, MidStepTest,
                         ::testing::Values("deleted", "keep_alive_closed", "keep_alive_broken"),
                         [](const auto& ending) { return ending.param; });

TEST_F(EndingsTest, AReleasedRegionStaysUntilTheCallIsDone) {
  const MappedRegion region = client.Region();
  v1::ForwardRequest request = client.EvalRequest();
  *request.mutable_output() = TargetOf(region.id, 0);
  Blocker blocker(service.engine());
  Async running(client, request);
  WaitUntil([&] { return Queued(service, 1); });
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(region.id);
  EXPECT_TRUE(client.Send(release).ok());
  EXPECT_EQ(service.sessions().region_bytes(), 65536u);
  blocker.Release();
  EXPECT_TRUE(running.Join().ok());
  EXPECT_EQ(service.sessions().region_bytes(), 0u);
  EXPECT_EQ(std::string(region.data, kBytes),
            client.Do(client.EvalRequest()).output().inline_data());
}

TEST_F(EndingsTest, AClientThatDiesMidStepLeavesNothing) {
  Client witness(service.address());
  {
    Blocker blocker(service.engine());
    auto dying = std::make_unique<Client>(service.address());
    const MappedRegion region = dying->Region();
    const auto stream_context = NewContext();
    auto stream = dying->sessions->KeepAlive(stream_context.get());
    v1::KeepAliveRequest hello;
    hello.set_session_id(dying->session_id);
    ASSERT_TRUE(stream->Write(hello));
    v1::KeepAliveResponse response;
    ASSERT_TRUE(stream->Read(&response));
    v1::ForwardRequest request = dying->TrainRequest();
    *request.mutable_input() = SliceOf(region.id, 0);
    *request.mutable_output() = TargetOf(region.id, 8192);
    const auto context = NewContext();
    std::thread call([&] {
      v1::ForwardResponse answer;
      EXPECT_FALSE(dying->layer->Forward(context.get(), request, &answer).ok());
    });
    WaitUntil([&] { return Queued(service, 1); });
    // As when its process is killed: the stream and the call break together.
    stream_context->TryCancel();
    context->TryCancel();
    (void)stream->Finish();
    call.join();
    WaitUntil([&] { return service.sessions().live_sessions() == 2; });
    EXPECT_EQ(service.sessions().live_regions(), 1) << "the device may still come to it";
  }
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  WaitUntil([&] { return witness.Describe().outstanding_contexts() == 0; });
  EXPECT_EQ(service.sessions().region_bytes(), 0u);
  EXPECT_TRUE(witness.Send(witness.EvalRequest()).ok());
}

TEST_F(EndingsTest, SessionsComeAndGoUnderLoad) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 8; ++i) {
        Client mine(service.address());
        const MappedRegion region = mine.Region();
        v1::ForwardRequest request = mine.EvalRequest();
        *request.mutable_output() = TargetOf(region.id, 0);
        Async a(mine, request), b(mine, request);
        v1::DeleteSessionRequest remove;
        remove.set_session_id(mine.session_id);
        if ((i + t) % 2 == 0) std::this_thread::yield();
        EXPECT_TRUE(mine.Send(remove).ok());
        for (Async* call : {&a, &b}) {
          const absl::Status status = call->Join();
          EXPECT_TRUE(status.ok() || status.code() == kNotFound) << status;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(service.sessions().live_sessions(), 1);
  EXPECT_EQ(service.ended().size(), 32u);
}

// --- refusals ---

class SmallQueueTest : public EndingsTest {
 protected:
  SmallQueueTest() : EndingsTest({.queue_capacity = 1}) {}
};

TEST_F(SmallQueueTest, AFullQueueRefusesEveryCallThatNeedsTheDevice) {
  v1::CreateStackRequest create;
  create.set_name("t");
  *create.mutable_config() = TinyProto();
  const v1::ForwardRequest train = client.TrainRequest();
  Blocker blocker(service.engine());
  Async waiting(client, client.EvalRequest());
  WaitUntil([&] { return Queued(service, 1); });
  EXPECT_THAT(client.Send(client.EvalRequest()), IsStatus(kExhausted, "queue"));
  EXPECT_THAT(client.Send(train), IsStatus(kExhausted, "queue"));
  EXPECT_THAT(client.Send(client.ApplyRequest()), IsStatus(kExhausted, "queue"));
  EXPECT_THAT(client.Send(client.ZeroRequest()), IsStatus(kExhausted, "queue"));
  EXPECT_THAT(client.Send(client.SetRequest()), IsStatus(kExhausted, "queue"));
  EXPECT_THAT(client.Send(create), IsStatus(kExhausted, "queue"));
  blocker.Release();
  EXPECT_TRUE(waiting.Join().ok());
  EXPECT_TRUE(client.Send(train).ok()) << "the refused ones used no sequence up";
}

TEST_F(EndingsTest, AFailedDeviceAnswersUnavailable) {
  service.backend().fail_op = 0;
  const absl::Status failure = client.Send(client.EvalRequest());
  EXPECT_FALSE(failure.ok());
  EXPECT_FALSE(service.engine().health().ok());
  EXPECT_EQ(client.Send(client.EvalRequest()).code(), kUnavailable);
  EXPECT_EQ(client.Send(client.TrainRequest()).code(), kUnavailable);
  EXPECT_EQ(client.Send(client.ZeroRequest()).code(), kUnavailable);
  // Sessions still end in order.
  v1::DeleteSessionRequest remove;
  remove.set_session_id(client.session_id);
  EXPECT_TRUE(client.Send(remove).ok());
  EXPECT_EQ(service.ended(), std::vector<std::string>{"deleted"});
}

// --- the drain ---

TEST_F(EndingsTest, ADrainRefusesNewCallsAndWaitsForRunningOnes) {
  const std::string context = client.Train();
  const MappedRegion region = client.Region();
  std::thread closer;
  {
    Blocker blocker(service.engine());
    Async running(client, client.EvalRequest());
    WaitUntil([&] { return Queued(service, 1); });
    EXPECT_FALSE(service.gate().Close(absl::Now() + absl::Milliseconds(50))) << "one is inside";
    bool left = false;
    closer = std::thread([&] { left = service.gate().Close(absl::Now() + absl::Seconds(30)); });

    v1::CreateStackRequest create;
    create.set_name("t");
    *create.mutable_config() = TinyProto();
    v1::GetStackRequest get;
    get.set_name("s");
    v1::UpdateStackRequest update;
    update.set_name("s");
    v1::DeleteStackRequest drop;
    drop.set_name("s");
    v1::PlanMemoryRequest plan;
    *plan.mutable_config() = TinyProto();
    v1::GetParametersRequest parameters;
    parameters.set_stack("s");
    v1::GetGradientsRequest gradients;
    gradients.set_stack("s");
    v1::SaveCheckpointRequest save;
    save.set_stack("s");
    v1::LoadCheckpointRequest load;
    load.set_stack("s");
    v1::CreateRegionRequest region_request;
    region_request.set_session_id(client.session_id);
    region_request.set_size_bytes(1);
    v1::ListRegionsRequest list;
    list.set_session_id(client.session_id);
    v1::ReleaseContextRequest release;
    release.set_stack("s");
    release.set_session_id(client.session_id);
    release.set_context_id(context);
    for (const absl::Status& status : {client.Send(client.EvalRequest()),
                                       client.Send(client.TrainRequest()),
                                       client.Send(client.BackwardRequestFor(context)),
                                       client.Send(client.ApplyRequest()),
                                       client.Send(client.ZeroRequest()),
                                       client.Send(client.SetRequest()),
                                       client.Send(release),
                                       client.Send(create),
                                       client.Send(get),
                                       client.Send(v1::ListStacksRequest()),
                                       client.Send(update),
                                       client.Send(drop),
                                       client.Send(plan),
                                       client.Send(parameters),
                                       client.Send(gradients),
                                       client.Send(save),
                                       client.Send(load),
                                       client.Send(v1::CreateSessionRequest()),
                                       client.Send(region_request),
                                       client.Send(list)}) {
      EXPECT_THAT(status, IsStatus(kUnavailable, "draining"));
    }
    // Giving back is still possible, and asking who it is.
    EXPECT_TRUE(client.Send(v1::GetServerInfoRequest()).ok());
    v1::ReleaseRegionRequest give_back;
    give_back.set_session_id(client.session_id);
    give_back.set_region_id(region.id);
    EXPECT_TRUE(client.Send(give_back).ok());
    blocker.Release();
    EXPECT_TRUE(running.Join().ok());
    closer.join();
    EXPECT_TRUE(left);
  }
  v1::DeleteSessionRequest remove;
  remove.set_session_id(client.session_id);
  EXPECT_TRUE(client.Send(remove).ok());
}

TEST_F(EndingsTest, ShuttingDownCutsTheStreamsAndReturns) {
  const auto context = NewContext();
  auto stream = client.sessions->KeepAlive(context.get());
  v1::KeepAliveRequest hello;
  hello.set_session_id(client.session_id);
  ASSERT_TRUE(stream->Write(hello));
  v1::KeepAliveResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_TRUE(service.gate().Close(absl::Now() + absl::Seconds(10)));
  service.server().Shutdown(absl::Now() + absl::Milliseconds(50));
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_FALSE(stream->Finish().ok());
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_EQ(service.ended(), std::vector<std::string>{"shutdown"});
}

}  // namespace
}  // namespace lamina::testing
