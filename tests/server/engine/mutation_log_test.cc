#include "server/engine/mutation_log.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine_rig.h"

namespace lamina::testing {
namespace {

class MutationLogTest : public ::testing::Test {
 protected:
  absl::StatusOr<MutationLog::Ticket> Begin(uint64_t sequence, const std::string& body,
                                            const CallControl& control = {}) {
    return log_.Begin(sequence, DigestOf(body), control);
  }
  void RunOne(uint64_t sequence) {
    auto ticket = Begin(sequence, absl::StrCat("body ", sequence));
    ASSERT_TRUE(ticket.ok()) << ticket.status();
    ASSERT_EQ(ticket->replay, nullptr);
    log_.Commit(sequence, absl::StrCat("answer ", sequence));
  }
  // Begins in a thread of its own; `done` says when it came back.
  struct Waiter {
    std::atomic<bool> done{false};
    absl::StatusOr<MutationLog::Ticket> ticket = absl::UnknownError("not yet");
    std::thread thread;
    ~Waiter() {
      if (thread.joinable()) thread.join();
    }
  };
  void BeginLater(Waiter& waiter, uint64_t sequence, const std::string& body,
                  const CallControl& control = {}) {
    waiter.thread = std::thread([this, &waiter, sequence, body, control] {
      waiter.ticket = Begin(sequence, body, control);
      waiter.done = true;
    });
  }
  static void ExpectWaits(const Waiter& waiter) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    EXPECT_FALSE(waiter.done);
  }

