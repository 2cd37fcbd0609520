#include "server/service/unix_listener.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "server/service/rpc_metrics.h"
#include "server/session/unix_socket.h"

namespace lamina {
namespace {

constexpr int kBacklog = 1024;
// How long a lack of descriptors is waited out.
constexpr std::chrono::milliseconds kPause(250);

}  // namespace

absl::StatusOr<std::unique_ptr<UnixListener>> UnixListener::Bind(
    const std::string& path, const std::vector<uid_t>& allowed_uids, Admission& admission,
    grpc::ServerBuilder& builder) {
  const bool others = std::any_of(allowed_uids.begin(), allowed_uids.end(),
                                  [](uid_t uid) { return uid != geteuid(); });
  const auto listener = ListenOnSocket(path, SOCK_STREAM, kBacklog, others);
  if (!listener.ok()) return listener.status();
  std::unique_ptr<UnixListener> made(new UnixListener(path));
  made->listener_ = *listener;
  made->wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (made->wake_ < 0) {
    return absl::UnavailableError(absl::StrCat("eventfd: ", std::strerror(errno)));
  }
  const auto acceptor = [&](uid_t uid) {
    return builder.experimental().AddExternalConnectionAcceptor(
        grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
        admission.Local(uid));
  };
  made->acceptors_[geteuid()] = acceptor(geteuid());
  for (const uid_t uid : allowed_uids) {
    if (made->acceptors_.count(uid) == 0) made->acceptors_[uid] = acceptor(uid);
  }
  made->stranger_ = acceptor(kStranger);
  return made;
}

UnixListener::~UnixListener() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
    thread_.join();
  }
  if (listener_ >= 0) {
    close(listener_);
    unlink(path_.c_str());
  }
  if (wake_ >= 0) close(wake_);
}

void UnixListener::Start() {
  thread_ = std::thread([this] { Serve(); });
}

void UnixListener::Serve() {
  for (;;) {
    pollfd watched[] = {{wake_, POLLIN, 0}, {listener_, POLLIN, 0}};
    if (poll(watched, 2, -1) < 0 && errno != EINTR) return;
    if (watched[0].revents != 0) return;
    if (watched[1].revents == 0) continue;
    const int descriptor = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (descriptor < 0) {
      // The one that waits stays in the backlog and would wake us again at once.
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        std::this_thread::sleep_for(kPause);
      }
      continue;
    }
    ucred peer{};
    socklen_t size = sizeof(peer);
    if (getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
      close(descriptor);
      continue;
    }
    const auto known = acceptors_.find(peer.uid);
    Acceptor::NewConnectionParameters connection;
    connection.listener_fd = listener_;
    connection.fd = descriptor;
    OrderedByGrpc();
    (known == acceptors_.end() ? stranger_ : known->second)->HandleNewConnection(&connection);
  }
}

}  // namespace lamina
