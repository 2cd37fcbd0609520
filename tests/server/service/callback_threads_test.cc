#include "server/service/callback_threads.h"

#include <grpc/support/cpu.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <set>
#include <thread>

#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

TEST(CallbackThreads, ThereIsOneForTwoCpusOfTheProcessAndOneAtLeast) {
  EXPECT_EQ(SpareCallbackThreads(1, 1), 1);
  EXPECT_EQ(SpareCallbackThreads(2, 2), 1);
  EXPECT_EQ(SpareCallbackThreads(4, 4), 0);
  EXPECT_EQ(SpareCallbackThreads(16, 16), 0);
  EXPECT_EQ(SpareCallbackThreads(16, 5), 6);
  EXPECT_EQ(SpareCallbackThreads(64, 2), 15);
  EXPECT_EQ(SpareCallbackThreads(64, 64), 0);
}

// The threads on which the callbacks of many calls run that are sent at once.
std::set<std::thread::id> ThreadsOfCallbacks(Client& client) {
  constexpr size_t kCalls = 200;
  struct Call {
    std::unique_ptr<grpc::ClientContext> context = NewContext();
    v1::GetServerInfoRequest request;
    v1::GetServerInfoResponse response;
  };
  std::deque<Call> calls(kCalls);
  const auto stub = v1::ConfigService::NewStub(client.channel);
  std::mutex mutex;
  std::condition_variable changed;
  size_t done = 0;
  std::set<std::thread::id> threads;
  for (Call& call : calls) {
    stub->async()->GetServerInfo(call.context.get(), &call.request, &call.response,
                                 [&](const grpc::Status& status) {
                                   EXPECT_TRUE(status.ok()) << status.error_message();
                                   std::lock_guard<std::mutex> lock(mutex);
                                   threads.insert(std::this_thread::get_id());
                                   ++done;
                                   changed.notify_all();
                                 });
  }
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return done == kCalls; });
  return threads;
}

TEST(CallbackThreads, OneIsLeftAndServesAllCalls) {
  Service service;
  Client client(service.address());
  {
    const int all_but_one = SpareCallbackThreads(static_cast<int>(gpr_cpu_num_cores()), 1);
    ASSERT_GE(all_but_one, 1);
    const HeldCallbackThreads held(all_but_one);
    EXPECT_EQ(ThreadsOfCallbacks(client).size(), 1u);
  }
  EXPECT_GE(ThreadsOfCallbacks(client).size(), 1u);  // the others are back, and nothing hangs
}

TEST(CallbackThreads, NoneNeedBeHeld) {
  Service service;
  Client client(service.address());
  const HeldCallbackThreads held(0);
  EXPECT_GE(ThreadsOfCallbacks(client).size(), 1u);
}

}  // namespace
}  // namespace lamina::testing
