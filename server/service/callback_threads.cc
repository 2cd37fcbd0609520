#include "server/service/callback_threads.h"

#include <grpc/support/cpu.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/version_info.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>

#include "lamina/v1/config_service.grpc.pb.h"

namespace lamina {
namespace {

// Far more than a thread takes to begin.
constexpr std::chrono::seconds kLongestStart{5};

}  // namespace

// gRPC has no way to ask for fewer threads, but runs the callback of a client's call on one, whose
// it then is.
struct HeldCallbackThreads::State {
  struct Call {
    grpc::ClientContext context;
    v1::GetServerInfoRequest request;
    v1::GetServerInfoResponse response;
  };

  void Hold() {
    std::unique_lock<std::mutex> lock(mutex);
    ++held;
    changed.notify_all();
    changed.wait(lock, [this] { return released; });
    ++over;
    changed.notify_all();
  }

  std::mutex mutex;
  std::condition_variable changed;
  // Calls whose callback has begun, and has ended. Guarded by mutex.
  size_t held = 0, over = 0;
  bool released = false;  // guarded by mutex
  std::unique_ptr<v1::ConfigService::Stub> stub;
  std::deque<Call> calls;
};

HeldCallbackThreads::HeldCallbackThreads(int count) {
  if (count < 1) return;
  state_ = std::make_shared<State>();
  // A channel without credentials: every call on it fails at once, without a connection.
  state_->stub = v1::ConfigService::NewStub(grpc::CreateChannel("", nullptr));
  for (int i = 0; i < count; ++i) {
    State::Call& call = state_->calls.emplace_back();
    state_->stub->async()->GetServerInfo(&call.context, &call.request, &call.response,
                                         [state = state_](const grpc::Status&) { state->Hold(); });
  }
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait_for(lock, kLongestStart,
                           [&] { return state_->held == state_->calls.size(); });
}

HeldCallbackThreads::~HeldCallbackThreads() {
  if (state_ == nullptr) return;
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->released = true;
  state_->changed.notify_all();
  // Also of those that have not begun in time: their calls are about to go.
  state_->changed.wait(lock, [this] { return state_->over == state_->calls.size(); });
  lock.unlock();
  // Here: on one of gRPC's threads the channel's end could wait for that very thread.
  state_->calls.clear();
  state_->stub.reset();
}

int SpareCallbackThreads(int machine_cpus, int own_cpus) {
  // As gRPC 1.51 counts them; of other versions nothing is known.
  constexpr bool kKnown = GRPC_CPP_VERSION_MAJOR == 1 && GRPC_CPP_VERSION_MINOR == 51;
  if (!kKnown) return 0;
  const int threads = std::clamp(machine_cpus / 2, 2, 16);
  return std::max(0, threads - std::max(1, own_cpus / 2));
}

int SpareCallbackThreads() {
  const int machine_cpus = static_cast<int>(gpr_cpu_num_cores());
  cpu_set_t own;
  if (sched_getaffinity(0, sizeof(own), &own) != 0) return 0;
  return SpareCallbackThreads(machine_cpus, CPU_COUNT(&own));
}

}  // namespace lamina
