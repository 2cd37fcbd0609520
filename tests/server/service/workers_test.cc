#include "server/service/workers.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "tests/support/wait.h"

namespace lamina::testing {
namespace {

TEST(Workers, ATaskThatWaitsForALaterOneIsNoDeadlock) {
  constexpr int kTasks = 40;  // more than are kept
  std::mutex mutex;
  std::condition_variable changed;
  int arrived = 0;
  std::atomic<int> done{0};
  Workers workers;
  for (int i = 0; i < kTasks; ++i) {
    workers.Run([&] {
      std::unique_lock<std::mutex> lock(mutex);
      ++arrived;
      changed.notify_all();
      changed.wait(lock, [&] { return arrived == kTasks; });
      ++done;
    });
  }
  WaitUntil([&] { return done == kTasks; });
}

TEST(Workers, ThreadsAreUsedAgain) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  Workers workers;
  for (int i = 0; i < 50; ++i) {
    std::atomic<bool> done{false};
    workers.Run([&] {
      std::lock_guard<std::mutex> lock(mutex);
      threads.insert(std::this_thread::get_id());
      done = true;
    });
    WaitUntil([&] { return done.load(); });
    // The thread says that it is idle only after its task.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_LT(threads.size(), 10u);
}

TEST(Workers, TheEndWaitsForAllTasks) {
  std::atomic<int> done{0};
  {
    Workers workers;
    for (int i = 0; i < 20; ++i) {
      workers.Run([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        ++done;
      });
    }
  }
  EXPECT_EQ(done, 20);
}

}  // namespace
}  // namespace lamina::testing
