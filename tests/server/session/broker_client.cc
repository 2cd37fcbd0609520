#include "tests/server/session/broker_client.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace lamina::testing {

BrokerClient::BrokerClient(const std::string& path)
    : socket_(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  if (connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const int error = errno;
    close(socket_);
    throw std::runtime_error(std::strerror(error));
  }
}

BrokerClient::~BrokerClient() { close(socket_); }

bool BrokerClient::Send(const std::string& packet, int passed_descriptor) {
  iovec part{const_cast<char*>(packet.data()), packet.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (passed_descriptor >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &passed_descriptor, sizeof(int));
  }
  return sendmsg(socket_, &message, MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(packet.size());
}

std::optional<BrokerClient::Answer> BrokerClient::Receive(int milliseconds) {
  pollfd watched{socket_, POLLIN, 0};
  if (poll(&watched, 1, milliseconds) != 1) return std::nullopt;
  char bytes[128];
  iovec part{bytes, sizeof(bytes)};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(socket_, &message, MSG_CMSG_CLOEXEC);
  Answer answer;
  if (got <= 0) {
    answer.hung_up = true;
    return answer;
  }
  answer.bytes.assign(bytes, static_cast<size_t>(got));
  if (got == 12 || got == 12 + 64) {
    for (size_t i = 0; i < 4; ++i)
      answer.status |= static_cast<uint32_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
    for (size_t i = 0; i < 8; ++i)
      answer.length |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[4 + i])) << (8 * i);
    answer.handle = answer.bytes.substr(12);
  }
  if (const cmsghdr* header = CMSG_FIRSTHDR(&message);
      header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    if (header->cmsg_len != CMSG_LEN(sizeof(int))) throw std::runtime_error("more than one");
    std::memcpy(&answer.descriptor, CMSG_DATA(header), sizeof(int));
  }
  return answer;
}

BrokerClient::Answer BrokerClient::Ask(const std::string& session_id,
                                       const std::string& region_id) {
  if (!Send("LMN1" + session_id + region_id)) throw std::runtime_error("can't send");
  const std::optional<Answer> answer = Receive();
  if (!answer) throw std::runtime_error("no answer");
  return *answer;
}

}  // namespace lamina::testing
