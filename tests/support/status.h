// What tests say of an absl::Status.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina::testing {

#define ASSERT_OK(expr)                                 \
  do {                                                  \
    const absl::Status status_of_expr = (expr);         \
    ASSERT_TRUE(status_of_expr.ok()) << status_of_expr; \
  } while (false)
#define EXPECT_OK(expr)                                 \
  do {                                                  \
    const absl::Status status_of_expr = (expr);         \
    EXPECT_TRUE(status_of_expr.ok()) << status_of_expr; \
  } while (false)

// A code and a part of the message.
MATCHER_P2(IsStatus, code, text, "") {
  *result_listener << arg.ToString();
  return arg.code() == code &&
         std::string(arg.message()).find(std::string(text)) != std::string::npos;
}
// Names of the codes, short.
inline constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
inline constexpr auto kNotFound = absl::StatusCode::kNotFound;
inline constexpr auto kExists = absl::StatusCode::kAlreadyExists;
inline constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
inline constexpr auto kExhausted = absl::StatusCode::kResourceExhausted;
inline constexpr auto kUnavailable = absl::StatusCode::kUnavailable;

// The value, or an exception that ends the test.
template <typename T>
T Value(absl::StatusOr<T> value) {
  if (!value.ok()) throw std::runtime_error(value.status().ToString());
  return *std::move(value);
}

}  // namespace lamina::testing
