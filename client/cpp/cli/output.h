// What commands print and how they end: tables and JSON on stdout, errors on stderr, exit codes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "lamina/client.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

enum ExitCode : int {
  kOk = 0,
  kRefused = 1,      // the daemon refused or failed, or a result could not be written
  kUsage = 2,        // arguments, or a file that was given
  kUnreachable = 3,  // no daemon answers
};

// What every command is given.
struct GlobalOptions {
  std::string target;  // as the library's Connect takes it; empty: the default
  bool json = false;
  bool csv = false;             // of the one table that is printed so: plan --memory
  double timeout_seconds = 60;  // of each call; 0: none
  client::Security security;    // of TCP targets
};

inline constexpr const char* kCsvIsForCapacity =
    "--output csv: only the table of plan --memory is printed so";

// A left-aligned first column, right-aligned others, and with `text_last` a left-aligned last one;
// two spaces between. Rows may be shorter than the header.
class Table {
 public:
  explicit Table(std::vector<std::string> header, bool text_last = false)
      : header_(std::move(header)), text_last_(text_last) {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string Text() const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
  bool text_last_;
};

// "label   value" lines, the values under one another.
std::string Lines(const std::vector<std::pair<std::string, std::string>>& lines);

std::string HumanBytes(uint64_t bytes);    // "1.50 GiB"; below 1 KiB "17 B"
std::string HumanSeconds(double seconds);  // "1.24 ms", "3.5 s", "2 h 5 min"
std::string HumanCount(int64_t count);     // "12,345,678"
std::string Milliseconds(double seconds);  // "1.243", for columns that say ms

void PrintText(std::string_view text);       // to stdout, with a line's end
void PrintJson(const nlohmann::json& json);  // the same, indented

// Print what went wrong to stderr, as JSON where that was asked for, and return the exit code.
int Fail(const GlobalOptions& options, const absl::Status& status);
int FailUsage(const GlobalOptions& options, const std::string& message);
// FailUsage where the status is INVALID_ARGUMENT, so about what was given, else Fail.
int FailBy(const GlobalOptions& options, const absl::Status& status);

}  // namespace lamina::cli
