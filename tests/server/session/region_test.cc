// Regions: their memory, their seals, their caps, and how long they live.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "tests/server/session/session_rig.h"

namespace lamina::testing {
namespace {

using ::testing::ElementsAre;

size_t Page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Mappings of regions in this process.
int Mapped() {
  std::ifstream maps("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(maps, line);)
    count += line.find("lamina-region") != std::string::npos ? 1 : 0;
  return count;
}

class RegionTest : public ::testing::Test {
 protected:
  RegionTest() : RegionTest(SessionOptions{}) {}
  explicit RegionTest(const SessionOptions& options, bool registers = false)
      : rig(options, registers), session(Value(rig.manager->Open("")).session) {}

  SessionRig rig;
  std::shared_ptr<Session> session;
};

TEST_F(RegionTest, IsWholeZeroedPages) {
  for (const size_t bytes : {size_t{1}, Page() - 1, Page(), Page() + 1, 10 * Page()}) {
    const std::shared_ptr<Region> region = Value(session->CreateRegion(bytes));
    EXPECT_EQ(region->length(), (bytes + Page() - 1) / Page() * Page());
    const char* data = static_cast<const char*>(region->data());
    EXPECT_TRUE(std::all_of(data, data + region->length(), [](char c) { return c == 0; }));
    EXPECT_FALSE(region->registered());
  }
}

TEST_F(RegionTest, IsSealedAgainstResizingAndFurtherSeals) {
  const std::shared_ptr<Region> region = Value(session->CreateRegion(Page()));
  const int descriptor = region->descriptor();
  EXPECT_EQ(fcntl(descriptor, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_EQ(fcntl(descriptor, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  for (const off_t size : {off_t{0}, static_cast<off_t>(Page() * 2)}) {
    EXPECT_EQ(ftruncate(descriptor, size), -1);
    EXPECT_EQ(errno, EPERM);
  }
  EXPECT_EQ(fcntl(descriptor, F_ADD_SEALS, F_SEAL_WRITE), -1);
  // A write past the end would grow it.
  EXPECT_EQ(pwrite(descriptor, "x", 1, static_cast<off_t>(Page())), -1);
}

TEST_F(RegionTest, IsSharedWithWhoMapsItsDescriptor) {
  const std::shared_ptr<Region> region = Value(session->CreateRegion(Page()));
  void* other = mmap(nullptr, Page(), PROT_READ | PROT_WRITE, MAP_SHARED, region->descriptor(), 0);
  ASSERT_NE(other, MAP_FAILED);
  std::strcpy(static_cast<char*>(other), "from a client");
  EXPECT_STREQ(static_cast<const char*>(region->data()), "from a client");
  munmap(other, Page());
}

TEST_F(RegionTest, SizesOutsideTheRangeAreRefused) {
  for (const size_t bytes : {size_t{0}, (size_t{1} << 46) + 1, ~size_t{0}}) {
    EXPECT_THAT(session->CreateRegion(bytes).status(),
                IsStatus(kInvalid, absl::StrCat("size_bytes: ", bytes)));
  }
  EXPECT_EQ(rig.manager->live_regions(), 0);
}

TEST_F(RegionTest, AnotherSessionsIdIsNotFound) {
  const std::shared_ptr<Region> region = Value(session->CreateRegion(1));
  const std::shared_ptr<Session> other = Value(rig.manager->Open("")).session;
  const absl::Status foreign = other->FindRegion(region->id()).status();
  EXPECT_THAT(foreign, IsStatus(kNotFound, "region_id"));
  EXPECT_EQ(foreign, other->FindRegion(std::string(32, 'f')).status()) << "it does not tell which";
  EXPECT_EQ(foreign, other->ReleaseRegion(region->id()));
  EXPECT_EQ(Value(session->FindRegion(region->id())), region);
}

TEST_F(RegionTest, AreListedInOrderOfCreation) {
  std::vector<std::shared_ptr<Region>> made;
  for (int i = 0; i < 5; ++i) made.push_back(Value(session->CreateRegion(1)));
  EXPECT_EQ(session->ListRegions(), made);
  ASSERT_TRUE(session->ReleaseRegion(made[2]->id()).ok());
  made.erase(made.begin() + 2);
  EXPECT_EQ(session->ListRegions(), made);
}

TEST_F(RegionTest, StaysMappedAndChargedWhileACallHoldsIt) {
  std::shared_ptr<Region> held = Value(session->CreateRegion(Page()));
  ASSERT_TRUE(session->ReleaseRegion(held->id()).ok());
  EXPECT_FALSE(session->FindRegion(held->id()).ok());
  EXPECT_THAT(session->ReleaseRegion(held->id()), IsStatus(kNotFound, "region_id"));
  EXPECT_EQ(Mapped(), 1);
  EXPECT_EQ(rig.manager->region_bytes(), Page());
  static_cast<char*>(held->data())[Page() - 1] = 1;
  held.reset();
  EXPECT_EQ(Mapped(), 0);
  EXPECT_EQ(rig.manager->region_bytes(), 0u);
  EXPECT_EQ(rig.manager->live_regions(), 0);
}

TEST_F(RegionTest, OutlivesItsSessionWhereACallHoldsIt) {
  std::shared_ptr<Region> held = Value(session->CreateRegion(Page()));
  session.reset();
  rig.manager.reset();
  static_cast<char*>(held->data())[0] = 1;
  EXPECT_EQ(Mapped(), 1);
  held.reset();
  EXPECT_EQ(Mapped(), 0);
}

TEST_F(RegionTest, MoreThanTheMachineHasIsRefusedBeforeItIsTaken) {
  SessionRig generous(
      {.region_cap_bytes = size_t{1} << 47, .total_region_cap_bytes = size_t{1} << 47});
  const std::shared_ptr<Session> greedy = Value(generous.manager->Open("")).session;
  EXPECT_THAT(greedy->CreateRegion(size_t{1} << 45).status(), IsStatus(kExhausted, "available"));
  EXPECT_EQ(generous.manager->region_bytes(), 0u);
  EXPECT_TRUE(greedy->CreateRegion(1).ok());
}

TEST_F(RegionTest, RunningOutOfDescriptorsChargesNothing) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const int next = dup(0);
  close(next);
  const rlimit none{static_cast<rlim_t>(next), before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const absl::Status status = session->CreateRegion(Page()).status();
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(status.code(), kExhausted) << status;
  EXPECT_EQ(rig.manager->region_bytes(), 0u);
  EXPECT_EQ(rig.manager->live_regions(), 0);
  EXPECT_TRUE(session->CreateRegion(Page()).ok());
}

class CapTest : public RegionTest {
 protected:
  CapTest()
      : RegionTest({.region_cap = 3,
                    .region_cap_bytes = 8 * Page(),
                    .total_region_cap_bytes = 10 * Page()}) {}
};

TEST_F(CapTest, OnRegions) {
  for (int i = 0; i < 3; ++i) Value(session->CreateRegion(1));
  EXPECT_THAT(session->CreateRegion(1).status(), IsStatus(kExhausted, "3 regions"));
  ASSERT_TRUE(session->ReleaseRegion(session->ListRegions()[1]->id()).ok());
  EXPECT_TRUE(session->CreateRegion(1).ok());
}

TEST_F(CapTest, OnASessionsBytes) {
  Value(session->CreateRegion(5 * Page()));
  EXPECT_THAT(
      session->CreateRegion(3 * Page() + 1).status(),
      IsStatus(kExhausted, absl::StrCat("takes ", 4 * Page(), " bytes; the session's regions have ",
                                        5 * Page(), " of at most ", 8 * Page())));
  EXPECT_TRUE(session->CreateRegion(3 * Page()).ok());
  EXPECT_EQ(rig.manager->region_bytes(), 8 * Page());
}

TEST_F(CapTest, OnAllSessionsBytesTogether) {
  Value(session->CreateRegion(8 * Page()));
  const std::shared_ptr<Session> other = Value(rig.manager->Open("")).session;
  EXPECT_THAT(other->CreateRegion(3 * Page()).status(),
              IsStatus(kExhausted, absl::StrCat("of at most ", 10 * Page())));
  EXPECT_TRUE(other->CreateRegion(2 * Page()).ok());
  // What was refused charged nobody.
  ASSERT_TRUE(session->ReleaseRegion(session->ListRegions()[0]->id()).ok());
  EXPECT_EQ(rig.manager->region_bytes(), 2 * Page());
  EXPECT_TRUE(other->CreateRegion(6 * Page()).ok());
}

TEST_F(CapTest, CantBePassedByManyAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> made{0}, refused{0};
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&] { ++(session->CreateRegion(Page()).ok() ? made : refused); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(made, 3);
  EXPECT_EQ(refused, 13);
}

class RegisteredTest : public RegionTest {
 protected:
  RegisteredTest() : RegionTest({}, /*registers=*/true) {}
};

TEST_F(RegisteredTest, IsRegisteredForAsLongAsItIsMapped) {
  std::shared_ptr<Region> region = Value(session->CreateRegion(1));
  EXPECT_TRUE(region->registered());
  ASSERT_TRUE(session->ReleaseRegion(region->id()).ok());
  EXPECT_THAT(rig.events(), ElementsAre("register"));
  region.reset();
  EXPECT_THAT(rig.events(), ElementsAre("register", "unregister"));
}

TEST_F(RegisteredTest, AFailureToRegisterLeavesNothing) {
  rig.register_status = absl::ResourceExhaustedError("no more pinned memory");
  EXPECT_THAT(session->CreateRegion(1).status(), IsStatus(kExhausted, "pinned"));
  EXPECT_THAT(rig.events(), ElementsAre("register"));
  EXPECT_EQ(rig.manager->live_regions(), 0);
  EXPECT_EQ(rig.manager->region_bytes(), 0u);
  EXPECT_EQ(Mapped(), 0);
}

}  // namespace
}  // namespace lamina::testing
