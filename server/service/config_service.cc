#include "server/service/config_service.h"

#include <condition_variable>
#include <mutex>

namespace lamina {
namespace {

// A stream of answers whose writer waits until each part is on its way. Deletes itself when gRPC is
// done with it.
class BlockingWriter final : public grpc::ServerWriteReactor<v1::StreamParametersResponse> {
 public:
  // False: the client takes no more.
  bool Write(const v1::StreamParametersResponse& part) {
    std::unique_lock<std::mutex> lock(mutex_);
    outcome_ = Outcome::kPending;
    StartWrite(&part);
    written_.wait(lock, [this] { return outcome_ != Outcome::kPending; });
    return outcome_ == Outcome::kSent;
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    outcome_ = ok ? Outcome::kSent : Outcome::kLost;
    written_.notify_one();  // with the lock held: the writer may finish the stream at once
  }
  void OnDone() override { delete this; }

 private:
  enum class Outcome : uint8_t { kPending, kSent, kLost };
  std::mutex mutex_;
  std::condition_variable written_;
  Outcome outcome_ = Outcome::kPending;  // guarded by mutex_
};

}  // namespace

grpc::ServerWriteReactor<v1::StreamParametersResponse>* ConfigServiceImpl::StreamParameters(
    grpc::CallbackServerContext* context, const v1::StreamParametersRequest* request) {
  auto* const writer = new BlockingWriter();
  workers_.Run([this, context, request, writer] {
    writer->Finish(ToGrpc(Guarded([&] {
      return lamina::StreamParameters(
          state_, *request, ControlOf(state_, context),
          [writer](const v1::StreamParametersResponse& part) { return writer->Write(part); });
    })));
  });
  return writer;
}

}  // namespace lamina
