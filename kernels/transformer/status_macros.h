// Early returns for absl::Status; this Abseil has none in public.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define LAMINA_RETURN_IF_ERROR(expr)               \
  do {                                             \
    absl::Status lamina_status = (expr);           \
    if (!lamina_status.ok()) return lamina_status; \
  } while (false)

#define LAMINA_CONCAT_INNER(a, b) a##b
#define LAMINA_CONCAT(a, b) LAMINA_CONCAT_INNER(a, b)
#define LAMINA_ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                                  \
  if (!tmp.ok()) return tmp.status();                 \
  lhs = *std::move(tmp)
#define LAMINA_ASSIGN_OR_RETURN(lhs, expr) \
  LAMINA_ASSIGN_OR_RETURN_INNER(LAMINA_CONCAT(lamina_or_, __LINE__), lhs, expr)
