// Who a caller is, and whether it may make a call: everything that is not allowed is denied. What
// the answer rests on is the roles' table (roles.h), the tokens file, the roles file and the UIDs.
// docs/security.md describes the files' form.
//
// Threads: all methods from any thread; Refresh from one at a time.
#pragma once

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/access/files.h"
#include "server/access/roles.h"

namespace lamina {

struct AccessOptions {
  std::string tokens;                // file; empty: no tokens
  std::string roles;                 // file; empty: who is known has all roles
  bool client_certificates = false;  // callers over TCP may show one that was verified
  std::vector<uid_t> allowed_uids;   // besides the daemon's own
};

// A user of this host who is none of the allowed ones.
inline constexpr uid_t kStranger = static_cast<uid_t>(-1);

// What a call shows of its caller. The strings live with the call.
struct Presented {
  std::optional<uid_t> uid;                      // over a Unix socket; the rest is TCP's
  std::vector<absl::string_view> authorization;  // the headers of that name
  std::vector<std::pair<absl::string_view, absl::string_view>> names;  // of the certificate: kind
                                                                       // ("uri", ...) and value
};

struct Caller {
  // "uid:1000", "token:NAME", "cert:uri:spiffe://...": no secret. Empty: nobody in particular,
  // where the daemon asks nobody who it is.
  std::string identity;
  Roles roles = kNoRole;
};

class Access {
 public:
  // FAILED_PRECONDITION: a file, as ReadAccessFile, or as "WHAT PATH:LINE: what is wrong".
  static absl::StatusOr<std::unique_ptr<Access>> Open(const AccessOptions& options);
  ~Access();

  bool takes_tokens() const { return !options_.tokens.empty(); }

  // UNAUTHENTICATED: it shows nothing by which it is known, or something false. PERMISSION_DENIED:
  // a UID that is not let in.
  absl::StatusOr<Caller> Identify(const Presented& presented) const;
  // OK: the call of that path may go on. Else as Identify, or PERMISSION_DENIED: it lacks a role.
  absl::Status Admit(absl::string_view path, const Presented& presented) const;

  // Reads the files again where they changed; what is wrong then is logged, and the old content
  // stays. True: something else holds from now on.
  bool Refresh();

 private:
  struct Policy;
  explicit Access(const AccessOptions& options);
  absl::StatusOr<std::shared_ptr<const Policy>> Read() const;
  std::shared_ptr<const Policy> policy() const;
  absl::StatusOr<Caller> Identify(const Policy& policy, const Presented& presented) const;

  const AccessOptions options_;
  FileWatch watch_;
  mutable std::mutex mutex_;
  std::shared_ptr<const Policy> policy_;  // guarded by mutex_
};

}  // namespace lamina
