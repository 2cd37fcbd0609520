// SessionService: sessions, KeepAlive streams and regions, and each status that the contract lists.
#include <chrono>
#include <filesystem>
#include <limits>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/server/service/service_rig.h"
#include "tests/support/wait.h"

namespace lamina::testing {
namespace {

using ::testing::ElementsAre;

class Stream {
 public:
  explicit Stream(Client& client)
      : context_(NewContext()), stream_(client.sessions->KeepAlive(context_.get())) {}

  bool Say(const std::string& session_id) {
    v1::KeepAliveRequest request;
    request.set_session_id(session_id);
    return stream_->Write(request);
  }
  // The answer's applied_sequence, or -1 where the stream has ended.
  int64_t Hear() {
    v1::KeepAliveResponse response;
    return stream_->Read(&response) ? static_cast<int64_t>(response.applied_sequence()) : -1;
  }
  void Close() { stream_->WritesDone(); }
  void Cancel() { context_->TryCancel(); }
  absl::Status Finish() {
    const absl::Status status = FromGrpc(stream_->Finish());
    finished_ = true;
    return status;
  }
  ~Stream() {
    if (finished_) return;
    Cancel();
    (void)stream_->Finish();
  }

 private:
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::KeepAliveRequest, v1::KeepAliveResponse>> stream_;
  bool finished_ = false;
};

absl::Status List(Client& client, const std::string& session_id) {
  v1::ListRegionsRequest request;
  request.set_session_id(session_id);
  return client.Send(request);
}

std::string NewSession(Client& client, double resume_grace_seconds = 0) {
  v1::CreateSessionRequest request;
  request.set_resume_grace_seconds(resume_grace_seconds);
  return client.Do(request).session_id();
}

TEST(SessionService, CreateSessionSaysTheTerms) {
  Service service({.sessions = {.lease = absl::Seconds(7),
                                .session_cap = 2,
                                .region_cap = 5,
                                .region_cap_bytes = 1 << 20}});
  Client client(service.address());
  v1::CreateSessionRequest request;
  request.set_client_name("somebody");
  const v1::CreateSessionResponse answer = client.Do(request);
  EXPECT_EQ(answer.session_id().size(), 32u);
  EXPECT_EQ(answer.lease_seconds(), 7);
  EXPECT_EQ(answer.region_cap(), 5);
  EXPECT_EQ(answer.region_cap_bytes(), 1u << 20);
  EXPECT_EQ(answer.broker_path(), client.broker_path);
  EXPECT_THAT(client.Send(request), IsStatus(kExhausted, "2 sessions"));
  request.set_client_name("\n");
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "client_name"));
}

TEST(SessionService, CreateSessionGrantsAGraceUpToTheCap) {
  Service service({.sessions = {.resume_grace_cap = absl::Seconds(5)}});
  Client client(service.address());
  v1::CreateSessionRequest request;
  EXPECT_EQ(client.Do(request).resume_grace_seconds(), 0);
  const double infinity = std::numeric_limits<double>::infinity();
  for (const auto& [asked, granted] :
       {std::pair{0.25, 0.25}, {5.0, 5.0}, {6.0, 5.0}, {infinity, 5.0}, {-0.0, 0.0}}) {
    request.set_resume_grace_seconds(asked);
    EXPECT_EQ(client.Do(request).resume_grace_seconds(), granted);
  }
  const int64_t sessions = service.sessions().live_sessions();
  for (const double asked : {-1e-9, -infinity, std::numeric_limits<double>::quiet_NaN()}) {
    request.set_resume_grace_seconds(asked);
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "resume_grace_seconds"));
  }
  EXPECT_EQ(service.sessions().live_sessions(), sessions);
}

TEST(SessionService, DeleteSession) {
  Service service;
  Client client(service.address());
  client.Create();
  client.Train();
  client.Region();
  v1::DeleteSessionRequest request;
  request.set_session_id(client.session_id);
  EXPECT_TRUE(client.Send(request).ok());
  // A call that was answered may hold the session for a moment still. Its regions go last.
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(client.Describe().outstanding_contexts(), 0);
  EXPECT_THAT(service.ended(), ElementsAre("deleted"));
  const absl::Status again = client.Send(request);
  EXPECT_THAT(again, IsStatus(kNotFound, "session_id"));
  EXPECT_EQ(std::string(again.message()).find(client.session_id), std::string::npos);
}

