#include "server/session/session_manager.h"

#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/session/region.h"

namespace lamina {
namespace {

constexpr size_t kLargestRegion = size_t{1} << 46;
constexpr size_t kLongestName = 64;

// 128 random bits in hexadecimal: nobody guesses one.
std::string NewCapability() {
  char bytes[16];
  size_t filled = 0;
  while (filled < sizeof(bytes)) {
    const ssize_t got = getrandom(bytes + filled, sizeof(bytes) - filled, 0);
    if (got > 0) filled += static_cast<size_t>(got);
  }
  return absl::BytesToHexString(absl::string_view(bytes, sizeof(bytes)));
}

absl::Status NoSession() {
  return absl::NotFoundError(
      "session_id: no such session; it was deleted, its lease ended, or it never was");
}

class SessionImpl final : public Session {
 public:
  SessionImpl(uint64_t key, std::string client_name, int64_t region_cap, size_t byte_cap,
              std::shared_ptr<Ledger> total, std::shared_ptr<const SessionHooks> hooks)
      : key_(key),
        client_name_(std::move(client_name)),
        region_cap_(region_cap),
        ledger_(std::make_shared<Ledger>(byte_cap)),
        total_(std::move(total)),
        hooks_(std::move(hooks)) {}

  // Nobody holds it: no call of it runs, and none can come. Contexts go before the regions, which
  // are members.
  ~SessionImpl() override {
    if (hooks_->ended) hooks_->ended(key_, reason_);
  }

  uint64_t key() const override { return key_; }
  const std::string& client_name() const override { return client_name_; }

  absl::StatusOr<std::shared_ptr<Region>> CreateRegion(size_t bytes) override {
    if (bytes < 1 || bytes > kLargestRegion) {
      return absl::InvalidArgumentError(
          absl::StrCat("size_bytes: ", bytes, " is outside [1, ", kLargestRegion, "]"));
    }
    // Counted before it is made, so that parallel calls can't pass the cap together.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (ended_) return NoSession();
      if (static_cast<int64_t>(regions_.size()) + being_made_ >= region_cap_) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the session has ", regions_.size(), " regions, the most it may have"));
      }
      ++being_made_;
    }
    auto made = MakeRegion(NewCapability(), bytes, ledger_, total_, hooks_);
    std::lock_guard<std::mutex> lock(mutex_);  // goes before `made` does: no unmapping under it
    --being_made_;
    if (!made.ok()) return made.status();
    if (ended_) return NoSession();
    order_.push_back((*made)->id());
    regions_[(*made)->id()] = *made;
    return made;
  }

  absl::StatusOr<std::shared_ptr<Region>> FindRegion(const std::string& id) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) {
      return absl::NotFoundError("region_id: this session has no such region");
    }
    return found->second;
  }

  std::vector<std::shared_ptr<Region>> ListRegions() override {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<Region>> regions;
    regions.reserve(order_.size());
    for (const std::string& id : order_) regions.push_back(regions_.at(id));
    return regions;
  }

  absl::Status ReleaseRegion(const std::string& id) override {
    std::shared_ptr<Region> released;  // unmapped outside the lock, if no call holds it
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) {
      return absl::NotFoundError("region_id: this session has no such region");
    }
    released = std::move(found->second);
    regions_.erase(found);
    order_.erase(std::find(order_.begin(), order_.end(), id));
    return absl::OkStatus();
  }

  void EndFor(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    reason_ = reason;
  }

  // The manager's; guarded by its mutex.
  absl::Time expires;
  bool has_keeper = false;
  SessionManager::Lost lost;

 private:
  const uint64_t key_;
  const std::string client_name_;
  const int64_t region_cap_;
  const std::shared_ptr<Ledger> ledger_, total_;
  const std::shared_ptr<const SessionHooks> hooks_;
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<Region>> regions_;  // guarded by mutex_
  std::vector<std::string> order_;                                    // guarded by mutex_
  int64_t being_made_ = 0;                                            // guarded by mutex_
  bool ended_ = false;                                                // guarded by mutex_
  std::string reason_;  // guarded by mutex_, but for the destructor
};

class SessionManagerImpl final : public SessionManager {
 public:
  SessionManagerImpl(SessionOptions options, SessionHooks hooks)
      : options_(options),
        hooks_(std::make_shared<const SessionHooks>(std::move(hooks))),
        total_(std::make_shared<Ledger>(options.total_region_cap_bytes)),
        reaper_([this] { Reap(); }) {}

