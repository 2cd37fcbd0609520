#include "server/start_checks.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <set>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/session/unix_socket.h"
#include "server/tcp_address.h"

namespace lamina {
namespace {

// More than a file system has set aside for a file's own description.
constexpr size_t kTrialBytes = size_t{64} << 10;

struct Bound {
  std::string address;
  int family;
  uint16_t port;
  bool any;  // all of the machine's addresses
  std::string host;
};

absl::Status Fail(const std::string& address, const std::string& why) {
  return absl::UnavailableError(absl::StrCat("can't listen on ", address, ": ", why));
}

// Where the socket was bound.
Bound WhereOf(const std::string& address, int fd) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &size);
  Bound bound{.address = address, .family = storage.ss_family, .port = 0, .any = false, .host = ""};
  if (storage.ss_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, &storage, sizeof(v6));
    bound.port = ntohs(v6.sin6_port);
    bound.any = IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr) != 0;
    bound.host.assign(reinterpret_cast<const char*>(&v6.sin6_addr), sizeof(v6.sin6_addr));
  } else {
    sockaddr_in v4{};
    std::memcpy(&v4, &storage, sizeof(v4));
    bound.port = ntohs(v4.sin_port);
    bound.any = v4.sin_addr.s_addr == INADDR_ANY;
    bound.host.assign(reinterpret_cast<const char*>(&v4.sin_addr), sizeof(v4.sin_addr));
  }
  return bound;
}

bool Collide(const Bound& a, const Bound& b) {
  if (a.port != b.port || a.address == b.address) return false;
  if (a.family != b.family) return a.any || b.any;  // [::] takes IPv4 as well
  return a.any || b.any || a.host == b.host;
}

absl::Status TryTcp(const std::string& address, std::vector<Bound>& all) {
  const std::optional<TcpAddress> parsed = ParseTcpAddress(address);
  if (!parsed) return Fail(address, "must be HOST:PORT with a port of 0 to 65535");
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(parsed->bare_host().c_str(),
                                    std::to_string(parsed->port).c_str(), &hints, &found);
      error != 0) {
    return Fail(address, gai_strerror(error));
  }
  const absl::Cleanup freeing = [found] { freeaddrinfo(found); };
  absl::Status status = Fail(address, "it has no address");
  bool any = false;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;  // no IPv6 here, say
    const absl::Cleanup closing = [fd] { close(fd); };
    // As those do who listen later: what lingers of earlier connections is no hindrance.
    const int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, a->ai_addr, a->ai_addrlen) != 0) {
      if (errno == EADDRINUSE) return Fail(address, "in use by another process");
      status = Fail(address, errno == EADDRNOTAVAIL ? "not an address of this machine"
                                                    : std::strerror(errno));
      continue;
    }
    any = true;
    if (parsed->port == 0) break;  // any free one
    all.push_back(WhereOf(address, fd));
    for (const Bound& other : all) {
      if (Collide(other, all.back())) {
        return Fail(address, absl::StrCat("in use by ", other.address, ", which is also given"));
      }
    }
  }
  return any ? absl::OkStatus() : status;
}

}  // namespace

absl::Status CheckFolder(const std::string& what, const std::string& folder) {
  const auto fail = [&](const std::string& why) {
    return absl::FailedPreconditionError(absl::StrCat(what, ": ", why));
  };
  struct stat found {};
  if (stat(folder.c_str(), &found) != 0) {
    return fail(absl::StrCat("there is no folder ", folder, ": ", std::strerror(errno)));
  }
  if (!S_ISDIR(found.st_mode)) return fail(absl::StrCat(folder, " is not a folder"));
  const std::string trial = absl::StrCat(folder, "/.laminad-", getpid());
  const int fd = open(trial.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) {
    return fail(absl::StrCat("the folder ", folder, " can't be written: ", std::strerror(errno)));
  }
  const std::string zeros(kTrialBytes, '\0');
  const ssize_t wrote = write(fd, zeros.data(), zeros.size());
  const bool whole = wrote == static_cast<ssize_t>(zeros.size()) && fsync(fd) == 0;
  // A short write is what a disk does that is nearly full.
  const int error = wrote >= 0 && wrote < static_cast<ssize_t>(zeros.size()) ? ENOSPC : errno;
  close(fd);
  unlink(trial.c_str());
  return whole ? absl::OkStatus()
               : fail(absl::StrCat("the folder ", folder, ": ", std::strerror(error)));
}

absl::Status CheckAddresses(const std::vector<std::string>& addresses) {
  std::vector<Bound> bound;
  std::set<std::string> seen;
  for (const std::string& address : addresses) {
    absl::string_view path = address;
    if (absl::ConsumePrefix(&path, "unix:")) {
      if (!seen.insert(address).second) return Fail(address, "given twice");
      if (absl::Status status = PrepareSocketPath(std::string(path)); !status.ok()) return status;
    } else {
      const std::optional<TcpAddress> tcp = ParseTcpAddress(address);
      const bool any_port = tcp && tcp->port == 0;
      if (!any_port && !seen.insert(address).second) return Fail(address, "given twice");
      if (absl::Status status = TryTcp(address, bound); !status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace lamina
