// What a round trip to a daemon costs, in one process over one connection: gRPC's own health Check
// (an empty call), a Forward of a stack, tiny unless told, with slices of a region, and the same
// Forward as one item of an Execute stream, sent when the last one was answered. bench/remote and
// bench/cpu_bench.py run it.
//
// The three take turns, 50 calls each, so that a machine whose speed drifts is fair to all. The raw
// stubs are called: no client library is in between. The Forwards' times are without what the
// daemon spent on the layer, as their answers say it.
//
// Prints one JSON object, times in microseconds: {"rpc_empty": {"count", "median", "p10", "p90"},
// "region_roundtrip": {..., "compute_median"}, "execute_roundtrip": {..., "compute_median"}}. Exit
// code 1, with the reason on stderr, where a call fails or a tensor went another way than a region.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/grpcpp.h"
#include "lamina/v1/config_service.grpc.pb.h"
#include "lamina/v1/layer_service.grpc.pb.h"
#include "lamina/v1/session_service.grpc.pb.h"
#include "nlohmann/json.hpp"

namespace lamina::bench {
namespace {

namespace pb = lamina::v1;
namespace health = grpc::health::v1;
using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr int kCallsOfATurn = 50;
constexpr const char* kStack = "round-trip";

// Of the stack, fp32, and of a call's tensors.
struct Shape {
  int64_t batch = 1, seq = 1, hidden = 16, heads = 1, intermediate = 16, layers = 1;

  uint64_t tensor_bytes() const {
    return static_cast<uint64_t>(batch * seq * hidden) * sizeof(float);
  }
  // Of the output behind the input.
  uint64_t output_offset() const { return (tensor_bytes() + 4095) / 4096 * 4096; }
};

void Check(const grpc::Status& status) {
  if (!status.ok()) {
    throw std::runtime_error(std::to_string(status.error_code()) + ": " + status.error_message());
  }
}

// Microseconds of one kind of call.
class Times {
 public:
  void Add(double seconds) { total_.push_back(seconds * 1e6); }
  void Add(double seconds, const pb::ForwardResponse& answer) {
    if (answer.input_transport() != pb::TRANSPORT_MEMFD ||
        answer.output_transport() != pb::TRANSPORT_MEMFD) {
      throw std::runtime_error("a tensor did not go through the region");
    }
    const double compute = answer.timing().compute_seconds();
    compute_.push_back(compute * 1e6);
    Add(seconds - compute);
  }
  Json Summary() {
    Json summary{{"count", total_.size()},
                 {"median", At(&total_, 0.5)},
                 {"p10", At(&total_, 0.1)},
                 {"p90", At(&total_, 0.9)}};
    if (!compute_.empty()) summary["compute_median"] = At(&compute_, 0.5);
    return summary;
  }

 private:
  static double At(std::vector<double>* values, double share) {
    std::sort(values->begin(), values->end());
    return values->at(static_cast<size_t>(share * static_cast<double>(values->size() - 1)));
  }
  std::vector<double> total_, compute_;
};

// The daemon with a session, a region and a stack of its own, which is deleted with it.
class Daemon {
 public:
  Daemon(const std::string& target, const Shape& shape)
      : shape_(shape),
        channel_(grpc::CreateChannel(target, grpc::InsecureChannelCredentials())),
        health_(health::Health::NewStub(channel_)),
        layers_(pb::LayerService::NewStub(channel_)),
        config_(pb::ConfigService::NewStub(channel_)),
        sessions_(pb::SessionService::NewStub(channel_)) {
    CreateSession();
    CreateRegion();
    CreateStack();
    stream_ = layers_->Execute(&stream_context_);
  }

  ~Daemon() {
    stream_->WritesDone();
    grpc::Status ignored = stream_->Finish();
    pb::DeleteStackRequest stack;
    stack.set_name(kStack);
    pb::DeleteStackResponse stack_answer;
    grpc::ClientContext stack_context;
    ignored = config_->DeleteStack(&stack_context, stack, &stack_answer);
    pb::DeleteSessionRequest session;
    session.set_session_id(session_id_);
    pb::DeleteSessionResponse session_answer;
    grpc::ClientContext session_context;
    ignored = sessions_->DeleteSession(&session_context, session, &session_answer);
  }

  void Empty(Times* times) {
    const health::HealthCheckRequest request;
    health::HealthCheckResponse answer;
    grpc::ClientContext context;
    const Clock::time_point start = Clock::now();
    Check(health_->Check(&context, request, &answer));
    times->Add(Since(start));
  }

  void Forward(Times* times) {
    pb::ForwardRequest request;
    Fill(&request);
    pb::ForwardResponse answer;
    grpc::ClientContext context;
    const Clock::time_point start = Clock::now();
    Check(layers_->Forward(&context, request, &answer));
    times->Add(Since(start), answer);
  }