  ~SessionManagerImpl() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    reaper_.join();
    for (auto& [id, session] : sessions_) session->EndFor("shutdown");
  }

  absl::StatusOr<Opened> Open(const std::string& client_name) override {
    const bool printable = std::all_of(client_name.begin(), client_name.end(),
                                       [](char c) { return c >= 0x20 && c < 0x7F; });
    if (client_name.size() > kLongestName || !printable) {
      return absl::InvalidArgumentError(absl::StrCat("client_name: must be at most ", kLongestName,
                                                     " printable ASCII characters"));
    }
    Opened opened;
    opened.id = NewCapability();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (static_cast<int64_t>(sessions_.size()) >= options_.session_cap) {
        return absl::ResourceExhaustedError(
            absl::StrCat("there are ", sessions_.size(),
                         " sessions, the most that this daemon holds (--session-cap)"));
      }
      auto session = std::make_shared<SessionImpl>(++last_key_, client_name, options_.region_cap,
                                                   options_.region_cap_bytes, total_, hooks_);
      session->expires = absl::Now() + options_.lease;
      sessions_[opened.id] = session;
      opened.session = std::move(session);
    }
    changed_.notify_all();
    return opened;
  }

  absl::StatusOr<std::shared_ptr<Session>> Find(const std::string& id) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return NoSession();
    found->second->expires = absl::Now() + options_.lease;
    return std::shared_ptr<Session>(found->second);
  }

  absl::Status BindKeeper(const std::string& id, Lost lost) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return NoSession();
    if (found->second->has_keeper) {
      return absl::AlreadyExistsError("the session has a KeepAlive stream already");
    }
    found->second->has_keeper = true;
    found->second->lost = std::move(lost);
    found->second->expires = absl::Now() + options_.lease;
    return absl::OkStatus();
  }

  void UnbindKeeper(const std::string& id, const std::string& reason) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = sessions_.find(id);
      if (found == sessions_.end()) return;
      found->second->EndFor(reason);
      found->second->lost = nullptr;
      leaving_.push_back(std::move(found->second));
      sessions_.erase(found);
    }
    changed_.notify_all();
  }

  absl::Status Delete(const std::string& id) override {
    Ended ended;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = sessions_.find(id);
      if (found == sessions_.end()) return NoSession();
      ended = Take(found, "deleted");
    }
    if (ended.lost) ended.lost("deleted");
    return absl::OkStatus();
  }

  int64_t live_sessions() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(sessions_.size());
  }
  int64_t live_regions() const override { return total_->count.load(); }
  size_t region_bytes() const override { return total_->bytes(); }
  const SessionOptions& options() const override { return options_; }

 private:
  using Sessions = std::map<std::string, std::shared_ptr<SessionImpl>>;

  // A session that is in no map any more. Destroyed without the mutex: that may run its end hook.
  struct Ended {
    std::shared_ptr<SessionImpl> session;
    Lost lost;
  };

  // Needs mutex_.
  Ended Take(Sessions::iterator found, const std::string& reason) {
    Ended ended{std::move(found->second), nullptr};
    sessions_.erase(found);
    ended.session->EndFor(reason);
    ended.lost = std::move(ended.session->lost);
    ended.session->lost = nullptr;
    return ended;
  }

  // The reaper's thread: ends what is silent, and what UnbindKeeper left to it.
  void Reap() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      const absl::Time now = absl::Now();
      absl::Time next = now + options_.lease;
      std::vector<Ended> expired;
      for (auto it = sessions_.begin(); it != sessions_.end();) {
        const auto here = it++;
        if (here->second->expires <= now) {
          expired.push_back(
              Take(here, here->second->has_keeper ? "keep_alive_silent" : "lease_expired"));
        } else {
          next = std::min(next, here->second->expires);
        }
      }
      std::vector<std::shared_ptr<SessionImpl>> leaving;
      leaving.swap(leaving_);
      if (expired.empty() && leaving.empty()) {
        changed_.wait_until(lock, absl::ToChronoTime(next));
        continue;
      }
      lock.unlock();
      for (const Ended& ended : expired) {
        if (ended.lost) ended.lost("keep_alive_silent");
      }
      expired.clear();
      leaving.clear();
      lock.lock();
    }
  }

  const SessionOptions options_;
  const std::shared_ptr<const SessionHooks> hooks_;
  const std::shared_ptr<Ledger> total_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Sessions sessions_;                                  // by id; guarded by mutex_
  std::vector<std::shared_ptr<SessionImpl>> leaving_;  // for the reaper; guarded by mutex_
  uint64_t last_key_ = 0;                              // guarded by mutex_
  bool stopping_ = false;                              // guarded by mutex_
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<SessionManager> SessionManager::Create(SessionOptions options, SessionHooks hooks) {
  return std::make_unique<SessionManagerImpl>(options, std::move(hooks));
}

}  // namespace lamina
