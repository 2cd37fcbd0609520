#include "server/session/broker.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/session/unix_socket.h"

namespace lamina {
namespace {

constexpr char kMagic[4] = {'L', 'M', 'N', '1'};
constexpr size_t kIdSize = 32;
constexpr size_t kLongestHandle = 64;  // CUDA's IPC handles
constexpr int kBacklog = 128;
constexpr size_t kRequestSize = sizeof(kMagic) + 2 * kIdSize;
// How often silent connections are looked for, and how long a lack of descriptors is waited out.
constexpr absl::Duration kLook = absl::Milliseconds(250);

struct Connection {
  int descriptor;
  uid_t uid;
  absl::Time last_heard;
};

class BrokerImpl final : public Broker {
 public:
  BrokerImpl(BrokerOptions options, SessionManager& sessions)
      : options_(std::move(options)), sessions_(sessions) {
    options_.allowed_uids.push_back(geteuid());
  }

  ~BrokerImpl() override {
    if (wake_ >= 0) {
      const uint64_t one = 1;
      [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
    }
    if (thread_.joinable()) thread_.join();
    for (const Connection& c : connections_) close(c.descriptor);
    if (listener_ >= 0) {
      close(listener_);
      unlink(options_.path.c_str());
    }
    if (wake_ >= 0) close(wake_);
  }

  absl::Status Listen() {
    // Others than the owner connect only where a UID besides ours is allowed.
    const auto listener = ListenOnSocket(options_.path, SOCK_SEQPACKET, kBacklog,
                                         /*others=*/options_.allowed_uids.size() > 1);
    if (!listener.ok()) return listener.status();
    listener_ = *listener;
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_ < 0) return absl::UnavailableError(absl::StrCat("eventfd: ", std::strerror(errno)));
    thread_ = std::thread([this] { Serve(); });
    return absl::OkStatus();
  }

 private:
  void Serve() {
    while (true) {
      std::vector<pollfd> watched;
      watched.push_back({wake_, POLLIN, 0});
      if (absl::Now() >= accept_again_) accept_again_ = absl::InfinitePast();
      const bool room = static_cast<int>(connections_.size()) < options_.connection_cap &&
                        accept_again_ == absl::InfinitePast();
      watched.push_back({room ? listener_ : -1, POLLIN, 0});
      for (const Connection& c : connections_) watched.push_back({c.descriptor, POLLIN, 0});
      const bool idle = connections_.empty() && accept_again_ == absl::InfinitePast();
      const int timeout = idle ? -1 : static_cast<int>(absl::ToInt64Milliseconds(kLook));
      if (poll(watched.data(), watched.size(), timeout) < 0 && errno != EINTR) return;
      if (watched[0].revents != 0) return;

      const absl::Time now = absl::Now();
      std::vector<Connection> kept;
      for (size_t i = 0; i < connections_.size(); ++i) {
        Connection c = connections_[i];
        bool open = true;
        if (watched[i + 2].revents != 0) {
          open = Answer(c);
          c.last_heard = now;
        } else if (now - c.last_heard > options_.idle_timeout) {
          open = false;
        }
        if (open) {
          kept.push_back(c);
        } else {
          close(c.descriptor);
        }
      }
      connections_ = std::move(kept);
      if (watched[1].revents != 0) Accept(now);
    }
  }

  void Accept(absl::Time now) {
    const int descriptor = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (descriptor < 0) {
      // The one that waits stays in the backlog and would wake us again at once.
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
        accept_again_ = now + kLook;
      }
      return;
    }
    ucred peer{};
    socklen_t size = sizeof(peer);
    const bool known = getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 &&
                       std::find(options_.allowed_uids.begin(), options_.allowed_uids.end(),
                                 peer.uid) != options_.allowed_uids.end();
    if (!known) {
      close(descriptor);
      return;
    }
    connections_.push_back({descriptor, peer.uid, now});
  }

  // One packet. False: close the connection.
  bool Answer(const Connection& from) {
    const int descriptor = from.descriptor;
    char packet[kRequestSize + 1];
    const ssize_t got = recv(descriptor, packet, sizeof(packet), MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
    if (got != static_cast<ssize_t>(kRequestSize)) return false;
    if (std::memcmp(packet, kMagic, sizeof(kMagic)) != 0) return false;
    const std::string session_id(packet + sizeof(kMagic), kIdSize);
    const std::string region_id(packet + sizeof(kMagic) + kIdSize, kIdSize);
    std::shared_ptr<Region> region;
    absl::StatusCode code = absl::StatusCode::kNotFound;
    if (auto session = sessions_.FindLocally(session_id, from.uid); session.ok()) {
      if (auto found = (*session)->FindRegion(region_id); found.ok()) {
        region = *std::move(found);
        code = absl::StatusCode::kOk;
      }
    }
    return Send(descriptor, code, region.get());
  }

  static bool Send(int descriptor, absl::StatusCode code, const Region* region) {
    char answer[12 + kLongestHandle];
    size_t size = 12;
    const auto status = static_cast<uint32_t>(code);
    const uint64_t length = region == nullptr ? 0 : region->length();
    for (size_t i = 0; i < 4; ++i) answer[i] = static_cast<char>(status >> (8 * i));
    for (size_t i = 0; i < 8; ++i) answer[4 + i] = static_cast<char>(length >> (8 * i));
    if (region != nullptr && region->handle().size() <= kLongestHandle) {
      std::memcpy(answer + size, region->handle().data(), region->handle().size());
      size += region->handle().size();
    }
    iovec part{answer, size};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (region != nullptr && region->descriptor() >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      const int passed = region->descriptor();
      std::memcpy(CMSG_DATA(header), &passed, sizeof(passed));
    }
    // A client that does not read its answers is dropped rather than waited for.
    return sendmsg(descriptor, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<ssize_t>(size);
  }

  BrokerOptions options_;
  SessionManager& sessions_;
  int listener_ = -1;
  int wake_ = -1;
  // The thread's own.
  std::vector<Connection> connections_;
  absl::Time accept_again_ = absl::InfinitePast();
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Broker>> Broker::Start(BrokerOptions options,
                                                      SessionManager& sessions) {
  auto broker = std::make_unique<BrokerImpl>(std::move(options), sessions);
  if (absl::Status status = broker->Listen(); !status.ok()) return status;
  return broker;
}

}  // namespace lamina