  MutationLog log_;
};

TEST(Digest, IsSha256) {
  // FIPS 180-2, appendix B.1.
  const BodyDigest digest = DigestOf("abc");
  EXPECT_EQ(digest[0], 0xba);
  EXPECT_EQ(digest[1], 0x78);
  EXPECT_EQ(digest[31], 0xad);
  EXPECT_NE(DigestOf(""), digest);
}

TEST_F(MutationLogTest, WhoHasTheTurnNeitherWaitsNorDisturbs) {
  const CallControl here{.has_turn = true};
  RunOne(1);
  EXPECT_TRUE(IsNotNow(Begin(3, "three", here).status())) << "2 may be on its way";
  auto two = Begin(2, "two", here);
  ASSERT_TRUE(two.ok());
  EXPECT_TRUE(IsNotNow(Begin(3, "three", here).status()));
  EXPECT_TRUE(IsNotNow(Begin(2, "two", here).status())) << "its answer isn't there yet";
  Waiter four, three;
  BeginLater(three, 3, "three");
  ExpectWaits(three);
  BeginLater(four, 4, "four");
  ExpectWaits(four);
  // Whoever waits for 3 must not take this for its end.
  EXPECT_TRUE(IsNotNow(Begin(3, "three", here).status()));
  ExpectWaits(four);
  log_.Commit(2, "answer 2");
  three.thread.join();
  EXPECT_OK(three.ticket.status());
  log_.Commit(3, "answer 3");
  four.thread.join();
  EXPECT_OK(four.ticket.status());
  const auto again = Begin(3, "three", here);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(*again->replay, "answer 3");
}

TEST_F(MutationLogTest, RunsEachSequenceOnce) {
  RunOne(1);
  RunOne(2);
  EXPECT_EQ(log_.applied(), 2u);
  const auto again = Begin(1, "body 1");
  ASSERT_TRUE(again.ok()) << again.status();
  ASSERT_NE(again->replay, nullptr);
  EXPECT_EQ(*again->replay, "answer 1");
  EXPECT_EQ(log_.applied(), 2u);
}

TEST_F(MutationLogTest, RefusesZeroConflictsAndGaps) {
  EXPECT_THAT(Begin(0, "x").status(), IsStatus(kInvalid, "sequence"));
  RunOne(1);
  EXPECT_THAT(Begin(1, "other").status(), IsStatus(kExists, "another body; the next is 2"));
  EXPECT_THAT(Begin(3, "x").status(), IsStatus(kPrecondition, "3 leaves a gap; the next is 2"));
  EXPECT_THAT(Begin(~uint64_t{0}, "x").status(), IsStatus(kPrecondition, "the next is 2"));
  RunOne(2);
}

TEST_F(MutationLogTest, KeepsAWindowOfAnswers) {
  constexpr uint64_t kLast = MutationLog::kReplayWindow + 3;
  for (uint64_t s = 1; s <= kLast; ++s) RunOne(s);
  for (uint64_t s = 1; s <= 3; ++s)
    EXPECT_THAT(Begin(s, absl::StrCat("body ", s)).status(), IsStatus(kExists, "no longer kept"));
  for (uint64_t s = 4; s <= kLast; ++s) {
    const auto ticket = Begin(s, absl::StrCat("body ", s));
    ASSERT_TRUE(ticket.ok()) << ticket.status();
    EXPECT_EQ(*ticket->replay, absl::StrCat("answer ", s));
  }
}

TEST_F(MutationLogTest, KeepsFewerOfLongAnswers) {
  constexpr uint64_t kLast = 2 * MutationLog::kLongWindow;
  const std::string longer(MutationLog::kShortAnswer + 1, 'x');
  for (uint64_t s = 1; s <= kLast; ++s) {
    ASSERT_TRUE(Begin(s, absl::StrCat("body ", s)).ok());
    log_.Commit(s, s % 2 == 0 ? longer : longer.substr(1));
  }
  for (uint64_t s = 1; s <= kLast; ++s) {
    const auto ticket = Begin(s, absl::StrCat("body ", s));
    EXPECT_EQ(ticket.ok(), s % 2 == 1 || s > kLast - MutationLog::kLongWindow) << s;
    if (!ticket.ok()) {
      EXPECT_THAT(ticket.status(), IsStatus(kExists, "no longer kept"));
    }
    EXPECT_THAT(Begin(s, "another").status(), IsStatus(kExists, "another body"));
  }
}

TEST_F(MutationLogTest, AnAbortedSequenceWasNotUsed) {
  ASSERT_TRUE(Begin(1, "first try").ok());
  log_.Abort(1);
  EXPECT_EQ(log_.applied(), 0u);
  const auto other = Begin(1, "second try, another body");
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(other->replay, nullptr);
  log_.Commit(1, "done");
  log_.Abort(1);  // late: changes nothing
  log_.Commit(1, "late");
  EXPECT_EQ(*Begin(1, "second try, another body")->replay, "done");
}

TEST_F(MutationLogTest, ARepeatInFlightGetsTheFirstAnswer) {
  ASSERT_TRUE(Begin(1, "body").ok());
  Waiter same, other;
  BeginLater(same, 1, "body");
  BeginLater(other, 1, "another body");
  ExpectWaits(same);
  ExpectWaits(other);
  log_.Commit(1, "answer");
  same.thread.join();
  other.thread.join();
  ASSERT_TRUE(same.ticket.ok()) << same.ticket.status();
  EXPECT_EQ(*same.ticket->replay, "answer");
  EXPECT_THAT(other.ticket.status(), IsStatus(kExists, "another body"));
}

TEST_F(MutationLogTest, ARepeatInFlightRunsWhereTheFirstFails) {
  ASSERT_TRUE(Begin(1, "body").ok());
  Waiter repeat;
  BeginLater(repeat, 1, "body");
  ExpectWaits(repeat);
  log_.Abort(1);
  repeat.thread.join();
  ASSERT_TRUE(repeat.ticket.ok()) << repeat.ticket.status();
  EXPECT_EQ(repeat.ticket->replay, nullptr);
  log_.Commit(1, "answer");
}

TEST_F(MutationLogTest, LaterSequencesWaitInLine) {
  ASSERT_TRUE(Begin(1, "1").ok());
  Waiter second, third;
  BeginLater(second, 2, "2");
  ExpectWaits(second);
  BeginLater(third, 3, "3");
  ExpectWaits(third);
  EXPECT_THAT(Begin(5, "5").status(), IsStatus(kPrecondition, "5 leaves a gap; the next is 1"));
  log_.Commit(1, "a");
  second.thread.join();
  ASSERT_TRUE(second.ticket.ok()) << second.ticket.status();
  ExpectWaits(third);
  log_.Commit(2, "b");
  third.thread.join();
  ASSERT_TRUE(third.ticket.ok()) << third.ticket.status();
  log_.Commit(3, "c");
  EXPECT_EQ(log_.applied(), 3u);
}

TEST_F(MutationLogTest, WhoWaitsBehindAFailureHearsOfTheGap) {
  ASSERT_TRUE(Begin(1, "1").ok());
  Waiter second;
  BeginLater(second, 2, "2");
  ExpectWaits(second);
  log_.Abort(1);
  second.thread.join();
  EXPECT_THAT(second.ticket.status(), IsStatus(kPrecondition, "2 leaves a gap; the next is 1"));
  RunOne(1);
  RunOne(2);
}

TEST_F(MutationLogTest, WaitingEndsWithTheDeadlineOrTheClient) {
  ASSERT_TRUE(Begin(1, "1").ok());
  EXPECT_EQ(Begin(2, "2", {.deadline = absl::Now() + absl::Milliseconds(30)}).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  std::atomic<bool> gone{false};
  Waiter second;
  BeginLater(second, 2, "2", {.cancelled = [&] { return gone.load(); }});
  ExpectWaits(second);
  gone = true;
  second.thread.join();
  EXPECT_EQ(second.ticket.status().code(), absl::StatusCode::kCancelled);
  log_.Commit(1, "a");
  RunOne(2);
}

TEST_F(MutationLogTest, ManyThreadsWithOneSequenceRunItOnce) {
  std::atomic<int> runs{0}, replays{0};
  for (uint64_t sequence = 1; sequence <= 20; ++sequence) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&] {
        const auto ticket = Begin(sequence, "body");
        ASSERT_TRUE(ticket.ok()) << ticket.status();
        if (ticket->replay == nullptr) {
          ++runs;
          log_.Commit(sequence, absl::StrCat(sequence));
        } else {
          ++replays;
          EXPECT_EQ(*ticket->replay, absl::StrCat(sequence));
        }
      });
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(runs, 20);
  EXPECT_EQ(replays, 60);
}

