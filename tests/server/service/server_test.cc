// What surrounds the services: addresses, health, the cap on messages, RPC metrics.
#include <grpcpp/create_channel.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <grpcpp/impl/codegen/rpc_method.h>
#include <grpcpp/impl/codegen/sync_stream.h>
#include <sys/stat.h>

#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "grpc/health/v1/health.pb.h"
#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

using Health = grpc::health::v1::HealthCheckResponse;

// The status, or what Check answered instead.
std::string Check(Client& client, const std::string& name) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(name);
  Health response;
  const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Check",
                                         grpc::internal::RpcMethod::NORMAL_RPC);
  const absl::Status status =
      FromGrpc(grpc::internal::BlockingUnaryCall<grpc::health::v1::HealthCheckRequest, Health>(
          client.channel.get(), method, NewContext().get(), request, &response));
  return status.ok() ? Health::ServingStatus_Name(response.status())
                     : absl::StatusCodeToString(status.code());
}

constexpr const char* kNames[] = {"", "lamina.v1.LayerService", "lamina.v1.ConfigService",
                                  "lamina.v1.SessionService"};

TEST(Server, HealthOfTheWholeAndOfEachService) {
  Service service;
  Client client(service.address());
  for (const char* name : kNames) EXPECT_EQ(Check(client, name), "SERVING") << name;
  EXPECT_EQ(Check(client, "none"), "NOT_FOUND");
  service.server().SetServing(false);
  for (const char* name : kNames) EXPECT_EQ(Check(client, name), "NOT_SERVING") << name;
}

TEST(Server, HealthIsWatched) {
  Service service;
  Client client(service.address());
  for (const char* name : kNames) {
    service.server().SetServing(true);
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(name);
    const auto context = NewContext();
    const grpc::internal::RpcMethod method("/grpc.health.v1.Health/Watch",
                                           grpc::internal::RpcMethod::SERVER_STREAMING);
    const std::unique_ptr<grpc::ClientReader<Health>> watch(
        grpc::internal::ClientReaderFactory<Health>::Create(client.channel.get(), method,
                                                            context.get(), request));
    Health health;
    ASSERT_TRUE(watch->Read(&health));
    EXPECT_EQ(health.status(), Health::SERVING);
    service.server().SetServing(false);
    ASSERT_TRUE(watch->Read(&health));
    EXPECT_EQ(health.status(), Health::NOT_SERVING);
    context->TryCancel();
    (void)watch->Finish();
  }
}

TEST(Server, TheSocketIsTheOwnersAlone) {
  Service service;
  struct stat found {};
  ASSERT_EQ(lstat(service.address().substr(5).c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0600u);
}

TEST(Server, ServesTcpTooAndSaysThePort) {
  Service service({.also_listen = {"127.0.0.1:0", "[::1]:0"}});
  const std::vector<std::string>& addresses = service.server().addresses();
  ASSERT_EQ(addresses.size(), 3u);
  EXPECT_EQ(addresses[0], service.address());
  EXPECT_TRUE(absl::StartsWith(addresses[1], "127.0.0.1:"));
  EXPECT_FALSE(absl::EndsWith(addresses[1], ":0"));
  Client client(addresses[1]);
  client.Create();
  EXPECT_TRUE(client.Send(client.EvalRequest()).ok());
}

TEST(Server, AddressesInUseAreNamed) {
  Service service({.also_listen = {"127.0.0.1:0"}});
  for (const std::string& address : service.server().addresses()) {
    Gate gate;
    const auto second = GrpcServer::Start({.listen = {address}}, service.state());
    ASSERT_FALSE(second.ok());
    EXPECT_THAT(second.status(), IsStatus(kUnavailable, "in use"));
    EXPECT_THAT(second.status(), IsStatus(kUnavailable, address.substr(address.find('/') + 1)));
  }
  EXPECT_TRUE(Client(service.address()).Send(v1::GetServerInfoRequest()).ok());
}

TEST(Server, TheInlineCapHoldsBothWays) {
  constexpr size_t kCap = 65536;
  Service service({.inline_cap_bytes = kCap});
  Client client(service.address());
  v1::StackConfig config = TinyProto();
  config.set_batch_size(64);
  config.set_max_seq_length(64);
  client.Create("s", config);
  v1::ForwardRequest request = client.EvalRequest();
  *request.mutable_input() = InlineNoise(1, {16, 64, kH});
  EXPECT_EQ(client.Do(request).output().inline_data().size(), kCap) << "exactly the cap";
  *request.mutable_input() = InlineNoise(1, {17, 64, kH});
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "input.inline_data"));
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, absl::StrCat(kCap)));
  // The input fits a region, and the answer no message.
  const MappedRegion region = client.Region(1 << 20);
  *request.mutable_input() = SliceOf(region.id, 0, 17 * 64 * kH * 4, {17, 64, kH});
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, absl::StrCat("cap of ", kCap)));
  *request.mutable_output() = TargetOf(region.id, 1 << 19, 17 * 64 * kH * 4);
  EXPECT_TRUE(client.Send(request).ok());
  // Far beyond it, the message is not even read.
  request.mutable_input()->set_inline_data(std::string(kCap + (size_t{2} << 20), 'x'));
  EXPECT_EQ(client.Send(request).code(), kExhausted);
  EXPECT_TRUE(client.Send(v1::GetServerInfoRequest()).ok()) << "it serves on";
}

