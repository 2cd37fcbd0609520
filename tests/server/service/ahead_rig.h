// A train of calls on an Execute stream, to a device with memory of its own: what the daemon may do
// ahead of a call's turn it does there.
#pragma once

#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "tests/server/service/service_rig.h"

namespace lamina::testing {

class AheadTest : public ::testing::Test {
 protected:
  static constexpr int kCalls = 5;

  AheadTest() {
    client.Create();
    for (int i = 0; i < kCalls; ++i) {
      const v1::ForwardRequest request = client.EvalRequest(static_cast<uint64_t>(i) + 1);
      inputs.push_back(request.input().inline_data());
      expected.push_back(client.Do(request).output().inline_data());
      std::memcpy(region.data + At(i), inputs.back().data(), kBytes);
    }
  }

  static uint64_t At(int i) { return static_cast<uint64_t>(i) * 4096; }
  v1::ForwardRequest Slice(uint64_t offset) const {
    v1::ForwardRequest request = client.EvalRequest();
    *request.mutable_input() = SliceOf(region.id, offset);
    return request;
  }

  // Sends them all while the first is held on the device, so that each but the first is known when
  // the one before it runs; `between` is called then. Their answers.
  std::vector<v1::ExecuteResponse> Train(
      const std::vector<v1::ExecuteRequest>& calls, const std::function<void()>& between = [] {}) {
    const auto context = NewContext();
    const auto stream = client.layer->Execute(context.get());
    service.backend().hold_op = 0;
    for (size_t i = 0; i < calls.size(); ++i) {
      v1::ExecuteRequest item = calls[i];
      item.set_id(i + 1);
      EXPECT_TRUE(stream->Write(item));
      if (i == 0) WaitUntil([&] { return service.backend().holding.load(); });
    }
    between();
    std::this_thread::sleep_for(std::chrono::milliseconds(30));  // they are read
    service.backend().holding = false;
    std::vector<v1::ExecuteResponse> answers(calls.size());
    for (v1::ExecuteResponse& answer : answers) EXPECT_TRUE(stream->Read(&answer));
    stream->WritesDone();
    EXPECT_TRUE(stream->Finish().ok());
    return answers;
  }
  static v1::ExecuteRequest Item(const v1::ForwardRequest& request) {
    v1::ExecuteRequest item;
    *item.mutable_forward() = request;
    return item;
  }

  Service service{{.host_memory = false}};
  Client client{service.address()};
  MappedRegion region = client.Region();
  std::vector<std::string> inputs, expected;
};

}  // namespace lamina::testing