  void Execute(Times* times) {
    pb::ExecuteRequest request;
    request.set_id(++last_id_);
    Fill(request.mutable_forward());
    pb::ExecuteResponse answer;
    const Clock::time_point start = Clock::now();
    if (!stream_->Write(request) || !stream_->Read(&answer)) {
      throw std::runtime_error("the Execute stream ended");
    }
    const double seconds = Since(start);
    if (answer.code() != 0) throw std::runtime_error("Execute: " + answer.message());
    times->Add(seconds, answer.forward());
  }

 private:
  static double Since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  void CreateSession() {
    pb::CreateSessionRequest request;
    request.set_client_name("round_trip");
    pb::CreateSessionResponse answer;
    grpc::ClientContext context;
    Check(sessions_->CreateSession(&context, request, &answer));
    session_id_ = answer.session_id();
  }

  void CreateRegion() {
    pb::CreateRegionRequest request;
    request.set_session_id(session_id_);
    request.set_size_bytes(2 * shape_.output_offset());
    pb::CreateRegionResponse answer;
    grpc::ClientContext context;
    Check(sessions_->CreateRegion(&context, request, &answer));
    region_id_ = answer.region().region_id();
  }

  void CreateStack() {
    pb::CreateStackRequest request;
    request.set_name(kStack);
    pb::StackConfig& config = *request.mutable_config();
    config.set_batch_size(shape_.batch);
    config.set_max_seq_length(shape_.seq);
    config.set_hidden_size(shape_.hidden);
    config.set_heads(shape_.heads);
    config.set_intermediate_size(shape_.intermediate);
    config.set_num_hidden_layers(shape_.layers);
    pb::CreateStackResponse answer;
    grpc::ClientContext context;
    Check(config_->CreateStack(&context, request, &answer));
  }

  void Fill(pb::ForwardRequest* request) const {
    request->set_stack(kStack);
    request->set_session_id(session_id_);
    request->set_training(false);
    pb::Tensor& input = *request->mutable_input();
    input.set_dtype(pb::DATA_TYPE_FLOAT32);
    for (const int64_t extent : {shape_.batch, shape_.seq, shape_.hidden}) input.add_shape(extent);
    FillSlice(0, input.mutable_slice());
    FillSlice(shape_.output_offset(), request->mutable_output()->mutable_slice());
  }

  void FillSlice(uint64_t offset, pb::Slice* slice) const {
    slice->set_region_id(region_id_);
    slice->set_offset_bytes(offset);
    slice->set_size_bytes(shape_.tensor_bytes());
  }

  const Shape shape_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<health::Health::Stub> health_;
  const std::unique_ptr<pb::LayerService::Stub> layers_;
  const std::unique_ptr<pb::ConfigService::Stub> config_;
  const std::unique_ptr<pb::SessionService::Stub> sessions_;
  std::string session_id_, region_id_;
  grpc::ClientContext stream_context_;
  std::unique_ptr<grpc::ClientReaderWriter<pb::ExecuteRequest, pb::ExecuteResponse>> stream_;
  uint64_t last_id_ = 0;
};

Json Measure(const std::string& target, const Shape& shape, int calls) {
  Daemon daemon(target, shape);
  Times empty, forward, execute, warm_up;
  const int turns = (calls + kCallsOfATurn - 1) / kCallsOfATurn;
  for (int turn = -1; turn < turns; ++turn) {
    const auto into = [&](Times* times) { return turn < 0 ? &warm_up : times; };
    for (int i = 0; i < kCallsOfATurn; ++i) daemon.Empty(into(&empty));
    for (int i = 0; i < kCallsOfATurn; ++i) daemon.Forward(into(&forward));
    for (int i = 0; i < kCallsOfATurn; ++i) daemon.Execute(into(&execute));
  }
  return {{"rpc_empty", empty.Summary()},
          {"region_roundtrip", forward.Summary()},
          {"execute_roundtrip", execute.Summary()}};
}

int Main(int argc, char** argv) {
  std::string target;
  int calls = 3000;
  std::vector<int64_t> sizes{1, 1, 16, 1, 16, 1};
  CLI::App app{
      "Round trips to a daemon: an empty call, a Forward by a region, the same on an Execute "
      "stream."};
  app.add_option("--target", target, "The daemon, such as unix:PATH")->required();
  app.add_option("--calls", calls, "Of each kind, rounded up to 50s [3000]")
      ->check(CLI::Range(1, 10000000));
  app.add_option("--shape", sizes, "Of the Forward, fp32: B,S,H,A,I,L [1,1,16,1,16,1]")
      ->delimiter(',')
      ->expected(6)
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << Measure(target, Shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                         calls)
                     .dump()
              << std::endl;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "round_trip: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace lamina::bench

int main(int argc, char** argv) { return lamina::bench::Main(argc, argv); }
