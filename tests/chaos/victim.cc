// A client that drives a daemon until it dies, at a point that its seed decides.
//
//   lamina_victim --target unix:PATH --stack NAME --seed N --ending
//   kill|stop|close|half|leave|delete
//
// It opens a session, holds its lease with a KeepAlive stream, makes regions, maps one of them and
// runs training steps on the stack, call by call and several in flight on an Execute stream, over
// and over. The seed picks one of these phases, which time round, and how long after its beginning
// the end comes: a timer of the kernel's sends SIGKILL (or SIGSTOP) while the phase's calls are on
// their way. The other endings begin at that point too: `close` closes every socket under gRPC's
// feet; `half` sends half of a request on a connection of its own, then dies; `leave` exits without
// a word; `delete` deletes the session while its calls run.
//
// Each phase writes a letter to standard output when it begins, so that the last one tells where it
// died. Exits with 0 after `leave`, `delete` and `close`, with 1 where a call failed before the end
// was due (standard error says which), with 3 where the end never came.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "absl/strings/str_cat.h"
#include "lamina/v1/config_service.grpc.pb.h"
#include "lamina/v1/layer_service.grpc.pb.h"
#include "lamina/v1/session_service.grpc.pb.h"

namespace lamina::chaos {
namespace {

// B, S, H of scripts/chaos's stack for victims.
constexpr int64_t kB = 4, kS = 32, kH = 64;
constexpr uint64_t kBytes = kB * kS * kH * sizeof(float);
constexpr std::chrono::seconds kLongestLife{60};
// The end comes within this of its phase's beginning.
constexpr int kLatestMicroseconds = 4000;

enum Phase : char {
  kSession = 's',
  kKeepAlive = 'k',
  kRegion = 'r',
  kBroker = 'b',
  kForward = 'f',
  kBackward = 'w',
  kApply = 'a',
  kExecute = 'x',
  kInline = 'i',
  kParameters = 'p',
  kRelease = 'd',
};
constexpr Phase kPhases[] = {kSession, kKeepAlive, kRegion, kBroker,     kForward, kBackward,
                             kApply,   kExecute,   kInline, kParameters, kRelease};

struct Options {
  std::string target, stack, ending;
  uint32_t seed = 0;
};

class Victim {
 public:
  explicit Victim(const Options& options)
      : options_(options),
        random_(options.seed),
        channel_(grpc::CreateChannel(options.target, grpc::InsecureChannelCredentials())),
        layer_(v1::LayerService::NewStub(channel_)),
        config_(v1::ConfigService::NewStub(channel_)),
        sessions_(v1::SessionService::NewStub(channel_)) {
    fatal_ = kPhases[random_() % std::size(kPhases)];
    // What comes once in a life has one time round only.
    const bool once = fatal_ == kSession || fatal_ == kKeepAlive;
    times_ = once ? 1 : 1 + random_() % 3;
    microseconds_ = random_() % kLatestMicroseconds;
  }

  void Live() {
    OpenSession();
    HoldLease();
    MakeRegion();  // one that is never mapped
    for (;;) {
      MakeRegion();
      MapRegion();
      Step();
      StepOnStream();
      StepInline();
      ReadParameters();
      ReleaseRegion();
    }
  }

 private:
  // --- the end ---

  void Begin(Phase phase) {
    const char letter = phase;
    if (write(STDOUT_FILENO, &letter, 1) != 1) _exit(3);
    if (phase != fatal_ || --times_ != 0) return;
    due_ = true;
    if (options_.ending == "kill" || options_.ending == "stop") {
      sigevent event{};
      event.sigev_notify = SIGEV_SIGNAL;
      event.sigev_signo = options_.ending == "kill" ? SIGKILL : SIGSTOP;
      timer_t timer{};
      itimerspec when{};
      when.it_value.tv_nsec = 1 + static_cast<long>(microseconds_) * 1000;
      if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 ||
          timer_settime(timer, 0, &when, nullptr) != 0)
        Fail("timer", grpc::Status(grpc::StatusCode::UNKNOWN, std::strerror(errno)));
      return;
    }
    std::thread([this] {
      std::this_thread::sleep_for(std::chrono::microseconds(microseconds_));
      End();
    }).detach();
  }

