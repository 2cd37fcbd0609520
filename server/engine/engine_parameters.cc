#include <new>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/engine/call_checks.h"
#include "server/engine/checkpoint.h"
#include "server/engine/engine_impl.h"
#include "server/engine/status_macros.h"

namespace lamina {
namespace {

// Which part a read of this dtype means. INVALID_ARGUMENT.
absl::StatusOr<ParameterPart> PartFor(const StackConfig& config, DType dtype, bool gradients) {
  if (dtype == DType::kF32) return gradients ? ParameterPart::kGradient : ParameterPart::kMaster;
  if (gradients)
    return absl::InvalidArgumentError(
        absl::StrCat("dtype: is ", Name(dtype), "; gradients are fp32"));
  if (dtype == config.dtype) return ParameterPart::kWeights;
  return absl::InvalidArgumentError(
      absl::StrCat("dtype: is ", Name(dtype), "; it must be fp32 (the master weights)",
                   config.dtype == DType::kF32 ? "" : absl::StrCat(" or ", Name(config.dtype))));
}

absl::StatusOr<std::vector<ParameterRead>> Describe(const Stack& stack,
                                                    const std::vector<std::string>& names,
                                                    DType dtype, bool gradients) {
  ENGINE_RETURN_IF_ERROR(PartFor(stack.config(), dtype, gradients).status());
  if (gradients && !stack.config().training)
    return absl::FailedPreconditionError(
        "stack: its training is off, so it keeps no gradients; turn it on first");
  std::vector<ParameterRead> reads;
  if (names.empty())
    for (const ParameterInfo& info : stack.parameters()) reads.push_back({info, dtype});
  for (const std::string& name : names) {
    ENGINE_ASSIGN_OR_RETURN(ParameterInfo info, stack.FindParameter(name));
    reads.push_back({std::move(info), dtype});
  }
  return reads;
}

size_t BytesOf(const ParameterRead& read) {
  return static_cast<size_t>(read.info.shape.elements()) * SizeOf(read.dtype);
}

}  // namespace

absl::StatusOr<std::vector<ParameterRead>> EngineImpl::DescribeParameters(
    const std::string& stack, const std::vector<std::string>& names, DType dtype, bool gradients) {
  std::vector<ParameterRead> reads;
  ENGINE_RETURN_IF_ERROR(Run({}, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(const Entry* const entry, Find(stack));
    ENGINE_ASSIGN_OR_RETURN(reads, Describe(*entry->stack, names, dtype, gradients));
    return absl::OkStatus();
  }));
  return reads;
}

absl::Status EngineImpl::ReadParameters(const std::string& stack,
                                        const std::vector<std::string>& names, DType dtype,
                                        bool gradients, const ParameterTarget& target,
                                        const CallControl& control) {
  return Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(const Entry* const entry, Find(stack));
    ENGINE_ASSIGN_OR_RETURN(const std::vector<ParameterRead> reads,
                            Describe(*entry->stack, names, dtype, gradients));
    size_t wanted = 0;
    for (const ParameterRead& read : reads) wanted += BytesOf(read);
    if (wanted != target.bytes)
      return absl::InvalidArgumentError(absl::StrCat("target.slice.size_bytes: is ", target.bytes,
                                                     "; the tensors have ", wanted, " bytes"));
    ENGINE_ASSIGN_OR_RETURN(const ParameterPart part,
                            PartFor(entry->stack->config(), dtype, gradients));
    return OnDevice([&]() -> absl::Status {
      char* to = static_cast<char*>(target.data);
      for (const ParameterRead& read : reads) {
        ENGINE_RETURN_IF_ERROR(
            entry->stack->ReadParameter(read.info.name, part, to, BytesOf(read), target.memory));
        to += BytesOf(read);
      }
      return absl::OkStatus();
    });
  });
}

absl::Status EngineImpl::WriteParameters(const std::string& stack,
                                         const std::vector<ParameterValue>& values,
                                         const CallControl& control) {
  return Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    const StackConfig& config = entry->stack->config();
    std::set<std::string> seen;
    for (size_t i = 0; i < values.size(); ++i) {
      const ParameterValue& value = values[i];
      const std::string field = absl::StrCat("tensors[", i, "]");
      const absl::StatusOr<ParameterInfo> info = entry->stack->FindParameter(value.name);
      if (!info.ok())
        return absl::Status(info.status().code(),
                            absl::StrCat(field, ".name: ", info.status().message()));
      if (!seen.insert(value.name).second)
        return absl::InvalidArgumentError(
            absl::StrCat(field, ".name: \"", value.name, "\" is given twice"));
      const DType dtype = value.tensor.dtype == config.dtype ? config.dtype : DType::kF32;
      ENGINE_RETURN_IF_ERROR(
          CheckTensor(absl::StrCat(field, ".tensor"), value.tensor, dtype, info->shape));
    }
    ENGINE_RETURN_IF_ERROR(OnDevice([&]() -> absl::Status {
      for (const ParameterValue& value : values)
        ENGINE_RETURN_IF_ERROR(entry->stack->WriteParameter(
            value.name,
            value.tensor.dtype == DType::kF32 ? ParameterPart::kMaster : ParameterPart::kWeights,
            value.tensor.data, value.tensor.bytes(), value.tensor.memory));
      return absl::OkStatus();
    }));
    for (const ParameterValue& value : values) CountTensor(value.tensor, TensorRole::kInput);
    return absl::OkStatus();
  });
}

