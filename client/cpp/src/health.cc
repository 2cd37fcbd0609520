// grpc.health.v1.Health/Check without the generated code of health.proto: a program that links this
// library and has its own copy of that file would register it twice, which protobuf refuses.
#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>

#include <vector>

#include "src/connection.h"

namespace lamina::client {
namespace {

// HealthCheckResponse { ServingStatus status = 1; }
constexpr uint32_t kStatusTag = 1 << 3;

Health Parse(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return Health::kUnknown;
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  google::protobuf::io::CodedInputStream input(reinterpret_cast<const uint8_t*>(bytes.data()),
                                               static_cast<int>(bytes.size()));
  uint32_t value = 0;
  if (input.ReadTag() != kStatusTag || !input.ReadVarint32(&value) || value > 3) {
    return Health::kUnknown;
  }
  return static_cast<Health>(value);
}

}  // namespace

absl::StatusOr<Health> CheckHealth(const std::string& target, const ConnectOptions& options) {
  absl::StatusOr<std::shared_ptr<internal::Connection>> connection =
      internal::Connection::Create(target, options);
  if (!connection.ok()) return connection.status();
  Health health = Health::kUnknown;
  const absl::Status status = (*connection)->Repeat(options.connect_timeout, [&] {
    grpc::ClientContext context;
    (*connection)->Prepare(&context);
    grpc::GenericStub stub((*connection)->channel());
    grpc::CompletionQueue queue;
    const grpc::Slice nothing;  // an empty request: the daemon as a whole
    const grpc::ByteBuffer request(&nothing, 1);
    grpc::ByteBuffer response;
    grpc::Status end;
    auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
    call->StartCall();
    call->Finish(&response, &end, nullptr);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
    if (end.ok()) health = Parse(response);
    return internal::ToAbsl(end, (*connection)->target());
  });
  if (!status.ok()) return status;
  return health;
}

}  // namespace lamina::client
