// Who may use a context, how long it lives, and what is said of one that is gone.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "engine_rig.h"
#include "server/engine/context_table.h"

namespace lamina::testing {
namespace {

constexpr SessionKey kMine = 1, kTheirs = 2;

class ContextTest : public ::testing::Test {
 protected:
  ContextTest() { rig_.Create("s", TinyConfig()); }
  absl::Status Backward(SessionKey session, const std::string& id, const std::string& stack = "s") {
    OwnedTensor grad = Noise(9, DType::kF32, {3, 8, 16});
    return rig_.engine()
        .Backward(
            {.stack = stack, .session = session, .context_id = id, .output_grad = grad.view()}, {})
        .status();
  }
  absl::Status Release(SessionKey session, const std::string& id, const std::string& stack = "s") {
    return rig_.engine().ReleaseContext(stack, session, id, {});
  }
  int64_t Outstanding() { return Value(rig_.engine().GetStack("s")).outstanding_contexts; }

  Rig rig_;
};

TEST_F(ContextTest, IsSpentByItsBackward) {
  const std::string id = rig_.Forward("s", kMine, 1);
  EXPECT_FALSE(id.empty());
  EXPECT_EQ(Outstanding(), 1);
  EXPECT_EQ(rig_.Metric("lamina_contexts"), 1);
  EXPECT_GT(rig_.Metric("lamina_activation_bytes_in_use"), 0);
  EXPECT_OK(Backward(kMine, id));
  EXPECT_EQ(Outstanding(), 0);
  EXPECT_EQ(rig_.Metric("lamina_activation_bytes_in_use"), 0);
  EXPECT_GT(rig_.Metric("lamina_activation_bytes_high_water"), 0);
  EXPECT_THAT(Backward(kMine, id), IsStatus(kNotFound, "spent"));
  EXPECT_THAT(Release(kMine, id), IsStatus(kNotFound, "spent"));
}

TEST_F(ContextTest, BackwardNeedsAForward) {
  EXPECT_THAT(Backward(kMine, ""), IsStatus(kPrecondition, "run a training Forward first"));
  EXPECT_THAT(Backward(kMine, "1"), IsStatus(kPrecondition, "has run no training Forward"));
  EXPECT_THAT(Backward(kMine, "x"), IsStatus(kPrecondition, "has run no training Forward"));
  const std::string id = rig_.Forward("s", kMine, 1);
  for (const std::string& other : {std::string("x"), "0" + id, " " + id, "+" + id, id + "0",
                                   std::string("18446744073709551616"), std::string("-1")})
    EXPECT_THAT(Backward(kMine, other), IsStatus(kNotFound, "context_id")) << other;
  EXPECT_OK(Backward(kMine, id));
}

TEST_F(ContextTest, IsItsSessionsAlone) {
  const std::string mine = rig_.Forward("s", kMine, 1);
  EXPECT_THAT(Backward(kTheirs, mine), IsStatus(kNotFound, "context_id"));
  EXPECT_THAT(Release(kTheirs, mine), IsStatus(kNotFound, "context_id"));
  const std::string theirs = rig_.Forward("s", kTheirs, 2);
  EXPECT_NE(mine, theirs);
  EXPECT_THAT(Backward(kTheirs, mine), IsStatus(kNotFound, "context_id"));
  EXPECT_OK(Backward(kTheirs, theirs));
  EXPECT_OK(Backward(kMine, mine));
}

TEST_F(ContextTest, ReleaseMakesRoom) {
  const std::string first = rig_.Forward("s", kMine, 1);
  const std::string second = rig_.Forward("s", kMine, 2);
  OwnedTensor input = Noise(3, DType::kF32, {3, 8, 16});
  const ForwardCall call{.stack = "s", .session = kMine, .input = input.view()};
  const std::string before = rig_.Snapshot("s");
  EXPECT_THAT(rig_.engine().Forward(call, {}).status(), IsStatus(kExhausted, "bytes"));
  EXPECT_EQ(rig_.Metric("lamina_admission_rejections_total{reason=\"context_memory\"}"), 1);
  EXPECT_EQ(rig_.Snapshot("s"), before);
  EXPECT_OK(Release(kMine, first));
  EXPECT_THAT(Release(kMine, first), IsStatus(kNotFound, "released"));
  EXPECT_OK(rig_.engine().Forward(call, {}).status());
  EXPECT_OK(Backward(kMine, second));
}

TEST_F(ContextTest, OfADeletedStackSaysSo) {
  const std::string id = rig_.Forward("s", kMine, 1);
  EXPECT_OK(rig_.engine().DeleteStack("s", {}));
  EXPECT_THAT(Backward(kMine, id), IsStatus(kPrecondition, "the stack was deleted"));
  EXPECT_THAT(Release(kMine, id), IsStatus(kPrecondition, "the stack was deleted"));
  EXPECT_THAT(Backward(kTheirs, id), IsStatus(kNotFound, "no stack"));
  EXPECT_EQ(rig_.Metric("lamina_contexts"), 0);
  EXPECT_EQ(rig_.backend().live_bytes, 0u);
  // A new stack of the name does not revive it.
  rig_.Create("s", TinyConfig());
  EXPECT_THAT(Backward(kMine, id), IsStatus(kPrecondition, "the stack was deleted"));
  EXPECT_THAT(Backward(kTheirs, id), IsStatus(kNotFound, "context_id"));
  EXPECT_OK(Backward(kMine, rig_.Forward("s", kMine, 1)));
}

TEST_F(ContextTest, WhatIsRememberedOfDeletedStacksIsBounded) {
  StackConfig small = TinyConfig();
  small.num_hidden_layers = 1;
  const std::string first = rig_.Forward("s", kMine, 1);
  EXPECT_OK(rig_.engine().DeleteStack("s", {}));
  small.max_contexts = 1024;
  small.max_seq_length = 1;
  small.batch_size = 1;
  rig_.Create("s", small);
  std::string last;
  for (int i = 0; i < 1024; ++i) last = rig_.Forward("s", kMine, 1, 1, 1);
  EXPECT_OK(rig_.engine().DeleteStack("s", {}));
  EXPECT_THAT(Backward(kMine, last), IsStatus(kPrecondition, "the stack was deleted"));
  EXPECT_THAT(Backward(kMine, first), IsStatus(kNotFound, "no stack"));
}

TEST_F(ContextTest, GoesWithItsSession) {
  const std::string mine = rig_.Forward("s", kMine, 1);
  const std::string theirs = rig_.Forward("s", kTheirs, 2);
  rig_.engine().EndSession(kMine);
  EXPECT_EQ(Outstanding(), 1);
  EXPECT_EQ(rig_.Metric("lamina_contexts"), 1);
  EXPECT_EQ(Backward(kMine, mine).code(), kNotFound);
  EXPECT_OK(Backward(kTheirs, theirs));
  // A call that was on its way when the session ended must not leave a context behind.
  OwnedTensor input = Noise(3, DType::kF32, {3, 8, 16});
  ForwardCall call{.stack = "s", .session = kMine, .input = input.view()};
  EXPECT_THAT(rig_.engine().Forward(call, {}).status(), IsStatus(kNotFound, "has ended"));
  call.training = false;
  EXPECT_OK(rig_.engine().Forward(call, {}).status());
  rig_.engine().EndSession(kMine);  // again
  EXPECT_EQ(Outstanding(), 0);
}

TEST_F(ContextTest, EndSessionWaitsForQueuedCalls) {
  const std::string id = rig_.Forward("s", kMine, 1);
  Blocker blocker(rig_.engine());
  absl::Status backward;
  std::thread caller([&] { backward = Backward(kMine, id); });
  WaitUntil([&] { return rig_.Metric("lamina_queue_depth") == 1; });
  std::thread ender([&] { rig_.engine().EndSession(kMine); });
  WaitUntil([&] { return rig_.Metric("lamina_queue_depth") == 2; });
  blocker.Release();
  caller.join();
  ender.join();
  EXPECT_OK(backward);
}

TEST_F(ContextTest, KeepsTrainingFromBeingTurnedOff) {
  const std::string id = rig_.Forward("s", kMine, 1);
  EXPECT_THAT(rig_.engine().UpdateStack("s", {.training = false}, {}).status(),
              IsStatus(kPrecondition, "outstanding"));
  EXPECT_OK(Release(kMine, id));
  EXPECT_OK(rig_.engine().UpdateStack("s", {.training = false}, {}).status());
}

TEST(ContextTable, RemembersEverySessionThatHasEnded) {
  ContextTable table;
  std::vector<SessionKey> keys;
  for (SessionKey key = 1; key <= 1000; ++key)
    if (key % 7 != 0) keys.push_back(key);
  std::shuffle(keys.begin(), keys.end(), std::mt19937(5));
  std::set<SessionKey> ended;
  for (const SessionKey key : keys) {
    table.SessionEnded(key);
    table.SessionEnded(key);
    ended.insert(key);
    if (ended.size() % 100 != 0 && ended.size() != keys.size()) continue;
    for (SessionKey asked = 0; asked <= 1002; ++asked)
      ASSERT_EQ(table.ended(asked), ended.count(asked) > 0) << asked;
  }
}

}  // namespace
}  // namespace lamina::testing