// --- checkpoints ---

// A failure of the daemon's, the disk's or the file's; not of what was asked for.
void EngineImpl::CountFailure(CheckpointOp op, const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnknown:
      metrics_->CheckpointFailed(op);
      break;
    default:
      break;
  }
}

absl::StatusOr<CheckpointInfo> EngineImpl::SaveCheckpoint(const std::string& stack,
                                                          const std::string& name,
                                                          const CallControl& control) {
  absl::StatusOr<CheckpointInfo> saved = Save(stack, name, control);
  CountFailure(CheckpointOp::kSave, saved.status());
  return saved;
}

absl::StatusOr<StackInfo> EngineImpl::LoadCheckpoint(const std::string& stack,
                                                     const std::string& name, bool create,
                                                     const CallControl& control) {
  absl::StatusOr<StackInfo> loaded = Load(stack, name, create, control);
  CountFailure(CheckpointOp::kLoad, loaded.status());
  return loaded;
}

absl::StatusOr<CheckpointInfo> EngineImpl::Save(const std::string& stack, const std::string& name,
                                                const CallControl& control) {
  const std::string& file = name.empty() ? stack : name;
  ENGINE_RETURN_IF_ERROR(CheckName(name.empty() ? "stack" : "name", file));
  if (options_.checkpoint_dir.empty())
    return absl::FailedPreconditionError("the daemon was started without a checkpoint folder");
  const Clock::time_point begin = Clock::now();
  std::unique_lock<std::timed_mutex> turn(checkpoint_mutex_, std::defer_lock);
  if (control.deadline == absl::InfiniteFuture()) {
    turn.lock();
  } else if (!turn.try_lock_until(absl::ToChronoTime(control.deadline))) {
    metrics_->Rejected(Rejection::kDeadline);
    return absl::DeadlineExceededError(
        "the deadline passed while another checkpoint was being saved; nothing has changed");
  }
  std::unique_ptr<CheckpointWriter> writer;
  // Once drained, nothing changes any more: the state to keep for the next start.
  const Admission admission = queue_.drained() ? Admission::kAlways : Admission::kCall;
  ENGINE_RETURN_IF_ERROR(Run(control, admission, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    absl::StatusOr<std::unique_ptr<CheckpointWriter>> written =
        CheckpointWriter::Write(*entry->stack, options_.checkpoint_dir, file);
    if (!written.ok()) {
      // The disk's failure or the device's: the device's lasts.
      if (absl::IsInternal(written.status()))
        ENGINE_RETURN_IF_ERROR(OnDevice([&] { return backend_->Synchronize(); }));
      return written.status();
    }
    writer = *std::move(written);
    return absl::OkStatus();
  }));
  // The disk is waited for here, while the device goes on.
  ENGINE_ASSIGN_OR_RETURN(CheckpointInfo info, writer->Commit());
  metrics_->CheckpointDone(CheckpointOp::kSave,
                           std::chrono::duration<double>(Clock::now() - begin).count(), info.bytes);
  return info;
}

absl::StatusOr<StackInfo> EngineImpl::Load(const std::string& stack, const std::string& name,
                                           bool create, const CallControl& control) {
  ENGINE_RETURN_IF_ERROR(CheckName("stack", stack));
  const std::string& file = name.empty() ? stack : name;
  ENGINE_RETURN_IF_ERROR(CheckName("name", file));
  if (options_.checkpoint_dir.empty())
    return absl::FailedPreconditionError("the daemon was started without a checkpoint folder");
  ENGINE_RETURN_IF_ERROR(CheckServing());
  // Both are looked at again on the device thread; here they spare the reading.
  const absl::Status exists = Find(stack).status();
  if (!create) ENGINE_RETURN_IF_ERROR(exists);
  if (create && exists.ok())
    return absl::AlreadyExistsError(
        absl::StrCat("stack: there is a stack \"", stack, "\" already"));

  const Clock::time_point begin = Clock::now();
  // Reading and checking the file keeps only this thread busy.
  std::unique_ptr<CheckpointReader> reader;
  try {
    ENGINE_ASSIGN_OR_RETURN(reader, CheckpointReader::Open(options_.checkpoint_dir, file));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("the daemon ran out of host memory for the header");
  }
  StackConfig config;
  if (create) {
    ENGINE_ASSIGN_OR_RETURN(config, Resolve(reader->config(), device().ordinal));
  }
  StackInfo info;
  ENGINE_RETURN_IF_ERROR(Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    if (create) {
      ENGINE_RETURN_IF_ERROR(AddStack(stack, config).status());
    }
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(stack));
    Stack& target = *entry->stack;
    absl::Status restored = reader->CheckFits(target.config(), target.parameters());
    if (restored.ok()) {
      restored = reader->Restore(target);
      // A failure of the device shows itself again here, one of the disk does not.
      if (!restored.ok()) ENGINE_RETURN_IF_ERROR(OnDevice([&] { return backend_->Synchronize(); }));
    }
    if (!restored.ok()) {
      if (create) RemoveStack(stack);
      return restored;
    }
    Publish(stack, *entry);
    std::lock_guard<std::mutex> lock(mutex_);
    info = entry->info;
    return absl::OkStatus();
  }));
  metrics_->CheckpointDone(CheckpointOp::kLoad,
                           std::chrono::duration<double>(Clock::now() - begin).count(),
                           reader->bytes());
  return info;
}

}  // namespace lamina
