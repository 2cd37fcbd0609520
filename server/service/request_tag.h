// Whose call it is, as the metadata say: the request's id and the client's trace.
//
// x-request-id: 1 to 64 of letters, digits, '.', '_', '-'; the interceptor makes one where the
// client gave none, or none of that form, so every call has one. traceparent: W3C Trace Context.
// Errors carry the id in their trailing metadata, and the log's lines about a call carry both.
#pragma once

#include <grpcpp/server_context.h>

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/engine/engine.h"

namespace lamina {

inline constexpr char kRequestIdKey[] = "x-request-id";
inline constexpr char kTraceparentKey[] = "traceparent";

struct TraceContext {
  absl::string_view trace_id;  // 32 lower-case hexadecimal digits; empty: none
  absl::string_view span_id;   // 16
};
// The parts of a traceparent of version 00, or of a later one that begins like it. Of anything else
// nothing: a broken one is as none.
TraceContext ParseTraceparent(absl::string_view traceparent);

bool IsRequestId(absl::string_view id);
// 16 hexadecimal digits that no other call of this daemon has, and hardly one of another.
std::string NewRequestId();

// Puts the context's request and trace into `control`, which must not outlive it.
void Tag(const grpc::ServerContextBase& context, CallControl& control);

// " request_id=... trace_id=... span_id=...", as far as they are known: for the end of a log line.
std::string TagFields(const CallControl& control);
// "id", or "id.item" of a call in an Execute stream.
std::string RequestIdOf(const CallControl& control);

// One line of the log about a call that failed. Of more than kFailuresLogged a second only the
// number is logged: clients must not be able to fill a disk.
inline constexpr int kFailuresLogged = 50;
void LogFailure(absl::string_view method, absl::StatusCode code, absl::string_view message,
                const CallControl& control);

}  // namespace lamina
