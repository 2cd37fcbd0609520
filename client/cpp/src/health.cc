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
  const internal::Clock::time_point give_up = internal::Clock::now() + options.connect_timeout;
  for (;;) {
    grpc::ClientContext context;
    (*connection)->Prepare(&context);
    grpc::GenericStub stub((*connection)->channel());
    grpc::CompletionQueue queue;
    grpc::ByteBuffer request;  // an empty message: the daemon as a whole
    grpc::Slice nothing;
    request = grpc::ByteBuffer(&nothing, 1);
    grpc::ByteBuffer response;
    grpc::Status status;
    auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
    call->StartCall();
    call->Finish(&response, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
    if (status.ok()) return Parse(response);
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE || internal::Clock::now() >= give_up) {
      return internal::ToAbsl(status, (*connection)->target());
    }
    std::this_thread::sleep_for(internal::Milliseconds(50));
  }
}

}  // namespace lamina::client
