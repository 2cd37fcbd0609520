// The broker's client side against a broker of the test's own that can misbehave.
#include "src/broker.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>

namespace lamina::client::internal {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr size_t kLength = 8192;
const std::string kSession(32, 'a');
const std::string kRegion(32, 'b');

int MakeMemfd(size_t length, int seals) {
  const int fd = memfd_create("broker_test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  EXPECT_EQ(ftruncate(fd, static_cast<off_t>(length)), 0);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, seals), 0);
  return fd;
}

std::string Header(uint32_t code, uint64_t length) {
  std::string bytes(12, '\0');
  for (size_t i = 0; i < 4; ++i) bytes[i] = static_cast<char>(code >> (8 * i));
  for (size_t i = 0; i < 8; ++i) bytes[4 + i] = static_cast<char>(length >> (8 * i));
  return bytes;
}

void Send(int peer, const std::string& bytes, int descriptor) {
  iovec part{const_cast<char*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (descriptor >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  }
  EXPECT_EQ(sendmsg(peer, &message, MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}

// Answers one connection with what it is told to.
class FakeBroker {
 public:
  explicit FakeBroker(std::function<void(int peer, const std::string& request)> answer) {
    std::string pattern = ::testing::TempDir() + "lamina-broker-XXXXXX";
    folder_ = mkdtemp(pattern.data());
    path_ = folder_ + "/broker.sock";
    listener_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.c_str(), path_.size() + 1);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener_, 1), 0);
    thread_ = std::thread([this, answer = std::move(answer)] {
      const int peer = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      std::array<char, 256> buffer{};
      const ssize_t received = recv(peer, buffer.data(), buffer.size(), 0);
      answer(peer, std::string(buffer.data(), static_cast<size_t>(std::max<ssize_t>(received, 0))));
      close(peer);
    });
  }
  ~FakeBroker() {
    thread_.join();
    close(listener_);
    std::filesystem::remove_all(folder_);
  }
  BrokerRequest Request() const {
    return {.path = path_,
            .session_id = kSession,
            .region_id = kRegion,
            .length = kLength,
            .timeout = std::chrono::milliseconds(2000)};
  }

 private:
  std::string folder_, path_;
  int listener_ = -1;
  std::thread thread_;
};

absl::Status Outcome(const std::string& answer, int descriptor) {
  FakeBroker broker([&](int peer, const std::string&) { Send(peer, answer, descriptor); });
  const absl::Status status = MapRegion(broker.Request()).status();
  if (descriptor >= 0) close(descriptor);
  return status;
}

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

TEST(Broker, MapsTheSharedPages) {
  const int fd = MakeMemfd(kLength, kSeals);
  std::string request;
  FakeBroker broker([&](int peer, const std::string& text) {
    request = text;
    Send(peer, Header(0, kLength), fd);
  });
  const auto mapping = MapRegion(broker.Request());
  ASSERT_TRUE(mapping.ok()) << mapping.status();
  EXPECT_EQ(request, "LMN1" + kSession + kRegion);
  EXPECT_EQ(mapping->length(), kLength);
  static_cast<char*>(mapping->data())[kLength - 1] = 'x';
  char last = 0;
  EXPECT_EQ(pread(fd, &last, 1, kLength - 1), 1);
  EXPECT_EQ(last, 'x');
  close(fd);
}

TEST(Broker, PassesOnTheBrokersCode) {
  const absl::Status refused = Outcome(Header(5, 0), -1);
  EXPECT_EQ(refused.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(refused.message()),
              AllOf(HasSubstr("refused"), Not(HasSubstr(kRegion)), Not(HasSubstr(kSession))));
  EXPECT_EQ(Outcome(Header(7, 0), -1).code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(Outcome(Header(99, 0), -1).code(), absl::StatusCode::kUnknown);
}

TEST(Broker, RefusesWhatBreaksTheRules) {
  EXPECT_EQ(Outcome(Header(0, kLength), -1).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Outcome("short", -1).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Outcome(Header(0, kLength) + "more", MakeMemfd(kLength, kSeals)).code(),
            absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(Outcome(Header(0, 4096), MakeMemfd(kLength, kSeals)).message()),
              HasSubstr("4096"));
  // A file that is smaller than it says, or may shrink, would kill this process at the first touch.
  EXPECT_EQ(Outcome(Header(0, kLength), MakeMemfd(4096, kSeals)).code(),
            absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(Outcome(Header(0, kLength), MakeMemfd(kLength, F_SEAL_GROW)).message()),
              HasSubstr("not sealed"));
  FakeBroker closes([](int, const std::string&) {});
  EXPECT_EQ(MapRegion(closes.Request()).status().code(), absl::StatusCode::kUnavailable);
}

TEST(Broker, GivesUpOnSilence) {
  FakeBroker silent([](int peer, const std::string&) {
    char byte = 0;
    EXPECT_EQ(recv(peer, &byte, 1, 0), 0);  // until the client hangs up
  });
  BrokerRequest request = silent.Request();
  request.timeout = std::chrono::milliseconds(100);
  EXPECT_EQ(MapRegion(request).status().code(), absl::StatusCode::kUnavailable);
}

TEST(Broker, SaysWhichSocketIsMissing) {
  const absl::Status missing =
      MapRegion(
          {.path = "/nowhere/broker", .session_id = kSession, .region_id = kRegion, .length = 1})
          .status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(missing.message()), HasSubstr("/nowhere/broker"));
  const absl::Status long_path = MapRegion({.path = std::string(200, 'p'),
                                            .session_id = kSession,
                                            .region_id = kRegion,
                                            .length = 1})
                                     .status();
  EXPECT_EQ(long_path.code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace lamina::client::internal