// --- mutations of which the rest is the device's ---

TEST_F(MutationLogTest, BehindOneThatIsLeftTheNextBegins) {
  const CallControl here{.has_turn = true};
  ASSERT_TRUE(Begin(1, "one").ok());
  EXPECT_TRUE(IsNotNow(Begin(2, "two", here).status()));
  log_.Leave(1);
  auto two = Begin(2, "two", here);
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_EQ(two->replay, nullptr);
  EXPECT_EQ(log_.applied(), 0u);
  EXPECT_TRUE(IsNotNow(Begin(1, "one", here).status())) << "its answer isn't there yet";
  EXPECT_THAT(Begin(4, "four").status(), IsStatus(absl::StatusCode::kFailedPrecondition, "gap"));
  Waiter repeat;
  BeginLater(repeat, 1, "one");
  ExpectWaits(repeat);
  log_.Leave(2);
  log_.Commit(1, "answer 1");
  repeat.thread.join();
  ASSERT_TRUE(repeat.ticket.ok());
  EXPECT_EQ(*repeat.ticket->replay, "answer 1");
  EXPECT_EQ(log_.applied(), 1u);
  log_.Commit(2, "answer 2");
  EXPECT_EQ(log_.applied(), 2u);
  RunOne(3);
}

TEST_F(MutationLogTest, NewsOfThoseThatWereLeftMayComeInAnyOrder) {
  for (const uint64_t n : {1, 2, 3}) {
    ASSERT_TRUE(Begin(n, absl::StrCat("body ", n)).ok());
    log_.Leave(n);
  }
  log_.Commit(3, "answer 3");
  EXPECT_EQ(log_.applied(), 0u);
  Waiter repeat;
  BeginLater(repeat, 3, "body 3");
  ExpectWaits(repeat);
  log_.Commit(1, "answer 1");
  EXPECT_EQ(log_.applied(), 1u);
  log_.Commit(2, "answer 2");
  EXPECT_EQ(log_.applied(), 3u);
  repeat.thread.join();
  ASSERT_TRUE(repeat.ticket.ok());
  EXPECT_EQ(*repeat.ticket->replay, "answer 3");
}

TEST_F(MutationLogTest, NothingIsAppliedBehindOneThatWasAborted) {
  for (const uint64_t n : {1, 2, 3, 4}) {
    ASSERT_TRUE(Begin(n, absl::StrCat("body ", n)).ok());
    log_.Leave(n);
  }
  log_.Commit(3, "answer 3");  // before the news of 2
  log_.Commit(1, "answer 1");
  log_.Abort(2);
  EXPECT_EQ(log_.applied(), 1u);
  EXPECT_THAT(Begin(5, "five").status(),
              IsStatus(absl::StatusCode::kFailedPrecondition, "the next is 2"));
  Waiter again;
  BeginLater(again, 2, "another body");
  ExpectWaits(again);  // for the end of 4, which is under way
  log_.Commit(4, "answer 4");
  again.thread.join();
  ASSERT_TRUE(again.ticket.ok()) << again.ticket.status();
  EXPECT_EQ(again.ticket->replay, nullptr);
  log_.Commit(2, "answer 2");
  RunOne(3);
  EXPECT_EQ(log_.applied(), 3u);
}

}  // namespace
}  // namespace lamina::testing
