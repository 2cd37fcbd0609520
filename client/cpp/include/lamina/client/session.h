// A session: one client's lease on the daemon. Its regions, activation contexts and mutation
// sequence live and die with it.
//
// While a Session lives, a thread of its own holds the lease (the KeepAlive stream). If the
// connection breaks, the session waits for resume_grace in the daemon: it is connected again by
// itself, calls wait meanwhile and are repeated, contexts and regions are as before. If the lease
// is lost (the daemon went away, or ended the session, or the grace is over), status() says why and
// every later call fails; open a new session then: gradients and weights are the daemon's and are
// still there, contexts and regions are not.
//
// Mutations (training Forward, Backward, ApplyGradients, ZeroGradients, SetParameters) are numbered
// by the library and run one at a time, in the order in which they were called. A call whose answer
// was lost is repeated under the same number, so the daemon runs it once and only once.
//
// Threads: all methods from any thread. Destroying or moving a Session is the owner's business.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/pipeline.h"
#include "lamina/client/stack.h"
#include "lamina/client/tensor.h"
#include "lamina/client/types.h"

namespace lamina::client {

// What NewTensor makes.
enum class TransportPolicy {
  // Regions where this process can receive them from the daemon's broker socket, else memory of
  // this process. Session::transport says which it is.
  kAuto,
  kRegions,  // regions, or an error
  kInline,   // memory of this process, always
};

struct SessionOptions {
  std::string client_name = "lamina-cpp";  // for people who read the daemon's log
  TransportPolicy transport = TransportPolicy::kAuto;
  std::string
      broker_path{};  // empty: where the daemon says; for sockets that are mounted elsewhere
  // Hold the lease with a stream: the session ends as soon as this process does, and when the
  // connection has been broken for resume_grace. False: the session outlives a broken connection
  // and ends when no call came for the lease.
  bool keep_alive = true;
  // How long the session is to outlive a connection that broke; the daemon may grant less. 0: it
  // ends with its connection. Absent: 10 s over TCP; 0 over a Unix socket, which breaks with its
  // process alone. INVALID_ARGUMENT: below 0.
  std::optional<std::chrono::milliseconds> resume_grace{};
  // How long a call is repeated while the daemon cannot be reached; 0: not at all. The time while a
  // broken connection may come back (resume_grace) is not counted.
  std::chrono::milliseconds retry_budget{5000};
};

// Shared memory of this process and the daemon. A handle: copies share it. When the last handle
// and the last Tensor of it are gone it is unmapped and given back to the daemon.
class Region {
 public:
  Region() = default;
  explicit operator bool() const { return static_cast<bool>(bytes_); }
  void* data() const { return bytes_.data(); }
  size_t size() const { return size_; }            // bytes: whole pages
  bool registered() const { return registered_; }  // moved by one DMA or read in place

  // A tensor in it. INVALID_ARGUMENT: outside the region, or misaligned.
  absl::StatusOr<Tensor> View(DType dtype, Shape shape, size_t offset_bytes = 0) const;

 private:
  friend class Session;
  Tensor bytes_;  // the whole region, as words
  size_t size_ = 0;
  bool registered_ = false;
};

class Session {
 public:
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;  // ends the session that was there
  ~Session();                              // Close

  // Ends the session now: the daemon frees its contexts and regions. Later calls are
  // FAILED_PRECONDITION. The memory of tensors stays mapped while they are referred to.
  absl::Status Close();
  // OK while the lease is held, or may be again after its connection broke; else why it is not.
  absl::Status status() const;

  // --- memory ---
  // RESOURCE_EXHAUSTED: the session's cap, with the numbers. FAILED_PRECONDITION: the policy is
  // kInline. UNAVAILABLE: the broker socket cannot be reached from here.
  absl::StatusOr<Region> CreateRegion(size_t bytes) const;
  // A zeroed tensor, in a region of its own or in memory of this process: as the policy says.
  absl::StatusOr<Tensor> NewTensor(DType dtype, Shape shape) const;
  // How NewTensor's tensors travel: kMemfd or kInline. Settled by the first region that is asked
  // for; transport_reason says why it is kInline.
  Transport transport() const;
  std::string transport_reason() const;

  // --- stacks ---
  // Makes a stack and a handle of it; errors as Client::CreateStack. The stack stays with the
  // daemon when the session ends: delete it with Client::DeleteStack.
  absl::StatusOr<Stack> CreateStack(const std::string& name, const StackConfig& config) const;
  // A handle of a stack that is there. NOT_FOUND.
  absl::StatusOr<Stack> OpenStack(const std::string& name) const;

  // A stream for calls that are under way together. INVALID_ARGUMENT: the depth.
  absl::StatusOr<Pipeline> OpenPipeline(const PipelineOptions& options = {}) const;

  // Longest silence before the daemon ends the session.
  std::chrono::duration<double> lease() const;
  // How long it outlives a broken connection, as the daemon granted it.
  std::chrono::duration<double> resume_grace() const;

 private:
  friend class Client;
  explicit Session(std::shared_ptr<internal::SessionCore> core);
  std::shared_ptr<internal::SessionCore> core_;
};

}  // namespace lamina::client
