// The broker's byte stream: packets into the real socket.
//
// An input is a sequence of steps, each a byte that says what is sent and what it needs:
//   0  a packet: a byte with its length, then its bytes
//   1, 2  a request for the region that is there, with one byte of it changed: position, value;
//      with a descriptor attached where the position is odd
//   3  a request for the region that is there
//   4  the connection is closed and another one opened
//   5  no more is sent on the connection
//   6  the region is released, and another one made
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/session/broker.h"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {
namespace {

constexpr int kAnswerMilliseconds = 5000;
constexpr int kMaxSteps = 64;

class Bytes {
 public:
  explicit Bytes(absl::string_view bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  uint8_t Next() {
    if (bytes_.empty()) return 0;
    const auto byte = static_cast<uint8_t>(bytes_[0]);
    bytes_.remove_prefix(1);
    return byte;
  }
  std::string Take(size_t count) {
    const std::string taken(bytes_.substr(0, count));
    bytes_.remove_prefix(taken.size());
    return taken;
  }

 private:
  absl::string_view bytes_;
};

const std::string& BrokerPath() {
  static const auto* const path = [] {
    std::string folder = "/tmp/lamina-fuzz-broker-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr) Broken("the rig can make a folder");
    auto* made = new std::string(folder + "/broker.sock");
    static const auto broker = Broker::Start({.path = *made}, Daemon::Get().sessions());
    if (!broker.ok()) Broken(broker.status().ToString());
    static const std::string removed = folder;
    std::atexit([] {
      std::error_code ignored;
      std::filesystem::remove_all(removed, ignored);
    });
    return made;
  }();
  return *path;
}

class Connection {
 public:
  Connection() : socket_(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, BrokerPath().c_str(), sizeof(address.sun_path) - 1);
    if (connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0)
      Broken("the broker accepts connections");
  }
  ~Connection() { close(socket_); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // Sends a packet and looks at its answer: 12 bytes, with a descriptor where they say OK, or the
  // connection's end.
  void Ask(const std::string& packet, int passed) {
    if (!open_) return;
    iovec part{const_cast<char*>(packet.data()), packet.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (passed >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &passed, sizeof(int));
    }
    if (sendmsg(socket_, &message, MSG_NOSIGNAL) < 0) {
      open_ = false;
      return;
    }
    Answer();
  }
  void NoMore() {
    if (!open_) return;
    shutdown(socket_, SHUT_WR);
    Answer();
    if (open_) Broken("the broker closes what says no more");
  }

 private:
  void Answer() {
    pollfd watched{socket_, POLLIN, 0};
    if (poll(&watched, 1, kAnswerMilliseconds) != 1) Broken("the broker answers, or hangs up");
    char bytes[64];
    iovec part{bytes, sizeof(bytes)};
    alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t got = recvmsg(socket_, &message, MSG_CMSG_CLOEXEC);
    if (got <= 0) {
      open_ = false;
      return;
    }
    int descriptor = -1;
    if (const cmsghdr* const header = CMSG_FIRSTHDR(&message); header != nullptr)
      std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
    const bool ok = got >= 4 && bytes[0] == 0 && bytes[1] == 0 && bytes[2] == 0 && bytes[3] == 0;
    if (descriptor >= 0) close(descriptor);
    if (got != 12) Broken(absl::StrCat("an answer has 12 bytes, not ", got));
    if (ok != (descriptor >= 0)) Broken("with OK comes a descriptor, and only then");
  }

  const int socket_;
  bool open_ = true;
};

void RunBroker(absl::string_view input) {
  Daemon& daemon = Daemon::Get();
  BrokerPath();
  Bytes bytes(input);
  const auto request = [&] { return absl::StrCat("LMN1", daemon.SessionId(), daemon.RegionId()); };
  auto connection = std::make_unique<Connection>();
  for (int step = 0; step < kMaxSteps && !bytes.empty(); ++step) {
    switch (bytes.Next() % 7) {
      case 0: {
        const size_t length = bytes.Next();
        connection->Ask(bytes.Take(length), -1);
        break;
      }
      case 1:
      case 2: {
        std::string changed = request();
        const size_t at = bytes.Next();
        const bool passes = at % 2 == 1;
        changed[at % changed.size()] = static_cast<char>(bytes.Next());
        connection->Ask(changed, passes ? STDERR_FILENO : -1);
        break;
      }
      case 3:
        connection->Ask(request(), -1);
        break;
      case 4:
        connection = std::make_unique<Connection>();
        break;
      case 5:
        connection->NoMore();
        break;
      case 6: {
        v1::ReleaseRegionRequest release;
        release.set_session_id(daemon.SessionId());
        release.set_region_id(daemon.RegionId());
        if (!daemon.Call(release).ok()) Broken("a region can be released");
        v1::CreateRegionRequest create;
        create.set_session_id(daemon.SessionId());
        create.set_size_bytes(1);
        if (!daemon.Call(create).ok()) Broken("a region can be made");
        break;
      }
    }
  }
  connection.reset();
  daemon.End();
}

}  // namespace

std::vector<Target> BrokerTargets() {
  return {{"broker", "packets into the broker's socket", nullptr, RunBroker}};
}

}  // namespace lamina::fuzz
