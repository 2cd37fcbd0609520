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
#include "absl/strings/match.h"
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
  SessionImpl(uint64_t key, std::string client_name, std::string owner, absl::Duration resume_grace,
              const SessionOptions& options, std::shared_ptr<Ledger> total,
              std::shared_ptr<Ledger> device_total, std::shared_ptr<const SessionHooks> hooks)
      : key_(key),
        client_name_(std::move(client_name)),
        owner_(std::move(owner)),
        resume_grace_(resume_grace),
        region_cap_(options.region_cap),
        host_{std::make_shared<Ledger>(options.region_cap_bytes), std::move(total)},
        device_{std::make_shared<Ledger>(options.device_region_cap_bytes), std::move(device_total)},
        hooks_(std::move(hooks)) {}

  // Nobody holds it: no call of it runs, and none can come. Contexts go before the regions, which
  // are members.
  ~SessionImpl() override {
    if (hooks_->ended) hooks_->ended(key_, reason_);
  }

  uint64_t key() const override { return key_; }
  const std::string& client_name() const override { return client_name_; }
  const std::string& owner() const override { return owner_; }
  absl::Duration resume_grace() const override { return resume_grace_; }

  absl::StatusOr<std::shared_ptr<Region>> CreateRegion(size_t bytes, RegionKind kind) override {
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
    auto made = MakeRegion(NewCapability(), bytes, kind,
                           kind == RegionKind::kMemfd ? host_ : device_, hooks_);
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

  SessionManager::View Describe() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {.key = key_,
            .client_name = client_name_,
            .regions = static_cast<int64_t>(regions_.size()),
            .region_bytes = ledger_->bytes()};
  }

  void EndFor(const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    reason_ = reason;
  }

  // The manager's; guarded by its mutex.
  absl::Time opened, expires;
  uint64_t keeper = 0;        // 0: none
  SessionManager::Lost lost;  // the keeper's
  bool adrift = false;        // its keeper broke, and `expires` is the end of the grace
  absl::Time adrift_since;

 private:
  const uint64_t key_;
  const std::string client_name_;
  const std::string owner_;
  const absl::Duration resume_grace_;
  const int64_t region_cap_;
  const Ledgers host_, device_;
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
        device_total_(std::make_shared<Ledger>(options.total_device_region_cap_bytes)),
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

  absl::StatusOr<Opened> Open(const std::string& client_name, absl::Duration resume_grace,
                              const std::string& owner) override {
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
      auto session = std::make_shared<SessionImpl>(
          ++last_key_, client_name, owner, std::min(resume_grace, options_.resume_grace_cap),
          options_, total_, device_total_, hooks_);
      session->opened = absl::Now();
      session->expires = session->opened + options_.lease;
      sessions_[opened.id] = session;
      opened.session = std::move(session);
    }
    changed_.notify_all();
    return opened;
  }

  absl::StatusOr<std::shared_ptr<Session>> Find(const std::string& id,
                                                const std::string& caller) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return Renewed(Of(id, caller));
  }

  absl::StatusOr<std::shared_ptr<Session>> FindLocally(const std::string& id, uid_t peer) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return NoSession();
    const std::string& owner = found->second->owner();
    if (absl::StartsWith(owner, "uid:") && owner != absl::StrCat("uid:", peer)) return NoSession();
    return Renewed(found);
  }

  absl::StatusOr<Keeping> BindKeeper(const std::string& id, Lost lost,
                                     const std::string& caller) override {
    Keeping keeping;
    Lost taken_over;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = Of(id, caller);
      if (found == sessions_.end()) return NoSession();
      SessionImpl& session = *found->second;
      const absl::Time now = absl::Now();
      if (session.adrift) {
        if (session.expires <= now) return NoSession();  // the reaper is about to come
        keeping.arrival = Arrival::kReconnected;
        keeping.adrift = now - session.adrift_since;
        session.adrift = false;
      } else if (session.keeper != 0) {
        if (session.resume_grace() == absl::ZeroDuration()) {
          return absl::AlreadyExistsError("the session has a KeepAlive stream already");
        }
        keeping.arrival = Arrival::kTookOver;
        taken_over = std::move(session.lost);
      }
      session.keeper = keeping.keeper = ++last_keeper_;
      session.lost = std::move(lost);
      session.expires = now + options_.lease;
      keeping.session = found->second;
    }
    if (taken_over) taken_over("taken_over");
    return keeping;
  }

  void UnbindKeeper(const std::string& id, uint64_t keeper, const std::string& reason) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = KeptBy(id, keeper);
      if (found == sessions_.end()) return;
      LeaveToReaper(found, reason);
    }
    changed_.notify_all();
  }

  bool BreakKeeper(const std::string& id, uint64_t keeper) override {
    bool adrift = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = KeptBy(id, keeper);
      if (found == sessions_.end()) return false;
      SessionImpl& session = *found->second;
      adrift = session.resume_grace() > absl::ZeroDuration();
      if (adrift) {
        session.keeper = 0;
        session.lost = nullptr;
        session.adrift = true;
        session.adrift_since = absl::Now();
        session.expires = session.adrift_since + session.resume_grace();
      } else {
        LeaveToReaper(found, "keep_alive_broken");
      }
    }
    changed_.notify_all();
    return adrift;
  }

  absl::Status Delete(const std::string& id, const std::string& caller) override {
    Ended ended;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = Of(id, caller);
      if (found == sessions_.end()) return NoSession();
      ended = Take(found, "deleted");
    }
    if (ended.lost) ended.lost("deleted");
    return absl::OkStatus();
  }

  std::vector<View> List() const override {
    std::vector<View> views;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const absl::Time now = absl::Now();
      for (const auto& [id, session] : sessions_) {
        View& view = views.emplace_back(session->Describe());
        view.age = now - session->opened;
        view.expires_in = session->expires - now;
        view.kept = session->keeper != 0;
        view.adrift = session->adrift;
      }
    }
    std::sort(views.begin(), views.end(),
              [](const View& a, const View& b) { return a.key < b.key; });
    return views;
  }

  int64_t live_sessions() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(sessions_.size());
  }
  int64_t adrift_sessions() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::count_if(sessions_.begin(), sessions_.end(),
                         [](const auto& entry) { return entry.second->adrift; });
  }
  int64_t live_regions() const override { return total_->count.load(); }
  size_t region_bytes() const override { return total_->bytes(); }
  int64_t live_device_regions() const override { return device_total_->count.load(); }
  size_t device_region_bytes() const override { return device_total_->bytes(); }
  bool offers_device_regions() const override {
    return hooks_->make_device_memory && options_.device_region_cap_bytes > 0 &&
           options_.total_device_region_cap_bytes > 0;
  }
  const SessionOptions& options() const override { return options_; }

 private:
  using Sessions = std::map<std::string, std::shared_ptr<SessionImpl>>;

  // A session that is in no map any more. Destroyed without the mutex: that may run its end hook.
  struct Ended {
    std::shared_ptr<SessionImpl> session;
    Lost lost;
  };

  // The session, if it is this caller's. Needs mutex_.
  Sessions::iterator Of(const std::string& id, const std::string& caller) {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return found;
    const std::string& owner = found->second->owner();
    return owner.empty() || owner == caller ? found : sessions_.end();
  }

  // Needs mutex_.
  absl::StatusOr<std::shared_ptr<Session>> Renewed(Sessions::iterator found) {
    if (found == sessions_.end()) return NoSession();
    if (!found->second->adrift) found->second->expires = absl::Now() + options_.lease;
    return std::shared_ptr<Session>(found->second);
  }

  // The session, if this is its keeper. Needs mutex_.
  Sessions::iterator KeptBy(const std::string& id, uint64_t keeper) {
    const auto found = sessions_.find(id);
    const bool kept = found != sessions_.end() && keeper != 0 && found->second->keeper == keeper;
    return kept ? found : sessions_.end();
  }

  // Ends a session whose keeper knows it; the rest is the reaper's. Needs mutex_.
  void LeaveToReaper(Sessions::iterator found, const std::string& reason) {
    found->second->EndFor(reason);
    found->second->lost = nullptr;
    leaving_.push_back(std::move(found->second));
    sessions_.erase(found);
  }

  // Needs mutex_.
  Ended Take(Sessions::iterator found, const std::string& reason) {
    Ended ended{std::move(found->second), nullptr};
    sessions_.erase(found);
    ended.session->EndFor(reason);
    ended.lost = std::move(ended.session->lost);
    ended.session->lost = nullptr;
    return ended;
  }

  // Why a session ends whose time has run out.
  static const char* ReasonToExpire(const SessionImpl& session) {
    if (session.adrift) return "grace_over";
    return session.keeper != 0 ? "keep_alive_silent" : "lease_expired";
  }

  // The reaper's thread: ends those whose time has run out, and what LeaveToReaper left to it.
  void Reap() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopping_) {
      const absl::Time now = absl::Now();
      absl::Time next = now + options_.lease;
      std::vector<Ended> expired;
      for (auto it = sessions_.begin(); it != sessions_.end();) {
        const auto here = it++;
        if (here->second->expires <= now) {
          expired.push_back(Take(here, ReasonToExpire(*here->second)));
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
  const std::shared_ptr<Ledger> total_, device_total_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Sessions sessions_;                                  // by id; guarded by mutex_
  std::vector<std::shared_ptr<SessionImpl>> leaving_;  // for the reaper; guarded by mutex_
  uint64_t last_key_ = 0;                              // guarded by mutex_
  uint64_t last_keeper_ = 0;                           // guarded by mutex_
  bool stopping_ = false;                              // guarded by mutex_
  std::thread reaper_;
};

}  // namespace

std::unique_ptr<SessionManager> SessionManager::Create(SessionOptions options, SessionHooks hooks) {
  return std::make_unique<SessionManagerImpl>(options, std::move(hooks));
}

}  // namespace lamina
