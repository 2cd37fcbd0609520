#include "server/engine/device_queue.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine_rig.h"

namespace lamina::testing {
namespace {

using Admission = DeviceQueue::Admission;
using Clock = DeviceQueue::Clock;

class DeviceQueueTest : public ::testing::Test {
 protected:
  // Occupies the queue's thread until Open.
  void Close() {
    holder_ = std::thread([this] {
      EXPECT_OK(queue_.Run({}, Admission::kCall, [this](Clock::time_point) {
        std::unique_lock<std::mutex> lock(mutex_);
        held_ = true;
        changed_.notify_all();
        changed_.wait(lock, [this] { return open_; });
        return absl::OkStatus();
      }));
    });
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return held_; });
  }
  void Open() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
    holder_.join();
  }
  absl::Status Nothing(const CallControl& control, Admission admission = Admission::kCall) {
    return queue_.Run(control, admission, [this](Clock::time_point) {
      ++runs_;
      return absl::OkStatus();
    });
  }
  double Depth() {
    const std::string text = metrics_.Text();
    const size_t at = text.find("\nlamina_queue_depth ");
    return std::stod(text.substr(at + sizeof("\nlamina_queue_depth ") - 1));
  }

  MetricSet metrics_{{.version = "0", .commit = "", .backend = "cpu", .device = "test"}};
  std::atomic<int> runs_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false, open_ = false;  // guarded by mutex_
  std::thread holder_;
  DeviceQueue queue_{2, &metrics_};
};

TEST_F(DeviceQueueTest, RunsOnOneThreadAndReturnsTheStatus) {
  std::thread::id first, second;
  EXPECT_OK(queue_.Run({}, Admission::kCall, [&](Clock::time_point) {
    first = std::this_thread::get_id();
    return absl::OkStatus();
  }));
  EXPECT_THAT(queue_.Run({}, Admission::kCall,
                         [&](Clock::time_point) {
                           second = std::this_thread::get_id();
                           return absl::NotFoundError("this one");
                         }),
              IsStatus(kNotFound, "this one"));
  EXPECT_EQ(first, second);
  EXPECT_NE(first, std::this_thread::get_id());
}

TEST_F(DeviceQueueTest, RefusesAboveItsCapacityAndKeepsOrder) {
  Close();
  std::mutex mutex;
  std::vector<int> order;
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      EXPECT_OK(queue_.Run({}, Admission::kCall, [&](Clock::time_point) {
        std::lock_guard<std::mutex> lock(mutex);
        order.push_back(i);
        return absl::OkStatus();
      }));
    });
    WaitUntil([&] { return Depth() == i + 1; });
  }
  EXPECT_THAT(Nothing({}), IsStatus(kExhausted, "2 calls wait and 2 may"));
  EXPECT_EQ(runs_, 0);
  // What gives something back is never refused for want of room.
  threads.emplace_back([&] {
    EXPECT_OK(queue_.Run({}, Admission::kRelease, [&](Clock::time_point) {
      std::lock_guard<std::mutex> lock(mutex);
      order.push_back(2);
      return absl::OkStatus();
    }));
  });
  WaitUntil([&] { return Depth() == 3; });
  Open();
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(order, ::testing::ElementsAre(0, 1, 2));
  EXPECT_EQ(Depth(), 0);
  EXPECT_OK(Nothing({}));
}

TEST_F(DeviceQueueTest, DropsACallWhoseDeadlinePassesWhileItWaits) {
  Close();
  const auto begin = Clock::now();
  EXPECT_THAT(Nothing({.deadline = absl::Now() + absl::Milliseconds(30)}),
              IsStatus(absl::StatusCode::kDeadlineExceeded, "nothing has changed"));
  EXPECT_GE(Clock::now() - begin, std::chrono::milliseconds(25));
  EXPECT_EQ(Depth(), 0) << "its place in the queue is free again";
  Open();
  EXPECT_EQ(runs_, 0);
  EXPECT_THAT(Nothing({.deadline = absl::Now() - absl::Seconds(1)}),
              IsStatus(absl::StatusCode::kDeadlineExceeded, "nothing has changed"));
  EXPECT_EQ(runs_, 0);
}

TEST_F(DeviceQueueTest, ACallThatHasBegunOutlivesItsDeadline) {
  const absl::Time deadline = absl::Now() + absl::Milliseconds(500);
  EXPECT_OK(queue_.Run({.deadline = deadline}, Admission::kCall, [&](Clock::time_point) {
    absl::SleepFor(deadline - absl::Now() + absl::Milliseconds(20));
    ++runs_;
    return absl::OkStatus();
  }));
  EXPECT_EQ(runs_, 1);
}

TEST_F(DeviceQueueTest, DropsACallThatIsCancelledWhileItWaits) {
  Close();
  std::atomic<bool> cancelled{false};
  std::thread waiter([&] {
    EXPECT_THAT(Nothing({.cancelled = [&] { return cancelled.load(); }}),
                IsStatus(absl::StatusCode::kCancelled, "nothing has changed"));
  });
  WaitUntil([&] { return Depth() == 1; });
  cancelled = true;
  Open();
  waiter.join();
  EXPECT_EQ(runs_, 0);
}

TEST_F(DeviceQueueTest, MeasuresTheTimeInTheQueue) {
  Close();
  double waited = 0;
  std::thread waiter([&] {
    EXPECT_OK(queue_.Run({}, Admission::kCall, [&](Clock::time_point admitted) {
      waited = std::chrono::duration<double>(Clock::now() - admitted).count();
      return absl::OkStatus();
    }));
  });
  WaitUntil([&] { return Depth() == 1; });
  std::this_thread::sleep_for(std::chrono::milliseconds(40));
  Open();
  waiter.join();
  EXPECT_GE(waited, 0.040);
}