  [[noreturn]] void End() {
    if (options_.ending == "close") {
      close_range(3, ~0U, 0);
      // The process lives on for a moment: it is the connections that have gone.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    } else if (options_.ending == "half") {
      SendHalf();
      raise(SIGKILL);
    } else if (options_.ending == "delete") {
      v1::DeleteSessionRequest request;
      request.set_session_id(session_);
      v1::DeleteSessionResponse response;
      grpc::ClientContext context;
      sessions_->DeleteSession(&context, request, &response);
    }
    _exit(0);
  }

  // A Forward whose message never ends, as HTTP/2 frames.
  void SendHalf() {
    const int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, options_.target.substr(5).c_str(), sizeof(address.sun_path) - 1);
    if (connect(descriptor, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0)
      return;
    const auto frame = [](size_t length, char type, char flags, char stream, std::string payload) {
      std::string bytes;
      for (const int shift : {16, 8, 0}) bytes += static_cast<char>(length >> shift);
      bytes += type;
      bytes += flags;
      bytes.append(3, '\0');
      bytes += stream;
      return bytes + payload;
    };
    std::string headers;
    const std::pair<std::string, std::string> fields[] = {
        {":method", "POST"},
        {":scheme", "http"},
        {":path", "/lamina.v1.LayerService/Forward"},
        {":authority", "localhost"},
        {"te", "trailers"},
        {"content-type", "application/grpc"}};
    for (const auto& [name, value] : fields)
      absl::StrAppend(&headers, std::string(1, '\0'),
                      std::string(1, static_cast<char>(name.size())), name,
                      std::string(1, static_cast<char>(value.size())), value);
    const std::string message("\0\0\0\x20\0half of it", 15);  // 8192 bytes were to come
    std::string bytes = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    bytes += frame(0, 4, 0, 0, "");
    bytes += frame(headers.size(), 1, 4, 1, headers);
    bytes += frame(8192, 0, 0, 1, message);
    if (send(descriptor, bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) return;
    // Until the daemon has begun to read it.
    char greeting[64];
    if (recv(descriptor, greeting, sizeof(greeting), 0) < 0) return;
  }

  // Once the end is due, calls may fail: `close` and `delete` see to that.
  void Fail(const char* what, const grpc::Status& status) {
    while (due_) pause();
    std::fprintf(stderr, "victim %u: %s: %d %s\n", options_.seed, what, status.error_code(),
                 status.error_message().c_str());
    _exit(1);
  }

  template <typename Stub, typename Request, typename Response>
  void Call(const char* what, Stub& stub,
            grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
            const Request& request, Response* response) {
    grpc::ClientContext context;
    const grpc::Status status = (stub.*method)(&context, request, response);
    if (!status.ok()) Fail(what, status);
  }

  // --- its life ---

  void OpenSession() {
    Begin(kSession);
    v1::CreateSessionRequest request;
    request.set_client_name("victim");
    v1::CreateSessionResponse response;
    Call("CreateSession", *sessions_, &v1::SessionService::Stub::CreateSession, request, &response);
    session_ = response.session_id();
    broker_ = response.broker_path();
  }

  void HoldLease() {
    Begin(kKeepAlive);
    keep_alive_ = sessions_->KeepAlive(&keep_alive_context_);
    v1::KeepAliveRequest request;
    request.set_session_id(session_);
    v1::KeepAliveResponse response;
    if (!keep_alive_->Write(request) || !keep_alive_->Read(&response))
      Fail("KeepAlive", keep_alive_->Finish());
    // Again and again, from a thread of its own, as a client does.
    std::thread([this, request] {
      v1::KeepAliveResponse answer;
      do std::this_thread::sleep_for(std::chrono::milliseconds(500));
      while (keep_alive_->Write(request) && keep_alive_->Read(&answer));
    }).detach();
  }

  void MakeRegion() {
    Begin(kRegion);
    v1::CreateRegionRequest request;
    request.set_session_id(session_);
    request.set_size_bytes(4 * kBytes);
    v1::CreateRegionResponse response;
    Call("CreateRegion", *sessions_, &v1::SessionService::Stub::CreateRegion, request, &response);
    region_ = response.region().region_id();
    length_ = response.region().length_bytes();
  }

  void MapRegion() {
    Begin(kBroker);
    const auto failed = [&](const char* what) {
      Fail(what, grpc::Status(grpc::StatusCode::UNAVAILABLE, std::strerror(errno)));
    };
    const int broker = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, broker_.c_str(), sizeof(address.sun_path) - 1);
    if (connect(broker, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0)
      failed("broker connect");
    const std::string request = absl::StrCat("LMN1", session_, region_);
    if (send(broker, request.data(), request.size(), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(request.size()))
      failed("broker send");
    char answer[12];
    iovec part{answer, sizeof(answer)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    if (recvmsg(broker, &message, MSG_CMSG_CLOEXEC) != sizeof(answer)) failed("broker answer");
    const cmsghdr* const header = CMSG_FIRSTHDR(&message);
    if (header == nullptr) return failed("broker answer without a descriptor");
    int descriptor = -1;
    std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
    if (data_ != nullptr) munmap(data_, length_);
    void* const data = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) failed("mmap");
    data_ = static_cast<float*>(data);
    for (uint64_t i = 0; i < length_ / sizeof(float); ++i)
      data_[i] = static_cast<float>(i % 17) * 0.01f;
    close(descriptor);
    // The connection stays open, half of the time.
    if (random_() % 2 == 0) close(broker);
  }

  v1::Mutation Next() {
    v1::Mutation mutation;
    mutation.set_session_id(session_);
    mutation.set_sequence(++sequence_);
    return mutation;
  }
  void Slice(uint64_t part, v1::Slice* slice) const {
    slice->set_region_id(region_);
    slice->set_offset_bytes(part * kBytes);
    slice->set_size_bytes(kBytes);
  }
  void Shape(v1::Tensor* tensor) const {
    tensor->set_dtype(v1::DATA_TYPE_FLOAT32);
    for (const int64_t extent : {kB, kS, kH}) tensor->add_shape(extent);
  }

  v1::ForwardRequest ForwardOf(bool inline_data) {
    v1::ForwardRequest request;
    request.set_stack(options_.stack);
    request.set_session_id(session_);
    request.set_training(true);
    *request.mutable_mutation() = Next();
    Shape(request.mutable_input());
    if (inline_data) {
      request.mutable_input()->mutable_inline_data()->resize(kBytes);
    } else {
      Slice(0, request.mutable_input()->mutable_slice());
      Slice(1, request.mutable_output()->mutable_slice());
    }
    return request;
  }
  v1::BackwardRequest BackwardOf(const std::string& context, bool inline_data) {
    v1::BackwardRequest request;
    request.set_stack(options_.stack);
    *request.mutable_mutation() = Next();
    request.set_context_id(context);
    Shape(request.mutable_output_grad());
    if (inline_data) {
      request.mutable_output_grad()->mutable_inline_data()->resize(kBytes);
      request.mutable_input_grad()->mutable_inline_();
    } else {
      Slice(2, request.mutable_output_grad()->mutable_slice());
      Slice(3, request.mutable_input_grad()->mutable_slice());
    }
    return request;
  }
  v1::ApplyGradientsRequest ApplyOf() {
    v1::ApplyGradientsRequest request;
    request.set_stack(options_.stack);
    *request.mutable_mutation() = Next();
    request.set_learning_rate(1e-4);
    request.set_zero_gradients(true);
    return request;
  }

  void Step() { StepOf(kForward, false); }
  void StepInline() { StepOf(kInline, true); }
  void StepOf(Phase forward_phase, bool inline_data) {
    Begin(forward_phase);
    v1::ForwardResponse forward;
    Call("Forward", *layer_, &v1::LayerService::Stub::Forward, ForwardOf(inline_data), &forward);
    Begin(inline_data ? kInline : kBackward);
    v1::BackwardResponse backward;
    Call("Backward", *layer_, &v1::LayerService::Stub::Backward,
         BackwardOf(forward.context_id(), inline_data), &backward);
    Begin(kApply);
    v1::ApplyGradientsResponse apply;
    Call("ApplyGradients", *layer_, &v1::LayerService::Stub::ApplyGradients, ApplyOf(), &apply);
  }

  // Two steps at once; a context that gets no Backward among them.
  void StepOnStream() {
    Begin(kExecute);
    grpc::ClientContext context;
    const auto stream = layer_->Execute(&context);
    uint64_t id = 0;
    int sent = 0;
    const auto send = [&](const std::function<void(v1::ExecuteRequest&)>& fill) {
      v1::ExecuteRequest request;
      request.set_id(++id);
      fill(request);
      if (stream->Write(request)) ++sent;
    };
    for (int step = 0; step < 2; ++step) {
      const uint64_t first = id + 1;
      for (int i = 0; i < 2; ++i) send([&](auto& r) { *r.mutable_forward() = ForwardOf(false); });
      send([&](auto& r) {
        r.set_context_of(first);
        *r.mutable_backward() = BackwardOf("", false);
      });
      send([&](auto& r) { *r.mutable_apply_gradients() = ApplyOf(); });
      send([&](auto& r) {
        r.set_context_of(first + 1);
        r.mutable_release_context()->set_stack(options_.stack);
        r.mutable_release_context()->set_session_id(session_);
      });
    }
    stream->WritesDone();
    v1::ExecuteResponse response;
    for (; stream->Read(&response); --sent)
      if (response.code() != 0)
        Fail("a call of Execute",
             grpc::Status(static_cast<grpc::StatusCode>(response.code()), response.message()));
    const grpc::Status status = stream->Finish();
    if (!status.ok() || sent != 0) Fail("Execute", status);
  }

  void ReadParameters() {
    Begin(kParameters);
    v1::StreamParametersRequest request;
    request.set_stack(options_.stack);
    grpc::ClientContext context;
    const auto reader = config_->StreamParameters(&context, request);
    v1::StreamParametersResponse chunk;
    while (reader->Read(&chunk)) continue;
    if (const grpc::Status status = reader->Finish(); !status.ok())
      Fail("StreamParameters", status);
  }

  void ReleaseRegion() {
    Begin(kRelease);
    v1::ReleaseRegionRequest request;
    request.set_session_id(session_);
    request.set_region_id(region_);
    v1::ReleaseRegionResponse response;
    Call("ReleaseRegion", *sessions_, &v1::SessionService::Stub::ReleaseRegion, request, &response);
  }

  const Options options_;
  std::mt19937 random_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::LayerService::Stub> layer_;
  std::unique_ptr<v1::ConfigService::Stub> config_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
  grpc::ClientContext keep_alive_context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::KeepAliveRequest, v1::KeepAliveResponse>>
      keep_alive_;
  // When and how it ends.
  Phase fatal_;
  uint32_t times_, microseconds_;
  std::atomic<bool> due_{false};
  std::string session_, broker_, region_;
  uint64_t length_ = 0, sequence_ = 0;
  float* data_ = nullptr;
};

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"lamina_victim: a client that dies at a random point; see scripts/chaos"};
  app.add_option("--target", options.target, "unix:PATH")->required();
  app.add_option("--stack", options.stack, "Stack to train, B 4, S 32, H 64, fp32")->required();
  app.add_option("--seed", options.seed, "Decides where it dies")->required();
  app.add_option("--ending", options.ending, "How it dies")
      ->required()
      ->check(CLI::IsMember({"kill", "stop", "close", "half", "leave", "delete"}));
  CLI11_PARSE(app, argc, argv);
  std::thread([] {
    std::this_thread::sleep_for(kLongestLife);
    _exit(3);
  }).detach();
  (new Victim(options))->Live();  // nothing ends in order here
  return 3;
}

}  // namespace
}  // namespace lamina::chaos

int main(int argc, char** argv) { return lamina::chaos::Main(argc, argv); }