// Every call that names a session answers alike for one that is none.
TEST(SessionService, NoSuchSession) {
  Service service;
  Client client(service.address());
  client.Create();
  const std::string known = client.session_id;
  for (const std::string& id : {std::string(32, '0'), std::string(), known.substr(1)}) {
    client.session_id = id;
    v1::CreateRegionRequest create;
    create.set_session_id(id);
    create.set_size_bytes(1);
    v1::ReleaseRegionRequest release;
    release.set_session_id(id);
    v1::DeleteSessionRequest remove;
    remove.set_session_id(id);
    v1::ReleaseContextRequest context;
    context.set_stack("s");
    context.set_session_id(id);
    v1::GetParametersRequest get;
    get.set_stack("s");
    get.set_session_id(id);
    *get.mutable_target() = TargetOf("x", 0);
    v1::GetGradientsRequest gradients;
    gradients.set_stack("s");
    gradients.set_session_id(id);
    *gradients.mutable_target() = TargetOf("x", 0);
    for (const absl::Status& status :
         {client.Send(create), client.Send(release), client.Send(remove), List(client, id),
          client.Send(context), client.Send(get), client.Send(gradients),
          client.Send(client.EvalRequest()), client.Send(client.TrainRequest()),
          client.Send(client.BackwardRequestFor("c")), client.Send(client.ApplyRequest()),
          client.Send(client.ZeroRequest()), client.Send(client.SetRequest())}) {
      EXPECT_THAT(status, IsStatus(kNotFound, "session_id"));
      EXPECT_TRUE(id.empty() || std::string(status.message()).find(id) == std::string::npos);
    }
    Stream stream(client);
    stream.Say(id);
    EXPECT_EQ(stream.Hear(), -1);
    EXPECT_THAT(stream.Finish(), IsStatus(kNotFound, "session_id"));
  }
  client.session_id = known;
  EXPECT_EQ(client.Describe().forward_count(), 0u);
  EXPECT_TRUE(client.Send(client.EvalRequest()).ok());
}

// --- KeepAlive ---

TEST(KeepAlive, AnswersWithTheAppliedSequence) {
  Service service;
  Client client(service.address());
  client.Create();
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  client.Train();
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 1);
  client.Train();
  ASSERT_TRUE(stream.Say("")) << "only the first message must name it";
  EXPECT_EQ(stream.Hear(), 2);
}

TEST(KeepAlive, ItsEndIsTheSessionsEnd) {
  Service service;
  Client client(service.address());
  client.Create();
  for (const bool cancel : {false, true}) {
    client.session_id = NewSession(client);
    client.sequence = 0;
    client.Train();
    client.Region();
    Stream stream(client);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 0 + 1);
    if (cancel) {
      stream.Cancel();
      EXPECT_EQ(stream.Finish().code(), kCancelled);
    } else {
      stream.Close();
      EXPECT_EQ(stream.Hear(), -1);
      EXPECT_TRUE(stream.Finish().ok());
    }
    WaitUntil([&] { return List(client, client.session_id).code() == kNotFound; });
    WaitUntil([&] { return client.Describe().outstanding_contexts() == 0; });
    WaitUntil([&] { return service.sessions().live_regions() == 0; });
  }
  EXPECT_THAT(service.ended(), ElementsAre("keep_alive_closed", "keep_alive_broken"));
}

TEST(KeepAlive, ADeadConnectionIsTheSessionsEnd) {
  Service service;
  Client witness(service.address());
  {
    Client client(service.address());
    client.Region();
    Stream stream(client);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 0);
    EXPECT_EQ(service.sessions().live_regions(), 1);
  }
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_EQ(service.sessions().live_sessions(), 1) << "the witness";
}

TEST(KeepAlive, OneASession) {
  Service service;
  Client client(service.address());
  Stream first(client), second(client);
  ASSERT_TRUE(first.Say(client.session_id));
  EXPECT_EQ(first.Hear(), 0);
  ASSERT_TRUE(second.Say(client.session_id));
  EXPECT_EQ(second.Hear(), -1);
  EXPECT_THAT(second.Finish(), IsStatus(kExists, "KeepAlive"));
  ASSERT_TRUE(first.Say(client.session_id)) << "the refused one has ended nothing";
  EXPECT_EQ(first.Hear(), 0);
}

TEST(KeepAlive, KeepsOneSession) {
  Service service;
  Client client(service.address());
  const std::string other = NewSession(client);
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  stream.Say(other);
  EXPECT_EQ(stream.Hear(), -1);
  EXPECT_THAT(stream.Finish(), IsStatus(kInvalid, "session_id"));
  EXPECT_TRUE(List(client, other).ok()) << "the other one lives on";
  EXPECT_EQ(List(client, client.session_id).code(), kNotFound);
}

