// Checkpoints: everything that a stack needs to go on bit for bit, in one safetensors file.
//
// The file (https://github.com/huggingface/safetensors): the header's length as 8 bytes
// little-endian, the header as JSON padded with spaces to a multiple of 8, then the tensors without
// gaps. Tensors, with <p> a stored parameter's name such as "layers.0.attn_qkvw":
//   <p>             the weights in the stack's dtype; for an fp32 stack they are the master weights
//   master.<p>      fp32 master weights, unless the stack's dtype is fp32. They decide: Restore
//                   rounds the weights from them, which gives what the file's weights hold
//   exp_avg.<p>, exp_avg_sq.<p>   fp32, the optimizer's moments; absent where training was off
//   gradient.<p>    fp32, accumulated gradients; absent where all of them were zero
// Metadata, all strings: lamina.format, lamina.version, lamina.created (RFC 3339), lamina.config
// (JSON), lamina.optimizer_step, lamina.rng_counter, lamina.skipped_steps, lamina.loss_scale,
// lamina.clean_steps, lamina.overflows_tolerated, lamina.sha256 (of the whole file with this
// digest's 64 digits as zeros). Files of versions before dynamic loss scaling lack its three.
//
// A file appears under its name complete or not at all: it is written beside it, synced, renamed,
// and the folder is synced.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/transformer/stack.h"
#include "server/engine/engine.h"

namespace lamina {

// <folder>/<name>.safetensors. `name` has been checked with CheckName.
std::string CheckpointPath(const std::string& folder, const std::string& name);

// A checkpoint that is on its way to disk. The destructor removes what was not committed.
class CheckpointWriter {
 public:
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Writes the stack as it is now into a temporary file; on the stack's thread. Holds one tensor
  // at a time in memory. RESOURCE_EXHAUSTED: no space. FAILED_PRECONDITION: another process writes
  // this checkpoint. INTERNAL: another failure of the file system, or one of the device.
  static absl::StatusOr<std::unique_ptr<CheckpointWriter>> Write(Stack& stack,
                                                                 const std::string& folder,
                                                                 const std::string& name);
  // Makes it durable and gives it its name; any thread, once. The errors are Write's.
  absl::StatusOr<CheckpointInfo> Commit();

 private:
  CheckpointWriter() = default;
  absl::Status OpenTemporary();
  absl::Status WriteAll(Stack& stack);

  std::string folder_, path_, temporary_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
  int64_t step_ = 0;
};

// A checkpoint that was read: whole, undamaged, not yet compared with a stack. Keeps the file open,
// so a new one under its name changes nothing here.
class CheckpointReader {
 public:
  ~CheckpointReader();
  CheckpointReader(const CheckpointReader&) = delete;
  CheckpointReader& operator=(const CheckpointReader&) = delete;

  // Reads the header and checks the file from end to end. NOT_FOUND: no such file. DATA_LOSS:
  // truncated, malformed or altered. INVALID_ARGUMENT: a safetensors file that is no checkpoint of
  // ours, or one of a newer format. INTERNAL: it can't be read.
  static absl::StatusOr<std::unique_ptr<CheckpointReader>> Open(const std::string& folder,
                                                                const std::string& name);

  // The config of the stack that was saved; local_rank is -1, for the file may move.
  const StackConfig& config() const { return config_; }
  uint64_t bytes() const { return file_bytes_; }

  // Whether the file's tensors are a stack's of this config: each there once with its dtype and
  // shape, and none more; and whether the settings that decide what the layers compute are the
  // same. INVALID_ARGUMENT names the tensor or the setting.
  absl::Status CheckFits(const StackConfig& config,
                         const std::vector<ParameterInfo>& parameters) const;

  // Sets the stack's weights, optimizer state, gradients and counters; on the stack's thread, after
  // CheckFits. Where the file has no moments they become zero; a stack whose training is off takes
  // the weights alone. Seed, dropout ratios, memory flags and sizes stay the stack's own. A dynamic
  // loss scale goes on where the file's stack left it, and begins anew where that had none.
  // DATA_LOSS: the file failed after it had been checked; the stack then holds parts of both.
  absl::Status Restore(Stack& stack) const;

 private:
  struct Tensor {
    std::string name;
    DType dtype = DType::kF32;
    std::vector<int64_t> shape;
    uint64_t offset = 0;  // from the file's start
    uint64_t bytes = 0;
  };

  CheckpointReader() = default;
  absl::Status ReadHeader();
  absl::Status CheckDigest() const;
  absl::Status CheckTensor(const std::string& name, DType dtype, const Shape& shape) const;
  absl::Status ReadAt(uint64_t offset, void* dst, size_t bytes) const;
  const Tensor* Find(const std::string& name) const;
  // Sets the loss scale's counters to what the stack goes on with, within its own bounds.
  void RestoreLossScale(const Stack& stack, StackCounters& counters) const;

  std::string name_;
  int fd_ = -1;
  uint64_t file_bytes_ = 0;
  std::string header_;           // as in the file
  std::string digest_;           // 64 hexadecimal digits
  size_t digest_position_ = 0;   // in header_
  std::vector<Tensor> tensors_;  // by name
  StackConfig config_;
  StackCounters counters_;
  bool has_loss_scale_ = false;  // counters_ has one from the file
};

}  // namespace lamina
