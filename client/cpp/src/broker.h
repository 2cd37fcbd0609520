// Fetches a region's descriptor from the daemon's broker socket and maps it. Internal.
//
// The wire, over a Unix socket of type SOCK_SEQPACKET: the request is "LMN1", the session id and
// the region id as 32 hexadecimal digits each; the answer is a status code (4 bytes, little-endian,
// of google.rpc.Code) and the region's length in bytes (8 bytes, little-endian), with the
// descriptor as SCM_RIGHTS where the code is 0. One request a connection.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace lamina::client::internal {

// A mapping of a whole region; unmapped by its destructor. Move-only.
class Mapping {
 public:
  Mapping() = default;
  Mapping(void* data, size_t length) : data_(data), length_(length) {}
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  void* data() const { return data_; }
  size_t length() const { return length_; }

 private:
  void* data_ = nullptr;
  size_t length_ = 0;
};

struct BrokerRequest {
  std::string path;  // of the socket
  std::string session_id;
  std::string region_id;
  uint64_t length = 0;  // that CreateRegion reported; another one is refused
  std::chrono::milliseconds timeout{5000};
};

// UNAVAILABLE: the socket is not there, cannot be reached or does not answer in time;
// PERMISSION_DENIED: this user may not connect; the broker's own code where it refuses; INTERNAL:
// an answer that breaks the wire's rules, or a descriptor that is not a memfd sealed against
// shrinking (reading one that shrinks would kill this process). No message names an id.
absl::StatusOr<Mapping> MapRegion(const BrokerRequest& request);

}  // namespace lamina::client::internal
