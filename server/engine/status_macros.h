// Early returns for absl::Status; this Abseil has none in public. Names are counted, so that a
// lambda inside an argument may return early too.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define ENGINE_CONCAT_INNER(a, b) a##b
#define ENGINE_CONCAT(a, b) ENGINE_CONCAT_INNER(a, b)

#define ENGINE_RETURN_IF_ERROR_INNER(status, expr) \
  do {                                             \
    absl::Status status = (expr);                  \
    if (!status.ok()) return status;               \
  } while (false)
#define ENGINE_RETURN_IF_ERROR(expr) \
  ENGINE_RETURN_IF_ERROR_INNER(ENGINE_CONCAT(engine_status_, __COUNTER__), expr)

#define ENGINE_ASSIGN_OR_RETURN_INNER(result, lhs, expr) \
  auto result = (expr);                                  \
  if (!result.ok()) return result.status();              \
  lhs = *std::move(result)
#define ENGINE_ASSIGN_OR_RETURN(lhs, expr) \
  ENGINE_ASSIGN_OR_RETURN_INNER(ENGINE_CONCAT(engine_or_, __COUNTER__), lhs, expr)