TEST_F(DeviceQueueTest, DrainsWhatWaitsAndRefusesTheRest) {
  Close();
  std::thread waiter([&] { EXPECT_OK(Nothing({})); });
  WaitUntil([&] { return Depth() == 1; });
  std::thread drainer([&] { queue_.Drain(); });
  // Until Drain has begun, this call waits in the queue for its own short while.
  WaitUntil([&] {
    return absl::IsUnavailable(
        Nothing({.deadline = absl::Now() + absl::Milliseconds(1)}, Admission::kRelease));
  });
  EXPECT_FALSE(queue_.drained());
  EXPECT_EQ(runs_, 0);
  Open();
  drainer.join();
  waiter.join();
  EXPECT_TRUE(queue_.drained());
  EXPECT_EQ(runs_, 1);
  EXPECT_THAT(Nothing({}), IsStatus(kUnavailable, "draining"));
  EXPECT_OK(Nothing({}, Admission::kAlways));
  EXPECT_EQ(runs_, 2);
  queue_.Drain();  // again
}

TEST_F(DeviceQueueTest, ADroppedLastCallLetsDrainReturn) {
  Close();
  std::thread waiter([&] {
    EXPECT_EQ(Nothing({.deadline = absl::Now() + absl::Milliseconds(200)}).code(),
              absl::StatusCode::kDeadlineExceeded);
  });
  WaitUntil([&] { return Depth() == 1; });
  std::thread drainer([&] { queue_.Drain(); });
  waiter.join();
  Open();
  drainer.join();
  EXPECT_TRUE(queue_.drained());
}

TEST_F(DeviceQueueTest, MemoryThatRunsOutIsAStatus) {
  EXPECT_THAT(queue_.Run({}, Admission::kCall,
                         [](Clock::time_point) -> absl::Status { throw std::bad_alloc(); }),
              IsStatus(kExhausted, "memory"));
  EXPECT_OK(Nothing({}));
}

TEST_F(DeviceQueueTest, WhoHasTheTurnRunsHereAndOthersWait) {
  std::thread waiter;
  {
    const DeviceTurn turn = queue_.TryTurn();
    ASSERT_TRUE(turn);
    EXPECT_FALSE(queue_.TurnIsWanted());
    EXPECT_FALSE(queue_.TryTurn());
    EXPECT_FALSE(queue_.TryPost([] {}));
    waiter = std::thread([&] { EXPECT_OK(Nothing({})); });
    WaitUntil([&] { return Depth() == 1; });
    EXPECT_TRUE(queue_.TurnIsWanted());
    EXPECT_OK(queue_.Run({.has_turn = true}, Admission::kCall, [&](Clock::time_point) {
      EXPECT_EQ(runs_, 0) << "the waiting call was let past";
      return absl::OkStatus();
    }));
    EXPECT_EQ(runs_, 0);
  }
  waiter.join();
  EXPECT_EQ(runs_, 1);
  EXPECT_TRUE(queue_.TryTurn()) << "it was given back";
}

TEST_F(DeviceQueueTest, WhatIsPostedRunsOnTheDeviceThreadInItsTurn) {
  std::thread::id device, posted;
  EXPECT_OK(queue_.Run({}, Admission::kCall, [&](Clock::time_point) {
    device = std::this_thread::get_id();
    return absl::OkStatus();
  }));
  std::atomic<bool> open{false}, done{false};
  ASSERT_TRUE(queue_.TryPost([&] {
    WaitUntil([&] { return open.load(); });
    posted = std::this_thread::get_id();
    // The last to let go of a session may be the device thread itself.
    EXPECT_OK(Nothing({}, Admission::kAlways));
    EXPECT_EQ(runs_, 1);
    done = true;
  }));
  EXPECT_FALSE(queue_.TryTurn());
  EXPECT_FALSE(queue_.TryPost([] {}));
  std::thread waiter([&] { EXPECT_OK(Nothing({})); });
  WaitUntil([&] { return queue_.TurnIsWanted(); });
  open = true;
  waiter.join();
  EXPECT_TRUE(done) << "the waiting call was let past";
  EXPECT_EQ(posted, device);
  EXPECT_EQ(runs_, 2);
}

TEST_F(DeviceQueueTest, DrainWaitsForTheTurnAndNobodyTakesItAfterwards) {
  std::thread drainer;
  {
    const DeviceTurn turn = queue_.TryTurn();
    drainer = std::thread([&] { queue_.Drain(); });
    WaitUntil([&] { return queue_.TurnIsWanted(); });
    EXPECT_FALSE(queue_.drained());
  }
  drainer.join();
  EXPECT_FALSE(queue_.TryTurn());
  EXPECT_FALSE(queue_.TryPost([] {}));
}

TEST_F(DeviceQueueTest, ManyThreadsLoseNothing) {
  DeviceQueue queue(64, &metrics_);
  int64_t sum = 0;  // whoever's turn it is
  std::atomic<int64_t> posted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 300; ++i)
        EXPECT_OK(queue.Run({.deadline = absl::Now() + absl::Seconds(60)}, Admission::kCall,
                            [&](Clock::time_point) {
                              ++sum;
                              return absl::OkStatus();
                            }));
    });
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 300; ++i) {
        if (const DeviceTurn turn = queue.TryTurn()) {
          ++sum;
          ++posted;
        }
        if (queue.TryPost([&] { ++sum; })) ++posted;
      }
    });
  for (std::thread& thread : threads) thread.join();
  queue.Drain();
  EXPECT_EQ(sum, 1800 + posted);
}

}  // namespace
}  // namespace lamina::testing
