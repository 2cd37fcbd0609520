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
    EXPECT_EQ(status, rig.manager->BindKeeper(id, nullptr).status());
    EXPECT_TRUE(id.empty() || std::string(status.message()).find(id) == std::string::npos);
  }
}

TEST(SessionManager, ASessionWithAnOwnerIsThereForThatOneAlone) {
  SessionRig rig;
  SessionManager& manager = *rig.manager;
  const std::string mine = Value(manager.Open("me", absl::ZeroDuration(), "uid:7")).id;
  const std::string far = Value(manager.Open("me", absl::ZeroDuration(), "token:a")).id;
  const std::string nobodys = Value(manager.Open("me")).id;
  EXPECT_TRUE(manager.Find(mine, "uid:7").ok());
  const absl::Status nowhere = manager.Find("", "uid:7").status();
  for (const std::string other : {"", "uid:70", "uid:", "token:a"}) {
    EXPECT_EQ(manager.Find(mine, other).status(), nowhere) << other;
    EXPECT_EQ(manager.BindKeeper(mine, nullptr, other).status(), nowhere) << other;
    EXPECT_EQ(manager.Delete(mine, other), nowhere) << other;
  }
  EXPECT_TRUE(manager.Find(nobodys, "uid:7").ok());
  // Processes of this host: users' sessions are theirs, others are who's that knows the id.
  EXPECT_TRUE(manager.FindLocally(mine, 7).ok());
  EXPECT_EQ(manager.FindLocally(mine, 70).status(), nowhere);
  EXPECT_TRUE(manager.FindLocally(far, 70).ok());
  EXPECT_TRUE(manager.FindLocally(nobodys, 70).ok());
  EXPECT_TRUE(manager.BindKeeper(mine, nullptr, "uid:7").ok());
  EXPECT_TRUE(manager.Delete(mine, "uid:7").ok());
  EXPECT_EQ(manager.FindLocally(mine, 7).status(), nowhere);
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
  EXPECT_THAT(rig.manager->BindKeeper(id, nullptr).status(), IsStatus(kExists, "KeepAlive"));
}

