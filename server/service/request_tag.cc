#include "server/service/request_tag.h"

#include <spdlog/spdlog.h>
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/logging.h"

namespace lamina {
namespace {

constexpr size_t kLongestId = 64;
constexpr size_t kLongestReason = 400;  // of a logged message

bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || (c >= 'a' && c <= 'f');
  });
}
bool IsZero(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c == '0'; });
}

uint64_t RandomBits() {
  uint64_t bits = 0;
  while (getrandom(&bits, sizeof(bits), 0) != sizeof(bits)) {
  }
  return bits;
}

absl::string_view ToView(grpc::string_ref text) { return {text.data(), text.size()}; }

// Lets so many through within a second, and counts the others.
class Budget {
 public:
  // True: log it. `held_back`: how many were not since the last that was.
  bool Take(uint64_t* held_back) {
    const int64_t second = absl::ToUnixSeconds(absl::Now());
    std::lock_guard<std::mutex> lock(mutex_);
    if (second != second_) {
      second_ = second;
      left_ = kFailuresLogged;
    }
    if (left_ == 0) {
      ++held_back_;
      return false;
    }
    --left_;
    *held_back = std::exchange(held_back_, 0);
    return true;
  }

 private:
  std::mutex mutex_;
  int64_t second_ = 0;      // guarded by mutex_
  int left_ = 0;            // guarded by mutex_
  uint64_t held_back_ = 0;  // guarded by mutex_
};

}  // namespace

TraceContext ParseTraceparent(absl::string_view traceparent) {
  // version "-" trace-id "-" parent-id "-" flags
  constexpr size_t kLength = 2 + 1 + 32 + 1 + 16 + 1 + 2;
  if (traceparent.size() < kLength || traceparent[2] != '-' || traceparent[35] != '-' ||
      traceparent[52] != '-')
    return {};
  const absl::string_view version = traceparent.substr(0, 2);
  const TraceContext context{traceparent.substr(3, 32), traceparent.substr(36, 16)};
  if (!IsHex(version) || version == "ff" || !IsHex(context.trace_id) || !IsHex(context.span_id) ||
      !IsHex(traceparent.substr(53, 2)) || IsZero(context.trace_id) || IsZero(context.span_id))
    return {};
  // What a later version adds comes behind another dash.
  if (traceparent.size() > kLength && (version == "00" || traceparent[kLength] != '-')) return {};
  return context;
}

bool IsRequestId(absl::string_view id) {
  return !id.empty() && id.size() <= kLongestId &&
         std::all_of(id.begin(), id.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
         });
}

std::string NewRequestId() {
  static const uint64_t start = RandomBits();
  static std::atomic<uint64_t> count{0};
  // One after another, spread over all 64 bits: each of SplitMix64's steps can be undone, so no two
  // are alike.
  uint64_t id = start + 0x9E3779B97F4A7C15 * count.fetch_add(1, std::memory_order_relaxed);
  id = (id ^ (id >> 30)) * 0xBF58476D1CE4E5B9;
  id = (id ^ (id >> 27)) * 0x94D049BB133111EB;
  id ^= id >> 31;
  return absl::StrCat(absl::Hex(id, absl::kZeroPad16));
}

void Tag(const grpc::ServerContextBase& context, CallControl& control) {
  const auto& metadata = context.client_metadata();
  if (const auto id = metadata.find(kRequestIdKey); id != metadata.end())
    control.request_id = ToView(id->second);
  if (const auto parent = metadata.find(kTraceparentKey); parent != metadata.end()) {
    const TraceContext trace = ParseTraceparent(ToView(parent->second));
    control.trace_id = trace.trace_id;
    control.span_id = trace.span_id;
  }
}

std::string RequestIdOf(const CallControl& control) {
  return control.request_item == 0 ? std::string(control.request_id)
                                   : absl::StrCat(control.request_id, ".", control.request_item);
}

std::string TagFields(const CallControl& control) {
  return absl::StrCat(control.request_id.empty() ? "" : " request_id=", RequestIdOf(control),
                      control.trace_id.empty() ? "" : " trace_id=", control.trace_id,
                      control.span_id.empty() ? "" : " span_id=", control.span_id);
}

void LogFailure(absl::string_view method, absl::StatusCode code, absl::string_view message,
                const CallControl& control) {
  static Budget budget;
  uint64_t held_back = 0;
  if (!budget.Take(&held_back)) return;
  if (held_back > 0) spdlog::warn("event=rpc_failures_not_logged count={}", held_back);
  const bool ours = code == absl::StatusCode::kInternal || code == absl::StatusCode::kUnknown ||
                    code == absl::StatusCode::kDataLoss;
  spdlog::log(ours ? spdlog::level::err : spdlog::level::info,
              "event=rpc_failed method={} code={}{} reason={}", std::string(method),
              absl::StatusCodeToString(code), TagFields(control),
              Quoted(message.substr(0, kLongestReason)));
}

}  // namespace lamina
