// Sessions, their leases and their regions.
//
// A session is one client's lease. It ends when its keeper goes (its KeepAlive stream), when
// nothing was heard of it for the lease's length, or when it is deleted. Then, in this order: no
// new call finds it; the calls that found it before finish; as the last of them lets go, the end
// hook runs (the engine frees the contexts), the regions are unmapped, their bytes uncharged.
//
// A session may have a grace. If its keeper breaks, it is adrift: calls find it as before, and it
// ends when the grace is over unless another keeper is bound until then. Calls do not prolong the
// grace: who is there to call is there to bind a keeper.
//
// Session and region ids are 128-bit capabilities in hexadecimal; they appear in no status message
// and no log line. Threads: all methods from any thread.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace lamina {

// What memory a region is made of; the values are the proto's.
enum class RegionKind : uint8_t {
  kMemfd = 1,      // host memory in a memfd, sealed against resizing
  kDevice = 2,     // device memory whose descriptor a client imports
  kDeviceIpc = 3,  // device memory that a client opens by a handle of bytes
};

// Shared memory that the daemon made, mapped here, charged to its session. All zeros at first.
// Destroyed (unregistered, unmapped, closed, uncharged) when its session let go of it and no call
// holds it.
class Region {
 public:
  virtual ~Region() = default;
  virtual RegionKind kind() const = 0;
  virtual void* data() const = 0;                 // an address of the device, but for kMemfd
  virtual size_t length() const = 0;              // bytes, whole pages
  virtual int descriptor() const = 0;             // owned by the region; -1: kDeviceIpc
  virtual const std::string& handle() const = 0;  // 64 bytes: kDeviceIpc; else empty
  virtual bool registered() const = 0;
  virtual const std::string& id() const = 0;
};

// Device memory for a region; freed by its destructor. Threads: any.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* data() const = 0;
  virtual int descriptor() const = 0;
  virtual const std::string& handle() const = 0;
};
// What device regions' lengths are multiples of.
inline constexpr size_t kDevicePage = size_t{2} << 20;

struct SessionOptions {
  absl::Duration lease = absl::Seconds(30);
  absl::Duration resume_grace_cap = absl::Seconds(60);  // longest grace that a session gets
  int64_t session_cap = 1024;
  int64_t region_cap = 256;                          // regions a session
  size_t region_cap_bytes = size_t{8} << 30;         // bytes a session's regions have together
  size_t total_region_cap_bytes = size_t{32} << 30;  // bytes of all sessions
  // The same of regions in device memory, which those above leave out.
  size_t device_region_cap_bytes = size_t{4} << 30;
  size_t total_device_region_cap_bytes = size_t{8} << 30;
};

// Hooks that the composition root fills in; called without locks held, from any thread.
struct SessionHooks {
  std::function<absl::Status(void* data, size_t bytes)> register_host;  // pin for DMA; empty: none
  std::function<void(void* data)> unregister_host;
  // Zeroed device memory of `bytes`, whole device pages, for a kDevice or kDeviceIpc region.
  // RESOURCE_EXHAUSTED with the numbers; UNIMPLEMENTED. Empty: there are no such regions.
  std::function<absl::StatusOr<std::unique_ptr<DeviceMemory>>(size_t bytes, RegionKind kind)>
      make_device_memory;
  // Free contexts; may block until the device is free. The reason is for metrics and the log:
  // "deleted", "lease_expired", "keep_alive_silent", "keep_alive_broken", "grace_over", "shutdown",
  // or what UnbindKeeper was given.
  std::function<void(uint64_t key, const std::string& reason)> ended;
};

// What a handler holds while it serves a call of a session: the session cannot vanish meanwhile.
// Whoever lets go of an ended one last runs its end hook.
class Session {
 public:
  virtual ~Session() = default;
  virtual uint64_t key() const = 0;  // no secret; never used twice
  virtual const std::string& client_name() const = 0;
  virtual const std::string& owner() const = 0;
  virtual absl::Duration resume_grace() const = 0;  // as granted; zero: none

