#include "src/broker.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lamina::client::internal {
namespace {

constexpr char kMagic[] = "LMN1";
constexpr size_t kIdDigits = 32;
constexpr size_t kAnswerBytes = 12;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

absl::Status Failed(const std::string& path, const char* step, int error) {
  const std::string text =
      absl::StrCat("broker socket '", path, "': ", step, ": ", std::strerror(error));
  return error == EACCES || error == EPERM ? absl::PermissionDeniedError(text)
                                           : absl::UnavailableError(text);
}

absl::StatusOr<Descriptor> Connect(const BrokerRequest& request) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (request.path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("broker socket '", request.path,
                                                   "': the path is longer than ",
                                                   sizeof(address.sun_path) - 1, " bytes"));
  }
  std::memcpy(address.sun_path, request.path.c_str(), request.path.size() + 1);
  Descriptor socket_fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (socket_fd.get() < 0) return Failed(request.path, "socket", errno);
  timeval timeout{};
  timeout.tv_sec = request.timeout.count() / 1000;
  timeout.tv_usec = request.timeout.count() % 1000 * 1000;
  for (const int option : {SO_RCVTIMEO, SO_SNDTIMEO}) {
    if (setsockopt(socket_fd.get(), SOL_SOCKET, option, &timeout, sizeof(timeout)) != 0) {
      return Failed(request.path, "setsockopt", errno);
    }
  }
  while (connect(socket_fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) !=
         0) {
    if (errno != EINTR) return Failed(request.path, "connect", errno);
  }
  return socket_fd;
}

struct Answer {
  uint32_t code = 0;
  uint64_t length = 0;
  int descriptor = -1;  // owned by the receiver
};

absl::StatusOr<Answer> Receive(int socket_fd, const std::string& path) {
  std::array<unsigned char, kAnswerBytes> bytes{};
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t received = 0;
  do {
    received = recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return Failed(path, "receive", errno);

  Answer answer;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS &&
        header->cmsg_len == CMSG_LEN(sizeof(int))) {
      std::memcpy(&answer.descriptor, CMSG_DATA(header), sizeof(int));
    }
  }
  const bool cut = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  if (received == 0 && answer.descriptor < 0) {
    return absl::UnavailableError(
        absl::StrCat("broker socket '", path, "': closed without an answer"));
  }
  if (received != static_cast<ssize_t>(kAnswerBytes) || cut) {
    if (answer.descriptor >= 0) close(answer.descriptor);
    return absl::InternalError(absl::StrCat("broker socket '", path, "': an answer of ", received,
                                            " bytes", cut ? ", cut off" : "", "; expected ",
                                            kAnswerBytes));
  }
  for (size_t i = 0; i < 4; ++i) answer.code |= static_cast<uint32_t>(bytes[i]) << (8 * i);
  for (size_t i = 0; i < 8; ++i) answer.length |= static_cast<uint64_t>(bytes[4 + i]) << (8 * i);
  return answer;
}

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), length_(std::exchange(other.length_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(length_, other.length_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, length_);
}

absl::StatusOr<Mapping> MapRegion(const BrokerRequest& request) {
  if (request.session_id.size() != kIdDigits || request.region_id.size() != kIdDigits) {
    return absl::InternalError("the daemon's ids are not 32 hexadecimal digits");
  }
  absl::StatusOr<Descriptor> socket_fd = Connect(request);
  if (!socket_fd.ok()) return socket_fd.status();

  const std::string text = absl::StrCat(kMagic, request.session_id, request.region_id);
  ssize_t sent = 0;
  do {
    sent = send(socket_fd->get(), text.data(), text.size(), MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent != static_cast<ssize_t>(text.size())) return Failed(request.path, "send", errno);

  absl::StatusOr<Answer> answer = Receive(socket_fd->get(), request.path);
  if (!answer.ok()) return answer.status();
  const Descriptor memory(answer->descriptor);
  if (answer->code != 0) {
    const auto code = answer->code <= 16 ? static_cast<absl::StatusCode>(answer->code)
                                         : absl::StatusCode::kUnknown;
    return absl::Status(code,
                        absl::StrCat("broker socket '", request.path,
                                     "' refused the region: ", absl::StatusCodeToString(code)));
  }
  if (memory.get() < 0) {
    return absl::InternalError(
        absl::StrCat("broker socket '", request.path, "': an answer without a descriptor"));
  }
  struct stat info {};
  if (fstat(memory.get(), &info) != 0) return Failed(request.path, "fstat", errno);
  if (answer->length != request.length || static_cast<uint64_t>(info.st_size) < request.length) {
    return absl::InternalError(absl::StrCat("broker socket '", request.path, "': a region of ",
                                            answer->length, " bytes in a file of ", info.st_size,
                                            "; expected ", request.length));
  }
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InternalError(absl::StrCat("broker socket '", request.path,
                                            "': the region is not sealed against shrinking"));
  }
  void* data = mmap(nullptr, request.length, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("mapping a region of ", request.length, " bytes: ", std::strerror(errno)));
  }
  return Mapping(data, request.length);
}

}  // namespace lamina::client::internal
