// A client of the broker's socket, as docs/broker.md describes it, that can also misbehave.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace lamina::testing {

class BrokerClient {
 public:
  explicit BrokerClient(const std::string& path);  // throws where it can't connect
  ~BrokerClient();
  BrokerClient(const BrokerClient&) = delete;
  BrokerClient& operator=(const BrokerClient&) = delete;

  struct Answer {
    bool hung_up = false;  // the rest is nothing then
    uint32_t status = 0;
    uint64_t length = 0;
    int descriptor = -1;  // the caller's to close
    std::string handle;   // of a region that has one instead
    std::string bytes;    // as they came
  };

  bool Send(const std::string& packet, int passed_descriptor = -1);  // whether it went
  // Nothing where no answer came in this time.
  std::optional<Answer> Receive(int milliseconds = 10000);
  // The well-formed request.
  Answer Ask(const std::string& session_id, const std::string& region_id);

 private:
  int socket_;
};

}  // namespace lamina::testing