TEST(KeepAlive, SilenceEndsTheSessionAndTheStream) {
  Service service({.sessions = {.lease = absl::Milliseconds(300)}});
  Client client(service.address());
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  EXPECT_EQ(stream.Hear(), -1) << "it waits for nothing";
  EXPECT_THAT(stream.Finish(), IsStatus(kDeadline, "lease"));
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_THAT(service.ended(), ElementsAre("keep_alive_silent"));
}

TEST(KeepAlive, AStreamThatNamesNoSessionIsClosed) {
  Service service({.sessions = {.lease = absl::Milliseconds(200)}});
  Client client(service.address());
  Stream stream(client);
  EXPECT_EQ(stream.Hear(), -1);
  EXPECT_THAT(stream.Finish(), IsStatus(kDeadline, "no message"));
}

TEST(KeepAlive, HoldsTheLeaseByItself) {
  Service service({.sessions = {.lease = absl::Milliseconds(600)}});
  Client client(service.address());
  Stream stream(client);
  for (int i = 0; i < 24; ++i) {
    ASSERT_TRUE(stream.Say(client.session_id));
    ASSERT_EQ(stream.Hear(), 0) << i;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_TRUE(List(client, client.session_id).ok());
}

TEST(KeepAlive, DeletingTheSessionEndsTheStream) {
  Service service;
  Client client(service.address());
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  v1::DeleteSessionRequest request;
  request.set_session_id(client.session_id);
  client.Do(request);
  EXPECT_EQ(stream.Hear(), -1);
  EXPECT_TRUE(stream.Finish().ok());
  EXPECT_THAT(service.ended(), ElementsAre("deleted"));
}

TEST(KeepAlive, ManyStreamsTakeNoThreadEach) {
  Service service;
  Client client(service.address());
  const auto threads = [] {
    int count = 0;
    for ([[maybe_unused]] const auto& entry :
         std::filesystem::directory_iterator("/proc/self/task"))
      ++count;
    return count;
  };
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < 100; ++i) {
    const std::string id = NewSession(client);
    streams.push_back(std::make_unique<Stream>(client));
    ASSERT_TRUE(streams.back()->Say(id));
    ASSERT_EQ(streams.back()->Hear(), 0);
  }
  EXPECT_EQ(service.sessions().live_sessions(), 101);
  EXPECT_LT(threads(), 50);
}

// --- a KeepAlive stream that breaks, of a session with a grace ---

class ResumeTest : public ::testing::Test {
 protected:
  explicit ResumeTest(const ServiceOptions& options = {}, double grace = 60)
      : service(options), client(service.address()) {
    client.Create();
    client.session_id = NewSession(client, grace);
  }

  // How many sessions were resumed after a break, and by taking over.
  std::pair<double, double> Resumed() {
    return {service.Metric("lamina_sessions_resumed_total{after=\"break\"}"),
            service.Metric("lamina_sessions_resumed_total{after=\"takeover\"}")};
  }

  Service service;
  Client client;
};

TEST_F(ResumeTest, AnotherStreamResumesTheSessionAndLearnsWhatWasApplied) {
  const MappedRegion region = client.Region();
  const std::string context = client.Train();
  {
    Stream first(client);
    ASSERT_TRUE(first.Say(client.session_id));
    EXPECT_EQ(first.Hear(), 1);
    first.Cancel();
    EXPECT_EQ(first.Finish().code(), kCancelled);
  }
  WaitUntil([&] { return service.sessions().adrift_sessions() == 1; });
  // Meanwhile its calls are served.
  client.Back(context);
  Stream second(client);
  ASSERT_TRUE(second.Say(client.session_id));
  EXPECT_EQ(second.Hear(), 2);
  EXPECT_EQ(service.sessions().adrift_sessions(), 0);
  EXPECT_EQ(service.sessions().live_regions(), 1);
  EXPECT_EQ(Resumed(), (std::pair{1.0, 0.0}));
  const std::string log = service.Log();
  EXPECT_NE(log.find("event=keep_alive_broken session="), std::string::npos) << log;
  EXPECT_NE(log.find("after=break adrift_seconds="), std::string::npos) << log;
  EXPECT_EQ(log.find(client.session_id), std::string::npos);
  EXPECT_TRUE(service.ended().empty());
}

