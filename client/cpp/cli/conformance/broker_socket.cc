#include "cli/conformance/broker_socket.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace lamina::conformance {
namespace {

constexpr int kPatienceSeconds = 5;

uint64_t LittleEndian(const unsigned char* bytes, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) value |= uint64_t{bytes[i]} << (8 * i);
  return value;
}

}  // namespace

BrokerSocket::BrokerSocket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) return;
  path.copy(address.sun_path, path.size());
  descriptor_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  const timeval patience{kPatienceSeconds, 0};
  setsockopt(descriptor_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  connected_ = descriptor_ >= 0 &&
               connect(descriptor_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
}

BrokerSocket::~BrokerSocket() {
  if (descriptor_ >= 0) close(descriptor_);
}

BrokerAnswer BrokerSocket::Ask(const std::string& packet) {
  BrokerAnswer answer;
  if (!connected_) return answer;
  if (send(descriptor_, packet.data(), packet.size(), MSG_NOSIGNAL) < 0) {
    answer.closed = true;
    return answer;
  }
  // Room for more than the rules allow, so that more is seen.
  std::array<unsigned char, 128> bytes{};
  iovec part{bytes.data(), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = recvmsg(descriptor_, &message, MSG_CMSG_CLOEXEC);
  const cmsghdr* header = got < 0 ? nullptr : CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    std::memcpy(&answer.descriptor, CMSG_DATA(header), sizeof(int));
  }
  Require(got >= 0 || errno == ECONNRESET, "the broker does not answer within ", kPatienceSeconds,
          " s");
  answer.closed = got <= 0;
  if (answer.closed) return answer;
  Require(got == 12 || got == 12 + 64, "the broker's answer has ", got,
          " bytes; it must have 12, or 76 with a handle");
  answer.handle.assign(bytes.begin() + 12, bytes.begin() + got);
  answer.code = static_cast<Code>(LittleEndian(bytes.data(), 4));
  answer.length = LittleEndian(bytes.data() + 4, 8);
  return answer;
}

std::string BrokerRequest(const std::string& session_id, const std::string& region_id) {
  return absl::StrCat("LMN1", session_id, region_id);
}

BrokerAnswer AskBroker(const std::string& path, const std::string& session_id,
                       const std::string& region_id) {
  return BrokerSocket(path).Ask(BrokerRequest(session_id, region_id));
}

MappedRegion::MappedRegion(Daemon& daemon, const std::string& session_id, uint64_t size_bytes)
    : daemon_(daemon), session_id_(session_id) {
  daemon.NeedRegions();
  v1::CreateRegionRequest request;
  request.set_session_id(session_id);
  request.set_size_bytes(size_bytes);
  region_ = daemon.Ok(request).region();
  const BrokerAnswer answer =
      AskBroker(daemon.session_info().broker_path(), session_id, region_.region_id());
  Require(answer.code == Code::OK && answer.descriptor >= 0,
          "the broker hands out no descriptor for a new region: ", CodeName(answer.code));
  void* data = mmap(nullptr, region_.length_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED,
                    answer.descriptor, 0);
  close(answer.descriptor);
  Require(data != MAP_FAILED, "a region's descriptor can't be mapped: ", std::strerror(errno));
  data_ = static_cast<char*>(data);
}

MappedRegion::~MappedRegion() {
  munmap(data_, region_.length_bytes());
  v1::ReleaseRegionRequest request;
  request.set_session_id(session_id_);
  request.set_region_id(region_.region_id());
  daemon_.Finally(request);  // a check may have given it up itself
}

v1::Slice MappedRegion::Slice(uint64_t offset_bytes, uint64_t size_bytes) const {
  v1::Slice slice;
  slice.set_region_id(region_.region_id());
  slice.set_offset_bytes(offset_bytes);
  slice.set_size_bytes(size_bytes);
  return slice;
}

}  // namespace lamina::conformance