  // RESOURCE_EXHAUSTED with the numbers of the cap, or of the memory that is free; INVALID_ARGUMENT
  // for size 0 or over 2^46; NOT_FOUND once the session has ended; UNIMPLEMENTED for device memory
  // where there is none to be had.
  virtual absl::StatusOr<std::shared_ptr<Region>> CreateRegion(
      size_t bytes, RegionKind kind = RegionKind::kMemfd) = 0;
  // NOT_FOUND for any id that is not this session's.
  virtual absl::StatusOr<std::shared_ptr<Region>> FindRegion(const std::string& id) = 0;
  virtual std::vector<std::shared_ptr<Region>> ListRegions() = 0;
  virtual absl::Status ReleaseRegion(const std::string& id) = 0;
};

class SessionManager {
 public:
  static std::unique_ptr<SessionManager> Create(SessionOptions options, SessionHooks hooks);
  virtual ~SessionManager() = default;  // ends every session; nobody may hold one any more

  struct Opened {
    std::string id;
    std::shared_ptr<Session> session;
  };
  // `resume_grace`, >= 0, is granted up to the cap. `owner`: who made it, "uid:1000" for a user of
  // this host; empty: nobody in particular. INVALID_ARGUMENT: the name. RESOURCE_EXHAUSTED: the cap
  // on sessions.
  virtual absl::StatusOr<Opened> Open(const std::string& client_name,
                                      absl::Duration resume_grace = absl::ZeroDuration(),
                                      const std::string& owner = "") = 0;
  // Here and below, a session with an owner is there for that `caller` alone; for others it is
  // NOT_FOUND, as one that never was.
  //
  // Renews the lease. NOT_FOUND.
  virtual absl::StatusOr<std::shared_ptr<Session>> Find(const std::string& id,
                                                        const std::string& caller = "") = 0;
  // The same for a process of this host that knows the id: a user's session is that user's alone,
  // one that was made over the network anybody's who knows it.
  virtual absl::StatusOr<std::shared_ptr<Session>> FindLocally(const std::string& id,
                                                               uid_t peer) = 0;

  // How a keeper came to a session: as its first, to one that was adrift, or in place of another.
  enum class Arrival : uint8_t { kFirst, kReconnected, kTookOver };
  struct Keeping {
    uint64_t keeper = 0;  // what UnbindKeeper and BreakKeeper take; never used twice
    Arrival arrival = Arrival::kFirst;
    absl::Duration adrift;  // how long nobody had kept it: more than zero if reconnected
    std::shared_ptr<Session> session;
  };
  // Binds the lease to a KeepAlive stream: one a session. Where there is one already it is told
  // that it is taken over if the session has a grace; else this one is refused (ALREADY_EXISTS).
  // NOT_FOUND. `lost` may be empty; it is called, once and without locks held, if the session ends
  // in another way than by this keeper, or is taken over: then its reason is "taken_over".
  using Lost = std::function<void(const std::string& reason)>;
  virtual absl::StatusOr<Keeping> BindKeeper(const std::string& id, Lost lost,
                                             const std::string& caller = "") = 0;
  // The keeper has ended in order. Ends the session; the end hook runs on another thread. Nothing
  // happens where that has ended, or has another keeper.
  virtual void UnbindKeeper(const std::string& id, uint64_t keeper, const std::string& reason) = 0;
  // The keeper is gone without a word. True: the session is adrift now. False: it had no grace and
  // ends for "keep_alive_broken", or nothing happened, as for UnbindKeeper.
  virtual bool BreakKeeper(const std::string& id, uint64_t keeper) = 0;
  // Ends the session; where no call holds it, its end hook has run when this returns. NOT_FOUND.
  virtual absl::Status Delete(const std::string& id, const std::string& caller = "") = 0;

  // A session as an operator sees it; nothing of it is a secret.
  struct View {
    uint64_t key = 0;
    std::string client_name;
    absl::Duration age, expires_in;  // expires_in: unless something is heard of it
    bool kept = false;               // it has a keeper
    bool adrift = false;
    int64_t regions = 0;
    size_t region_bytes = 0;
  };
  virtual std::vector<View> List() const = 0;  // by key
  virtual int64_t live_sessions() const = 0;
  virtual int64_t adrift_sessions() const = 0;  // of those
  virtual int64_t live_regions() const = 0;     // in host memory, as the next
  virtual size_t region_bytes() const = 0;
  virtual int64_t live_device_regions() const = 0;
  virtual size_t device_region_bytes() const = 0;
  virtual bool offers_device_regions() const = 0;
  virtual const SessionOptions& options() const = 0;
};

}  // namespace lamina