TEST_F(ResumeTest, ADeadConnectionIsResumedOnAnother) {
  const std::string context = client.Train();
  {
    Client dying(service.address());
    Stream stream(dying);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 1);
  }
  WaitUntil([&] { return service.sessions().adrift_sessions() == 1; });
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 1);
  client.Back(context);
}

// A repeat of what was lost runs once, whether the first one had run or not.
TEST_F(ResumeTest, WhatWasSentBeforeTheBreakRunsOnce) {
  const v1::ForwardRequest request = client.TrainRequest();
  {
    Stream stream(client);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 0);
    Blocker blocker(service.engine());
    grpc::ClientContext context;
    std::thread call([&] {
      v1::ForwardResponse unheard;
      EXPECT_FALSE(client.layer->Forward(&context, request, &unheard).ok());
    });
    WaitUntil([&] { return service.Metric("lamina_queue_depth") == 1; });
    stream.Cancel();
    context.TryCancel();
    call.join();
    WaitUntil([&] { return service.sessions().adrift_sessions() == 1; });
  }
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_GE(stream.Hear(), 0);
  EXPECT_FALSE(client.Do(request).context_id().empty());
  EXPECT_EQ(client.Describe().forward_count(), 1u);
  EXPECT_EQ(client.Describe().outstanding_contexts(), 1);
  ASSERT_TRUE(stream.Say(""));
  EXPECT_EQ(stream.Hear(), 1);
}

TEST_F(ResumeTest, AHalfCloseIsTheSessionsEndAllTheSame) {
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  stream.Close();
  EXPECT_EQ(stream.Hear(), -1);
  EXPECT_TRUE(stream.Finish().ok());
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_THAT(service.ended(), ElementsAre("keep_alive_closed"));
}

TEST_F(ResumeTest, ANewStreamTakesOverFromOneThatIsOpen) {
  const std::string context = client.Train();
  Stream old(client), young(client);
  ASSERT_TRUE(old.Say(client.session_id));
  EXPECT_EQ(old.Hear(), 1);
  ASSERT_TRUE(young.Say(client.session_id));
  EXPECT_EQ(young.Hear(), 1);
  EXPECT_EQ(old.Hear(), -1);
  EXPECT_THAT(old.Finish(), IsStatus(absl::StatusCode::kAborted, "took over"));
  EXPECT_EQ(Resumed(), (std::pair{0.0, 1.0}));
  client.Back(context);
  ASSERT_TRUE(young.Say(""));
  EXPECT_EQ(young.Hear(), 2);
  EXPECT_EQ(service.sessions().adrift_sessions(), 0) << "the old one's end is nothing to it";
  EXPECT_TRUE(service.ended().empty());
}

TEST_F(ResumeTest, AdriftItCanBeDeleted) {
  client.Region();
  {
    Stream stream(client);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 0);
  }
  WaitUntil([&] { return service.sessions().adrift_sessions() == 1; });
  v1::DeleteSessionRequest request;
  request.set_session_id(client.session_id);
  client.Do(request);
  // The broker's thread may have it in hand for a moment still.
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_THAT(service.ended(), ElementsAre("deleted"));
}

TEST_F(ResumeTest, ADaemonThatDrainsDoesNotWait) {
  Stream stream(client);
  ASSERT_TRUE(stream.Say(client.session_id));
  EXPECT_EQ(stream.Hear(), 0);
  EXPECT_TRUE(service.gate().Close(absl::Now() + absl::Seconds(10)));
  stream.Cancel();
  (void)stream.Finish();
  WaitUntil([&] { return !service.ended().empty(); });
  EXPECT_THAT(service.ended(), ElementsAre("shutdown"));
}

class ShortGraceTest : public ResumeTest {
 protected:
  ShortGraceTest() : ResumeTest({}, 0.3) {}
};

TEST_F(ShortGraceTest, WhenTheGraceIsOverEverythingIsFreed) {
  Client witness(service.address());
  const MappedRegion region = client.Region();
  client.Train();
  {
    Stream stream(client);
    ASSERT_TRUE(stream.Say(client.session_id));
    EXPECT_EQ(stream.Hear(), 1);
  }
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_THAT(service.ended(), ElementsAre("grace_over"));
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0);
  Stream late(client);
  late.Say(client.session_id);
  EXPECT_EQ(late.Hear(), -1);
  EXPECT_THAT(late.Finish(), IsStatus(kNotFound, "session_id"));
  EXPECT_TRUE(witness.Send(witness.EvalRequest()).ok());
}

