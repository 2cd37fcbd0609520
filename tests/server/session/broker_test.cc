// The broker: who gets a descriptor, who gets nothing, and that nobody stops it for the others.
#include "server/session/broker.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <list>

#include "tests/server/session/broker_client.h"
#include "tests/server/session/session_rig.h"

namespace lamina::testing {
namespace {

class Folder {
 public:
  Folder() {
    char name[] = "/tmp/lamina-broker-XXXXXX";
    path_ = mkdtemp(name);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

mode_t ModeOf(const std::string& path) {
  struct stat found {};
  return lstat(path.c_str(), &found) == 0 ? found.st_mode & 0777 : 0;
}

int OpenDescriptors() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++count;
  return count;
}

class BrokerTest : public ::testing::Test {
 protected:
  void Start(BrokerOptions options = {}) {
    options.path = path();
    broker = Value(Broker::Start(std::move(options), *rig.manager));
    opened = Value(rig.manager->Open(""));
    region = Value(opened.session->CreateRegion(8192));
  }
  std::string path() const { return folder.path() + "/run/broker.sock"; }

  Folder folder;
  SessionRig rig;
  std::unique_ptr<Broker> broker;
  SessionManager::Opened opened;
  std::shared_ptr<Region> region;
};

TEST_F(BrokerTest, HandsOutTheSessionsOwnRegion) {
  Start();
  BrokerClient client(path());
  const BrokerClient::Answer answer = client.Ask(opened.id, region->id());
  ASSERT_FALSE(answer.hung_up);
  EXPECT_EQ(answer.bytes.size(), 12u);
  EXPECT_EQ(answer.status, 0u);
  EXPECT_EQ(answer.length, 8192u);
  ASSERT_GE(answer.descriptor, 0);
  void* mapped = mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, answer.descriptor, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  std::strcpy(static_cast<char*>(mapped) + 8000, "written by the client");
  EXPECT_STREQ(static_cast<const char*>(region->data()) + 8000, "written by the client");
  EXPECT_EQ(ftruncate(answer.descriptor, 0), -1);
  EXPECT_EQ(fcntl(answer.descriptor, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  munmap(mapped, 8192);
  close(answer.descriptor);
}

TEST_F(BrokerTest, EveryOtherPairGetsTheSameAnswer) {
  Start();
  const SessionManager::Opened other = Value(rig.manager->Open(""));
  const std::string foreign = Value(other.session->CreateRegion(1))->id();
  const std::string gone = Value(opened.session->CreateRegion(1))->id();
  ASSERT_TRUE(opened.session->ReleaseRegion(gone).ok());
  BrokerClient client(path());
  const std::string zeros(32, '0');
  const std::string expected("\5\0\0\0\0\0\0\0\0\0\0\0", 12);  // NOT_FOUND and no length
  for (const auto& [session, wanted] :
       {std::pair(opened.id, foreign), std::pair(other.id, region->id()),
        std::pair(opened.id, gone), std::pair(opened.id, zeros), std::pair(zeros, region->id()),
        std::pair(region->id(), opened.id), std::pair(std::string(32, '\0'), zeros)}) {
    const BrokerClient::Answer answer = client.Ask(session, wanted);
    EXPECT_EQ(answer.bytes, expected);
    EXPECT_EQ(answer.descriptor, -1);
  }
  const BrokerClient::Answer good = client.Ask(opened.id, region->id());
  EXPECT_EQ(good.status, 0u) << "the connection serves on";
  close(good.descriptor);
}

TEST_F(BrokerTest, HangsUpOnWhatIsNoRequest) {
  Start();
  const std::string good = "LMN1" + opened.id + region->id();
  std::string newer = good, lower = good;
  newer[3] = '2';
  lower[0] = 'l';
  for (const std::string& packet :
       {std::string("L"), std::string("LMN1"), good.substr(0, 67), good + "0", good + good, newer,
        lower, std::string(68, '\0'), std::string(65536, 'A')}) {
    BrokerClient client(path());
    ASSERT_TRUE(client.Send(packet));
    const auto answer = client.Receive();
    ASSERT_TRUE(answer.has_value());
    EXPECT_TRUE(answer->hung_up) << packet.size();
  }
  // A request in two packets is none either.
  BrokerClient client(path());
  ASSERT_TRUE(client.Send(good.substr(0, 34)));
  (void)client.Send(good.substr(34));
  EXPECT_TRUE(client.Receive()->hung_up);
}

TEST_F(BrokerTest, KeepsNoDescriptorThatAClientSends) {
  Start();
  BrokerClient client(path());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Send("LMN1" + opened.id + region->id(), 0));
    const auto answer = client.Receive();
    ASSERT_TRUE(answer.has_value() && !answer->hung_up);
    close(answer->descriptor);
  }
  const int before = OpenDescriptors();
  for (int i = 0; i < 50; ++i) {
    ASSERT_TRUE(client.Send("LMN1" + opened.id + region->id(), 0));
    close(client.Receive()->descriptor);
  }
  EXPECT_EQ(OpenDescriptors(), before);
}

TEST_F(BrokerTest, ForgetsWhoIsSilent) {
  Start({.idle_timeout = absl::Milliseconds(300)});
  BrokerClient silent(path());
  const auto begin = std::chrono::steady_clock::now();
  const auto answer = silent.Receive();
  ASSERT_TRUE(answer.has_value());
  EXPECT_TRUE(answer->hung_up);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(290));
}

TEST_F(BrokerTest, ConnectionsBeyondTheCapWaitForTheirTurn) {
  Start({.connection_cap = 2});
  std::list<BrokerClient> taken;
  for (int i = 0; i < 2; ++i) {
    close(taken.emplace_back(path()).Ask(opened.id, region->id()).descriptor);
  }
  BrokerClient waiting(path());
  ASSERT_TRUE(waiting.Send("LMN1" + opened.id + region->id()));
  EXPECT_FALSE(waiting.Receive(300).has_value());
  taken.pop_front();
  const auto answer = waiting.Receive();
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->status, 0u);
  close(answer->descriptor);
}

TEST_F(BrokerTest, DropsWhoDoesNotReadAndServesTheOthers) {
  Start();
  BrokerClient deaf(path());
  // Sent until the answers pile up and the broker hangs up; its receive buffer fills at worst.
  bool sent = true;
  for (int i = 0; i < 20000 && sent; ++i) {
    sent = deaf.Send("LMN1" + opened.id + region->id());
    if (!sent && errno == EAGAIN) {
      std::this_thread::yield();
      sent = true;
    }
  }
  EXPECT_FALSE(sent) << "it hung up";
  BrokerClient other(path());
  const BrokerClient::Answer answer = other.Ask(opened.id, region->id());
  EXPECT_EQ(answer.status, 0u);
  close(answer.descriptor);
}

TEST_F(BrokerTest, MayBeAskedWhileSessionsComeAndGo) {
  Start();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      BrokerClient client(path());
      for (int i = 0; i < 50; ++i) {
        const SessionManager::Opened mine = Value(rig.manager->Open(""));
        const std::string id = Value(mine.session->CreateRegion(4096))->id();
        const BrokerClient::Answer answer = client.Ask(mine.id, id);
        EXPECT_EQ(answer.status, 0u);
        ASSERT_TRUE(rig.manager->Delete(mine.id).ok());
        EXPECT_EQ(client.Ask(mine.id, id).status, 5u);
        // What it has been given stays readable.
        EXPECT_EQ(fcntl(answer.descriptor, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
        close(answer.descriptor);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// --- who may connect ---

// Asks as another user; "hung up", "refused" (no connection), or "served".
std::string AskAs(uid_t uid, const std::string& path, const std::string& session,
                  const std::string& region) {
  std::string result = "refused";
  std::thread([&] {
    // The system call itself changes this thread alone.
    if (syscall(SYS_setresuid, uid, uid, uid) != 0) return;
    try {
      BrokerClient client(path);
      const BrokerClient::Answer answer = client.Ask(session, region);
      result = answer.hung_up ? "hung up" : answer.status == 0 ? "served" : "not found";
      if (answer.descriptor >= 0) close(answer.descriptor);
    } catch (const std::runtime_error& error) {
      if (std::string(error.what()) == "can't send") result = "hung up";
    }
  }).join();
  return result;
}

TEST_F(BrokerTest, TheSocketIsTheOwnersAlone) {
  Start();
  EXPECT_EQ(ModeOf(path()), 0600u);
  EXPECT_EQ(ModeOf(folder.path() + "/run"), 0700u) << "it made that folder";
  if (geteuid() != 0) GTEST_SKIP() << "only root can be another user";
  EXPECT_EQ(AskAs(12345, path(), opened.id, region->id()), "refused");
}

TEST_F(BrokerTest, OnlyAllowedUsersAreServed) {
  if (geteuid() != 0) GTEST_SKIP() << "only root can be another user";
  Start({.allowed_uids = {12345}});
  for (const std::string& name : {folder.path(), folder.path() + "/run"})
    ASSERT_EQ(chmod(name.c_str(), 0755), 0);
  EXPECT_EQ(AskAs(12345, path(), opened.id, region->id()), "served");
  EXPECT_EQ(AskAs(12346, path(), opened.id, region->id()), "hung up");
  EXPECT_EQ(AskAs(0, path(), opened.id, region->id()), "served");
}

// --- the path ---

TEST_F(BrokerTest, APathInUseIsRefused) {
  Start();
  EXPECT_THAT(Broker::Start({.path = path()}, *rig.manager).status(),
              IsStatus(kUnavailable, "in use"));
  BrokerClient client(path());
  const BrokerClient::Answer answer = client.Ask(opened.id, region->id());
  EXPECT_EQ(answer.status, 0u) << "the first one serves on";
  close(answer.descriptor);
  broker.reset();
  EXPECT_FALSE(std::filesystem::exists(path())) << "its end removes the socket";
  EXPECT_TRUE(Broker::Start({.path = path()}, *rig.manager).ok());
}

TEST_F(BrokerTest, ASocketThatNobodyListensOnIsReplaced) {
  for (const int type : {SOCK_SEQPACKET, SOCK_STREAM}) {
    const std::string stale = folder.path() + "/stale.sock";
    const int dead = socket(AF_UNIX, type, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, stale.c_str(), sizeof(address.sun_path) - 1);
    ASSERT_EQ(bind(dead, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    close(dead);
    EXPECT_TRUE(Broker::Start({.path = stale}, *rig.manager).ok());
  }
}

TEST_F(BrokerTest, AFileThatIsNoSocketIsLeftAlone) {
  const std::string file = folder.path() + "/notes";
  std::ofstream(file) << "precious";
  EXPECT_THAT(Broker::Start({.path = file}, *rig.manager).status(),
              IsStatus(kInvalid, "no socket"));
  std::string content;
  std::ifstream(file) >> content;
  EXPECT_EQ(content, "precious");
}

TEST_F(BrokerTest, PathsThatASocketCantHave) {
  EXPECT_THAT(Broker::Start({.path = ""}, *rig.manager).status(), IsStatus(kInvalid, "107"));
  EXPECT_THAT(Broker::Start({.path = "/tmp/" + std::string(103, 'x')}, *rig.manager).status(),
              IsStatus(kInvalid, "107"));
  EXPECT_THAT(Broker::Start({.path = "/proc/none/broker.sock"}, *rig.manager).status(),
              IsStatus(kUnavailable, "/proc/none"));
}

}  // namespace
}  // namespace lamina::testing