TEST(Server, CountsEachRpcByItsCode) {
  Service service;
  Client client(service.address());
  client.Create();
  const auto series = [](const char* family, const char* service_name, const char* method,
                         const char* rest) {
    return absl::StrCat(family, "{", rest, "grpc_method=\"", method, "\",grpc_service=\"",
                        service_name, "\",grpc_type=\"unary\"}");
  };
  const char* const layer = "lamina.v1.LayerService";
  client.Do(client.EvalRequest());
  v1::ForwardRequest bad = client.EvalRequest();
  bad.set_stack("none");
  EXPECT_EQ(client.Send(bad).code(), kNotFound);
  EXPECT_EQ(client.Send(bad).code(), kNotFound);
  const auto handled = [&](const char* code) {
    return service.Metric(
        series("grpc_server_handled_total", layer, "Forward", absl::StrCat(code, ",").c_str()));
  };
  const std::string seconds = series("grpc_server_handling_seconds_count", layer, "Forward", "");
  // A call is counted when its handler is over, which is a moment after its answer, and each has a
  // handler of its own: the first one's may be the last to end.
  WaitUntil([&] {
    return handled("grpc_code=\"NOT_FOUND\"") == 2 && handled("grpc_code=\"OK\"") == 1 &&
           service.Metric(seconds) == 3;
  });
  EXPECT_EQ(handled("grpc_code=\"NOT_FOUND\""), 2);
  EXPECT_EQ(handled("grpc_code=\"OK\""), 1);
  EXPECT_EQ(service.Metric(series("grpc_server_started_total", layer, "Forward", "")), 3);
  EXPECT_EQ(service.Metric(seconds), 3);
  EXPECT_EQ(service.Metric("lamina_tensor_bytes_total{role=\"input\",transport=\"inline\"}"),
            kBytes);
}

// Who reads the log learns of sessions and stacks, and gets no capability.
TEST(Server, TheLogTellsNoCapability) {
  Service service({.sessions = {.region_cap = 1}});
  Client client(service.address());
  client.Create();
  const MappedRegion region = client.Region();
  client.Back(client.Train());
  v1::ForwardRequest bad = client.EvalRequest();
  *bad.mutable_input() = SliceOf(region.id, 1);
  EXPECT_FALSE(client.Send(bad).ok());
  v1::CreateRegionRequest more;
  more.set_session_id(client.session_id);
  more.set_size_bytes(1);
  EXPECT_FALSE(client.Send(more).ok());
  v1::CreateSessionRequest other;
  other.set_client_name("quote\" and \\");
  const std::string second = client.Do(other).session_id();
  v1::DeleteStackRequest drop;
  drop.set_name("s");
  client.Do(drop);
  v1::DeleteSessionRequest remove;
  remove.set_session_id(client.session_id);
  client.Do(remove);
  const std::string log = service.Log();
  EXPECT_NE(log.find("event=session_opened session=1 client=\"test\" resume_grace_seconds=0\n"),
            std::string::npos);
  EXPECT_NE(log.find("client=\"quote\\\" and \\\\\" resume"), std::string::npos) << log;
  EXPECT_NE(log.find("event=stack_created stack=s "), std::string::npos);
  EXPECT_NE(log.find("event=stack_deleted stack=s request_id="), std::string::npos);
  for (const std::string& secret : {client.session_id, second, region.id})
    EXPECT_EQ(log.find(secret), std::string::npos);
}

}  // namespace
}  // namespace lamina::testing