// The grace ends the session under a call that waits for the device: that finishes first.
TEST_F(ShortGraceTest, ACallOutlivesTheGrace) {
  const MappedRegion region = client.Region();
  v1::ForwardRequest request = client.TrainRequest();
  *request.mutable_output() = TargetOf(region.id, 0);
  Client witness(service.address());
  absl::Status status;
  {
    Blocker blocker(service.engine());
    std::thread call([&] { status = client.Send(request); });
    WaitUntil([&] { return service.Metric("lamina_queue_depth") == 1; });
    {
      Stream stream(client);
      ASSERT_TRUE(stream.Say(client.session_id));
      EXPECT_EQ(stream.Hear(), 0);
    }
    WaitUntil([&] { return List(client, client.session_id).code() == kNotFound; });
    EXPECT_EQ(service.sessions().live_regions(), 1) << "held by the call";
    EXPECT_TRUE(service.ended().empty());
    blocker.Release();
    call.join();
  }
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(std::string(region.data, kBytes),
            witness.Do(witness.EvalRequest()).output().inline_data());
  WaitUntil([&] { return service.sessions().live_regions() == 0; });
  EXPECT_THAT(service.ended(), ElementsAre("grace_over"));
  EXPECT_EQ(witness.Describe().outstanding_contexts(), 0);
}

// --- regions ---

TEST(SessionService, CreateListReleaseRegions) {
  Service service;
  Client client(service.address());
  v1::CreateRegionRequest create;
  create.set_session_id(client.session_id);
  create.set_size_bytes(5000);
  const v1::Region first = client.Do(create).region();
  EXPECT_EQ(first.length_bytes(), 8192u);
  EXPECT_EQ(first.kind(), v1::REGION_KIND_MEMFD);
  EXPECT_FALSE(first.registered()) << "kernels of the CPU need no registration";
  create.set_kind(v1::REGION_KIND_MEMFD);
  const v1::Region second = client.Do(create).region();
  v1::ListRegionsRequest list;
  list.set_session_id(client.session_id);
  const v1::ListRegionsResponse listed = client.Do(list);
  ASSERT_EQ(listed.regions_size(), 2);
  EXPECT_EQ(listed.regions(0).SerializeAsString(), first.SerializeAsString());
  EXPECT_EQ(listed.regions(1).SerializeAsString(), second.SerializeAsString());
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(first.region_id());
  client.Do(release);
  EXPECT_EQ(client.Do(list).regions_size(), 1);
  EXPECT_THAT(client.Send(release), IsStatus(kNotFound, "region_id"));

  Client other(service.address());
  release.set_session_id(other.session_id);
  release.set_region_id(second.region_id());
  EXPECT_THAT(other.Send(release), IsStatus(kNotFound, "region_id"));
  list.set_session_id(other.session_id);
  EXPECT_EQ(other.Do(list).regions_size(), 0);
  EXPECT_EQ(service.sessions().live_regions(), 1);
}

TEST(SessionService, RegionsAreRegisteredForACard) {
  Service service({.host_memory = false});
  Client client(service.address());
  v1::CreateRegionRequest create;
  create.set_session_id(client.session_id);
  create.set_size_bytes(1);
  EXPECT_TRUE(client.Do(create).region().registered());
}

TEST(SessionService, RegionsThatAreRefused) {
  Service service({.sessions = {.region_cap = 2, .region_cap_bytes = 16384}});
  Client client(service.address());
  v1::CreateRegionRequest create;
  create.set_session_id(client.session_id);
  for (const uint64_t size : {uint64_t{0}, (uint64_t{1} << 46) + 1, ~uint64_t{0}}) {
    create.set_size_bytes(size);
    EXPECT_THAT(client.Send(create), IsStatus(kInvalid, absl::StrCat("size_bytes: ", size)));
  }
  create.set_size_bytes(16385);
  EXPECT_THAT(client.Send(create), IsStatus(kExhausted, "16384"));
  create.set_size_bytes(1);
  create.set_kind(v1::REGION_KIND_DEVICE);
  EXPECT_THAT(client.Send(create), IsStatus(kUnimplemented, "REGION_KIND_DEVICE"));
  create.set_kind(static_cast<v1::RegionKind>(9));
  EXPECT_THAT(client.Send(create), IsStatus(kInvalid, "kind: 9"));
  create.clear_kind();
  client.Do(create);
  client.Do(create);
  EXPECT_THAT(client.Send(create), IsStatus(kExhausted, "2 regions"));
  EXPECT_EQ(service.sessions().live_regions(), 2);
}

}  // namespace
}  // namespace lamina::testing
