#include "cli/conformance/busy.h"

#include <algorithm>
#include <cmath>

namespace lamina::conformance {
namespace {

// Fewer than the daemon lets wait, so that others' calls are not refused.
constexpr int kMostCalls = 100;
// Sessions of those who wait for the device make no calls meanwhile.
constexpr double kLeastLease = 10;

v1::StackConfig DeepConfig() {
  v1::StackConfig config;
  config.set_batch_size(1);
  config.set_max_seq_length(16);
  config.set_hidden_size(16);
  config.set_heads(1);
  config.set_num_hidden_layers(1024);
  config.set_training(false);
  return config;
}

}  // namespace

Busy::Busy(Daemon& daemon) : rig_(daemon, DeepConfig()) {
  const double lease = daemon.session_info().lease_seconds();
  if (lease < kLeastLease) {
    Skip("a lease of ", lease, " s ends while the check keeps the device busy");
  }
  // The first ones load code and, on a GPU, capture a graph.
  for (int i = 0; i < 3; ++i) {
    seconds_ = daemon.Ok(Forward()).timing().compute_seconds();
  }
  seconds_ = std::max(seconds_, 1e-3);
}

Busy::~Busy() { Wait(); }

int Busy::CountFor(Milliseconds duration) const {
  const double wanted = std::chrono::duration<double>(duration).count();
  const int count = static_cast<int>(std::ceil(wanted / seconds_));
  if (count > kMostCalls) Skip("the device can't be kept busy for ", duration.count(), " ms");
  return std::max(count, 2);
}

void Busy::Start(Milliseconds duration) {
  const int count = CountFor(duration);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_ += static_cast<size_t>(count);
  }
  for (int i = 0; i < count; ++i) {
    Call& call = calls_.emplace_back();
    rig_.daemon.Prepare(&call.context);
    call.request = Forward();
    rig_.daemon.layers().async()->Forward(&call.context, &call.request, &call.response,
                                          [this, &call](grpc::Status status) {
                                            std::lock_guard<std::mutex> lock(mutex_);
                                            call.status = std::move(status);
                                            --waiting_;
                                            answered_.notify_all();
                                          });
  }
}

void Busy::Wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  answered_.wait(lock, [this] { return waiting_ == 0; });
}

void Busy::Join() {
  Wait();
  for (const Call& call : calls_) {
    if (!call.status.ok()) Skip("the device was not kept busy: ", Describe(call.status));
  }
  calls_.clear();
}

}  // namespace lamina::conformance
