// The broker socket as docs/broker.md describes it, byte by byte.
#pragma once

#include <cstdint>
#include <string>

#include "cli/conformance/daemon.h"

namespace lamina::conformance {

// What came back for one packet.
struct BrokerAnswer {
  bool closed = false;            // the connection, without an answer
  Code code = Code::UNAVAILABLE;  // that too where nobody listens
  uint64_t length = 0;            // bytes of the region
  int descriptor = -1;            // the caller closes it
  std::string handle;             // what follows the length: 64 bytes of some regions
};

// A connection. Not for several threads.
class BrokerSocket {
 public:
  explicit BrokerSocket(const std::string& path);
  ~BrokerSocket();
  BrokerSocket(const BrokerSocket&) = delete;
  BrokerSocket& operator=(const BrokerSocket&) = delete;
  bool connected() const { return connected_; }
  // Sends any packet and waits some seconds for what comes.
  BrokerAnswer Ask(const std::string& packet);

 private:
  int descriptor_ = -1;
  bool connected_ = false;
};

// The packet that asks for a region.
std::string BrokerRequest(const std::string& session_id, const std::string& region_id);
// One request on a connection of its own.
BrokerAnswer AskBroker(const std::string& path, const std::string& session_id,
                       const std::string& region_id);

// A region of a session, mapped; given up and unmapped by the destructor.
class MappedRegion {
 public:
  // Skips the check where regions can't be mapped from here.
  MappedRegion(Daemon& daemon, const std::string& session_id, uint64_t size_bytes);
  ~MappedRegion();
  MappedRegion(const MappedRegion&) = delete;
  MappedRegion& operator=(const MappedRegion&) = delete;

  const std::string& id() const { return region_.region_id(); }
  uint64_t length() const { return region_.length_bytes(); }
  char* bytes() const { return data_; }
  float* floats(uint64_t offset_bytes = 0) const {
    return reinterpret_cast<float*>(data_ + offset_bytes);
  }
  v1::Slice Slice(uint64_t offset_bytes, uint64_t size_bytes) const;

 private:
  Daemon& daemon_;
  const std::string session_id_;
  v1::Region region_;
  char* data_ = nullptr;
};

}  // namespace lamina::conformance
