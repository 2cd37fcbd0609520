// Sessions: capabilities, leases, keepers, caps, and the order in which things end.
#include "server/session/session_manager.h"

#include <atomic>
#include <cctype>
#include <set>

#include "absl/strings/str_cat.h"
#include "tests/server/session/session_rig.h"

namespace lamina::testing {
namespace {

using ::testing::ElementsAre;

SessionOptions Lease(absl::Duration lease) { return SessionOptions{.lease = lease}; }

TEST(SessionManager, IdsAre128RandomBitsInHexadecimal) {
  SessionRig rig;
  std::set<std::string> ids;
  std::set<uint64_t> keys;
  for (int i = 0; i < 100; ++i) {
    const SessionManager::Opened opened = Value(rig.manager->Open("x"));
    EXPECT_EQ(opened.id.size(), 32u);
    for (const char c : opened.id) EXPECT_TRUE(std::isxdigit(static_cast<unsigned char>(c)));
    ids.insert(opened.id);
    keys.insert(opened.session->key());
    const std::string region = Value(opened.session->CreateRegion(1))->id();
    EXPECT_EQ(region.size(), 32u);
    ids.insert(region);
  }
  EXPECT_EQ(ids.size(), 200u);
  EXPECT_EQ(keys.size(), 100u);
}

TEST(SessionManager, FindsItsOwnAndNothingElse) {
  SessionRig rig;
  const SessionManager::Opened opened = Value(rig.manager->Open("me"));
  EXPECT_EQ(Value(rig.manager->Find(opened.id))->key(), opened.session->key());
  EXPECT_EQ(opened.session->client_name(), "me");
  std::string wrong = opened.id;
  wrong[31] = wrong[31] == '0' ? '1' : '0';
  for (const std::string& id :
       {wrong, std::string(), opened.id.substr(1), opened.id + "0", std::string(32, '\0')}) {
    const absl::Status status = rig.manager->Find(id).status();
    EXPECT_THAT(status, IsStatus(kNotFound, "session_id"));
    EXPECT_EQ(status, rig.manager->Delete(id)) << "every wrong id gets the same answer";
    EXPECT_EQ(status, rig.manager->BindKeeper(id, nullptr));
    EXPECT_TRUE(id.empty() || std::string(status.message()).find(id) == std::string::npos);
  }
}

TEST(SessionManager, ClientNamesArePrintableAndShort) {
  SessionRig rig;
  EXPECT_TRUE(rig.manager->Open("").ok());
  EXPECT_TRUE(rig.manager->Open(std::string(64, '~')).ok());
  for (const std::string& name : {std::string(65, 'a'), std::string("a\nb"), std::string("a\0b", 3),
                                  std::string("\x7F"), std::string("\xC3\xA4")}) {
    EXPECT_THAT(rig.manager->Open(name).status(), IsStatus(kInvalid, "client_name"));
  }
  EXPECT_EQ(rig.manager->live_sessions(), 2);
}

TEST(SessionManager, TheCapOnSessionsNamesItsNumberAndIsGivenBack) {
  SessionRig rig({.session_cap = 2});
  const std::string first = Value(rig.manager->Open("")).id;
  Value(rig.manager->Open(""));
  EXPECT_THAT(rig.manager->Open("").status(), IsStatus(kExhausted, "2 sessions"));
  EXPECT_EQ(rig.manager->live_sessions(), 2);
  EXPECT_TRUE(rig.manager->Delete(first).ok());
  EXPECT_TRUE(rig.manager->Open("").ok());
}

TEST(SessionManager, SilenceForTheLeaseEndsASession) {
  SessionRig rig(Lease(absl::Milliseconds(100)));
  const std::string id = Value(rig.manager->Open("")).id;
  WaitUntil([&] { return rig.manager->live_sessions() == 0; });
  EXPECT_THAT(rig.manager->Find(id).status(), IsStatus(kNotFound, "lease"));
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 lease_expired"));
}

TEST(SessionManager, CallsRenewTheLease) {
  SessionRig rig(Lease(absl::Milliseconds(600)));
  const std::string kept = Value(rig.manager->Open("")).id;
  const std::string silent = Value(rig.manager->Open("")).id;
  for (int i = 0; i < 30; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ASSERT_TRUE(rig.manager->Find(kept).ok()) << i;
  }
  // Within this time the other one has gone, so the leases are the sessions' own.
  EXPECT_FALSE(rig.manager->Find(silent).ok());
}

TEST(SessionManager, OneKeeperASession) {
  SessionRig rig;
  const std::string id = Value(rig.manager->Open("")).id;
  EXPECT_TRUE(rig.manager->BindKeeper(id, nullptr).ok());
  EXPECT_THAT(rig.manager->BindKeeper(id, nullptr), IsStatus(kExists, "KeepAlive"));
}

TEST(SessionManager, AKeepersEndIsTheSessionsEndAndIsNotToldToTheKeeper) {
  SessionRig rig;
  const std::string id = Value(rig.manager->Open("")).id;
  std::atomic<int> told{0};
  ASSERT_TRUE(rig.manager->BindKeeper(id, [&](const std::string&) { ++told; }).ok());
  rig.manager->UnbindKeeper(id, "keep_alive_closed");
  EXPECT_FALSE(rig.manager->Find(id).ok());
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 keep_alive_closed"));
  rig.manager->UnbindKeeper(id, "again");
  rig.manager->UnbindKeeper("nobody", "again");
  EXPECT_EQ(rig.events().size(), 1u);
  EXPECT_EQ(told, 0);
}

TEST(SessionManager, AKeeperIsToldOfEveryOtherEnd) {
  SessionRig rig(Lease(absl::Milliseconds(200)));
  std::mutex mutex;
  std::vector<std::string> told;
  const auto lost = [&](const std::string& reason) {
    std::lock_guard<std::mutex> lock(mutex);
    told.push_back(reason);
  };
  const std::string deleted = Value(rig.manager->Open("")).id;
  ASSERT_TRUE(rig.manager->BindKeeper(deleted, lost).ok());
  ASSERT_TRUE(rig.manager->Delete(deleted).ok());
  const std::string silent = Value(rig.manager->Open("")).id;
  ASSERT_TRUE(rig.manager->BindKeeper(silent, lost).ok());
  WaitUntil([&] {
    std::lock_guard<std::mutex> lock(mutex);
    return told.size() == 2;
  });
  EXPECT_THAT(told, ElementsAre("deleted", "keep_alive_silent"));
  WaitUntil([&] { return rig.events().size() == 2; });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 deleted", "ended 2 keep_alive_silent"));
}

TEST(SessionManager, DeletingEndsAtOnceWhereNoCallRuns) {
  SessionRig rig;
  SessionManager::Opened opened = Value(rig.manager->Open(""));
  Value(opened.session->CreateRegion(1));
  opened.session.reset();
  ASSERT_TRUE(rig.manager->Delete(opened.id).ok());
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 deleted"));
  EXPECT_EQ(rig.manager->live_regions(), 0);
  EXPECT_EQ(rig.manager->region_bytes(), 0u);
  EXPECT_THAT(rig.manager->Delete(opened.id), IsStatus(kNotFound, "session_id"));
}

// No new call, then the running one, then the contexts (the end hook), then the regions.
TEST(SessionManager, ThingsEndInOrder) {
  SessionRig rig({}, /*registers=*/true);
  SessionManager::Opened opened = Value(rig.manager->Open(""));
  Value(opened.session->CreateRegion(1));
  std::shared_ptr<Session> call = std::move(opened.session);
  ASSERT_TRUE(rig.manager->Delete(opened.id).ok());
  EXPECT_FALSE(rig.manager->Find(opened.id).ok());
  EXPECT_EQ(rig.manager->live_sessions(), 0);
  EXPECT_THAT(rig.events(), ElementsAre("register")) << "a call still runs";
  // That call sees its regions to its end; new ones are not for it.
  EXPECT_EQ(call->ListRegions().size(), 1u);
  EXPECT_THAT(call->CreateRegion(1).status(), IsStatus(kNotFound, "session_id"));
  EXPECT_EQ(rig.manager->live_regions(), 1);
  call.reset();
  EXPECT_EQ(rig.manager->live_regions(), 0);
  EXPECT_THAT(rig.events(), ElementsAre("register", "ended 1 deleted", "unregister"));
}

TEST(SessionManager, TheManagersEndEndsEverySession) {
  SessionRig rig;
  for (int i = 0; i < 3; ++i) Value(Value(rig.manager->Open("")).session->CreateRegion(1));
  rig.manager.reset();
  EXPECT_THAT(rig.events(), ::testing::UnorderedElementsAre("ended 1 shutdown", "ended 2 shutdown",
                                                            "ended 3 shutdown"));
}

TEST(SessionManager, ManyThreadsAtOnce) {
  SessionRig rig({.lease = absl::Milliseconds(30), .session_cap = 1000}, /*registers=*/true);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 30; ++i) {
        const std::string id = Value(rig.manager->Open(absl::StrCat(t))).id;
        ASSERT_TRUE(rig.manager->BindKeeper(id, [](const std::string&) {}).ok());
        // The lease may end in the middle of this on a busy machine.
        if (auto session = rig.manager->Find(id); session.ok()) {
          if (auto region = (*session)->CreateRegion(4096); region.ok()) {
            static_cast<char*>((*region)->data())[4095] = 1;
            if (i % 2 == 0) (void)(*session)->ReleaseRegion((*region)->id());
          }
        }
        if (i % 3 == 0) (void)rig.manager->Delete(id);
        if (i % 3 == 1) rig.manager->UnbindKeeper(id, "keep_alive_closed");
        EXPECT_GE(rig.manager->live_regions(), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  WaitUntil([&] { return rig.manager->live_sessions() == 0 && rig.manager->live_regions() == 0; });
  EXPECT_EQ(rig.manager->region_bytes(), 0u);
  int64_t ended = 0, registered = 0;
  WaitUntil([&] {
    ended = registered = 0;
    for (const std::string& event : rig.events()) {
      if (event.rfind("ended", 0) == 0) ++ended;
      if (event == "register") ++registered;
      if (event == "unregister") --registered;
    }
    return ended == 240;
  });
  EXPECT_EQ(ended, 240) << "each session ends once";
  EXPECT_EQ(registered, 0);
}

}  // namespace
}  // namespace lamina::testing