TEST(SessionManager, AKeepersEndIsTheSessionsEndAndIsNotToldToTheKeeper) {
  SessionRig rig;
  const std::string id = Value(rig.manager->Open("")).id;
  std::atomic<int> told{0};
  const uint64_t keeper =
      Value(rig.manager->BindKeeper(id, [&](const std::string&) { ++told; })).keeper;
  rig.manager->UnbindKeeper(id, keeper + 1, "not this one's");
  EXPECT_TRUE(rig.manager->Find(id).ok());
  rig.manager->UnbindKeeper(id, keeper, "keep_alive_closed");
  EXPECT_FALSE(rig.manager->Find(id).ok());
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 keep_alive_closed"));
  rig.manager->UnbindKeeper(id, keeper, "again");
  rig.manager->UnbindKeeper("nobody", keeper, "again");
  EXPECT_FALSE(rig.manager->BreakKeeper(id, keeper));
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

// --- a grace ---

using Arrival = SessionManager::Arrival;

TEST(SessionManager, WithoutAGraceABrokenKeeperIsTheSessionsEnd) {
  SessionRig rig;
  const std::string id = Value(rig.manager->Open("")).id;
  const uint64_t keeper = Value(rig.manager->BindKeeper(id, nullptr)).keeper;
  EXPECT_FALSE(rig.manager->BreakKeeper(id, keeper));
  EXPECT_FALSE(rig.manager->Find(id).ok());
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 keep_alive_broken"));
}

TEST(SessionManager, TheGraceIsGrantedUpToTheCap) {
  SessionRig rig({.resume_grace_cap = absl::Seconds(5)});
  const auto granted = [&](absl::Duration asked) {
    return Value(rig.manager->Open("", asked)).session->resume_grace();
  };
  EXPECT_EQ(granted(absl::Seconds(3)), absl::Seconds(3));
  EXPECT_EQ(granted(absl::Seconds(7)), absl::Seconds(5));
  EXPECT_EQ(granted(absl::InfiniteDuration()), absl::Seconds(5));
  EXPECT_EQ(Value(rig.manager->Open("")).session->resume_grace(), absl::ZeroDuration());
}

TEST(SessionManager, ABrokenKeeperLeavesASessionWithAGraceAdriftUntilTheNextOne) {
  SessionRig rig;
  SessionManager::Opened opened = Value(rig.manager->Open("", absl::Seconds(60)));
  const std::string region = Value(opened.session->CreateRegion(1))->id();
  std::atomic<int> told{0};
  const auto lost = [&](const std::string&) { ++told; };
  const SessionManager::Keeping first = Value(rig.manager->BindKeeper(opened.id, lost));
  EXPECT_EQ(first.arrival, Arrival::kFirst);
  EXPECT_EQ(first.session->key(), opened.session->key());
  for (int round = 0; round < 2; ++round) {
    const uint64_t keeper = round == 0 ? first.keeper : first.keeper + 1;
    EXPECT_EQ(rig.manager->adrift_sessions(), 0);
    EXPECT_TRUE(rig.manager->BreakKeeper(opened.id, keeper));
    EXPECT_FALSE(rig.manager->BreakKeeper(opened.id, keeper)) << "it is not its keeper any more";
    EXPECT_EQ(rig.manager->adrift_sessions(), 1);
    EXPECT_TRUE(Value(rig.manager->Find(opened.id))->FindRegion(region).ok());
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const SessionManager::Keeping next = Value(rig.manager->BindKeeper(opened.id, lost));
    EXPECT_EQ(next.arrival, Arrival::kReconnected);
    EXPECT_GE(next.adrift, absl::Milliseconds(20));
    EXPECT_EQ(next.keeper, keeper + 1);
    rig.manager->UnbindKeeper(opened.id, keeper, "the old one's");
  }
  EXPECT_TRUE(rig.manager->Find(opened.id).ok());
  EXPECT_EQ(told, 0);
  EXPECT_THAT(rig.events(), ElementsAre());
}

TEST(SessionManager, CallsDoNotProlongTheGrace) {
  SessionRig rig({.lease = absl::Seconds(60)});
  const std::string id = Value(rig.manager->Open("", absl::Milliseconds(300))).id;
  ASSERT_TRUE(rig.manager->BreakKeeper(id, Value(rig.manager->BindKeeper(id, nullptr)).keeper));
  const absl::Time broke = absl::Now();
  WaitUntil([&] { return !rig.manager->Find(id).ok(); });
  EXPECT_GE(absl::Now() - broke, absl::Milliseconds(290));
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 grace_over"));
  EXPECT_EQ(rig.manager->adrift_sessions(), 0);
  EXPECT_THAT(rig.manager->BindKeeper(id, nullptr).status(), IsStatus(kNotFound, "session_id"));
}

// The lease counts what is heard of a session, and of one that is adrift nothing may be heard.
TEST(SessionManager, TheGraceMayBeLongerThanTheLease) {
  SessionRig rig(Lease(absl::Milliseconds(100)));
  const std::string id = Value(rig.manager->Open("", absl::Seconds(60))).id;
  ASSERT_TRUE(rig.manager->BreakKeeper(id, Value(rig.manager->BindKeeper(id, nullptr)).keeper));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  ASSERT_TRUE(rig.manager->BindKeeper(id, nullptr).ok());
  // With a keeper, silence counts again.
  WaitUntil([&] { return !rig.events().empty(); });
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 keep_alive_silent"));
}

TEST(SessionManager, ANewKeeperTakesOverFromAnOpenOneThatIsTold) {
  SessionRig rig;
  const std::string id = Value(rig.manager->Open("", absl::Seconds(60))).id;
  std::vector<std::string> told;
  const auto lost = [&](const std::string& reason) { told.push_back(reason); };
  const uint64_t old = Value(rig.manager->BindKeeper(id, lost)).keeper;
  const SessionManager::Keeping next = Value(rig.manager->BindKeeper(id, nullptr));
  EXPECT_EQ(next.arrival, Arrival::kTookOver);
  EXPECT_THAT(told, ElementsAre("taken_over"));
  // What the old one says from now on is nothing to the session.
  EXPECT_FALSE(rig.manager->BreakKeeper(id, old));
  rig.manager->UnbindKeeper(id, old, "keep_alive_closed");
  EXPECT_TRUE(rig.manager->Find(id).ok());
  EXPECT_EQ(rig.manager->adrift_sessions(), 0);
  rig.manager->UnbindKeeper(id, next.keeper, "keep_alive_closed");
  EXPECT_FALSE(rig.manager->Find(id).ok());
  EXPECT_EQ(told.size(), 1u);
}

TEST(SessionManager, ASessionThatIsAdriftCanBeDeletedAndEndsWithTheManager) {
  SessionRig rig;
  const auto adrift = [&] {
    const std::string id = Value(rig.manager->Open("", absl::Seconds(60))).id;
    EXPECT_TRUE(rig.manager->BreakKeeper(id, Value(rig.manager->BindKeeper(id, nullptr)).keeper));
    return id;
  };
  EXPECT_TRUE(rig.manager->Delete(adrift()).ok());
  adrift();
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 deleted"));
  rig.manager.reset();
  EXPECT_THAT(rig.events(), ElementsAre("ended 1 deleted", "ended 2 shutdown"));
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
        const std::string id =
            Value(rig.manager->Open(absl::StrCat(t), absl::Milliseconds(i % 4 * 10))).id;
        // The lease may end in the middle of this on a busy machine.
        const auto bind = [&]() -> uint64_t {
          auto keeping = rig.manager->BindKeeper(id, [](const std::string&) {});
          return keeping.ok() ? keeping->keeper : 0;
        };
        uint64_t keeper = bind();
        if (i % 2 == 1 && rig.manager->BreakKeeper(id, keeper)) keeper = bind();
        if (auto session = rig.manager->Find(id); session.ok()) {
          if (auto region = (*session)->CreateRegion(4096); region.ok()) {
            static_cast<char*>((*region)->data())[4095] = 1;
            if (i % 2 == 0) (void)(*session)->ReleaseRegion((*region)->id());
          }
        }
        if (i % 3 == 0) (void)rig.manager->Delete(id);
        if (i % 3 == 1) rig.manager->UnbindKeeper(id, keeper, "keep_alive_closed");
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
