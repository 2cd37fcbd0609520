#include "server/session/unix_socket.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

absl::Status SocketError(const std::string& what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::strerror(errno)));
}

absl::StatusOr<sockaddr_un> AddressOf(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("socket path \"", path, "\" must have 1 to ",
                                                   sizeof(address.sun_path) - 1, " characters"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

// Whether a connection of this type to the path is taken.
bool SomebodyListens(const sockaddr_un& address, int type) {
  const int probe = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (probe < 0) return true;  // unknown: leave it alone
  const int result = connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  const int error = errno;
  close(probe);
  // A socket of the other type answers EPROTOTYPE, and is alive.
  return result == 0 || error == EAGAIN || error == EPROTOTYPE;
}

}  // namespace

absl::Status PrepareSocketPath(const std::string& path) {
  auto address = AddressOf(path);
  if (!address.ok()) return address.status();
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  if (!folder.empty() && !std::filesystem::exists(folder, error)) {
    std::filesystem::create_directories(folder.parent_path(), error);
    if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
      return SocketError(absl::StrCat("making ", folder.string()));
    }
  }
  struct stat found {};
  if (lstat(path.c_str(), &found) != 0) return absl::OkStatus();
  if (!S_ISSOCK(found.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " exists and is no socket"));
  }
  if (SomebodyListens(*address, SOCK_STREAM) || SomebodyListens(*address, SOCK_SEQPACKET)) {
    return absl::UnavailableError(absl::StrCat(path, " is in use by a running process"));
  }
  if (unlink(path.c_str()) != 0) return SocketError(absl::StrCat("removing the stale ", path));
  return absl::OkStatus();
}

absl::StatusOr<int> ListenOnSocket(const std::string& path, int type, int backlog, bool others) {
  const auto address = AddressOf(path);
  if (!address.ok()) return address.status();
  if (absl::Status status = PrepareSocketPath(path); !status.ok()) return status;
  const int listener = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener < 0) return SocketError("socket");
  // Nobody else may connect, not even between bind and chmod.
  const mode_t mask = umask(0177);
  const int bound = bind(listener, reinterpret_cast<const sockaddr*>(&*address), sizeof(*address));
  umask(mask);
  if (bound != 0 || listen(listener, backlog) != 0) {
    const absl::Status status = SocketError(absl::StrCat("listening on ", path));
    close(listener);
    return status;
  }
  if (others) chmod(path.c_str(), 0666);
  return listener;
}

}  // namespace lamina
