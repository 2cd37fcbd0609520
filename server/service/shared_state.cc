#include "server/service/shared_state.h"

namespace lamina {

absl::Status Gate::Enter() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) return absl::UnavailableError("the daemon is draining");
  ++inside_;
  return absl::OkStatus();
}

void Gate::Leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  --inside_;
  if (inside_ == 0) left_.notify_all();
}

bool Gate::Close(absl::Time deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  return left_.wait_until(lock, absl::ToChronoTime(deadline), [this] { return inside_ == 0; });
}

bool Gate::closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closed_;
}

std::shared_ptr<MutationLog> MutationLogs::For(SessionKey session) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<MutationLog>& log = logs_[session];
  if (log == nullptr) log = std::make_shared<MutationLog>();
  return log;
}

void MutationLogs::Forget(SessionKey session) {
  std::lock_guard<std::mutex> lock(mutex_);
  logs_.erase(session);
}

}  // namespace lamina
