// The commands. Each prints its result or its error and returns the exit code.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cli/output.h"
#include "lamina/client.h"

namespace lamina::cli {

class ConfigFlags;

// Connects and runs; where no daemon answers it says which target was tried and how to start one,
// and returns kUnreachable.
int WithClient(const GlobalOptions& options, const std::function<int(const client::Client&)>& run);
// What the global options say about a connection.
client::ConnectOptions ToConnect(const GlobalOptions& options);

// service_commands.cc
int Info(const GlobalOptions& options);
int Health(const GlobalOptions& options);
// status_command.cc. `metrics`: where the daemon's HTTP server is, as URL or HOST:PORT; empty: as
// the daemon at the target says.
int Status(const GlobalOptions& options, const std::string& metrics);
int SaveCheckpoint(const GlobalOptions& options, const std::string& stack, const std::string& name);
int LoadCheckpoint(const GlobalOptions& options, const std::string& stack, const std::string& name,
                   bool create);

// stack_commands.cc
int CreateStack(const GlobalOptions& options, const std::string& name,
                const client::StackConfig& config);
int ListStacks(const GlobalOptions& options);
int ShowStack(const GlobalOptions& options, const std::string& name);
int UpdateStack(const GlobalOptions& options, const std::string& name,
                const client::StackUpdate& update);
int DeleteStack(const GlobalOptions& options, const std::string& name);
int ListParameters(const GlobalOptions& options, const std::string& stack);

// hf_bert_commands.cc
struct ImportOptions {
  std::string path;    // a folder, or a file in one
  std::string name;    // the new stack's; empty: the path's last part without ending
  std::string prefix;  // what stands before "layer.<i>."; empty: the one that there is
};
// A stack from a model's files, which are read here; `flags` override what they tell.
int ImportCheckpoint(const GlobalOptions& options, const ImportOptions& from,
                     const ConfigFlags& flags);
struct ExportOptions {
  std::string stack;
  std::string path;                    // a file if it ends in .safetensors, else a folder
  std::string base;                    // a model whose other tensors are copied; empty: none
  std::string prefix;                  // empty: the base's, or "encoder."
  std::optional<client::DType> dtype;  // without base; absent: fp32
};
int ExportCheckpoint(const GlobalOptions& options, const ExportOptions& to);

// plan_commands.cc
struct PlanOptions {
  std::string model;               // whose layers, by name; empty: the flags' alone
  std::string device;              // "cuda" or "cpu": plan here; empty: the daemon's
  std::optional<uint64_t> memory;  // bytes: the table of micro-batches instead of one plan
  std::vector<int64_t> seqs;       // its sequence lengths; empty: 128 and 512
};
int Plan(const GlobalOptions& options, PlanOptions plan, const ConfigFlags& flags);

// run_command.cc
struct RunOptions {
  std::string stack;
  std::string input_file;
  std::string mask_file;     // empty: none
  std::string lengths_file;  // empty: none
  std::string output_file;   // empty: only a summary is printed
  std::string layers;        // "a:b"; empty: all
};
int Run(const GlobalOptions& options, const RunOptions& run);

// bench_command.cc
struct BenchOptions {
  std::string stack;
  int64_t batch = 0;                                // 0: the stack's
  int64_t seq = 0;                                  // 0: the stack's
  std::vector<std::pair<int64_t, int64_t>> shapes;  // (B, S), each measured; empty: batch and seq
  double seconds = 5;
  int64_t warmup = 3;  // steps of each client
  bool regions = true;
  bool inline_tensors = true;
  bool forward_only = false;
  int concurrency = 1;
  bool pipeline = false;         // calls on a stream
  std::optional<int> depth;      // of it; absent: 32
  double rate = 0;               // steps a second; 0: a closed loop
  std::optional<uint64_t> seed;  // of the arrivals; absent: 1
};
int Bench(const GlobalOptions& options, const BenchOptions& bench);

// conformance_command.cc
struct ConformanceOptions {
  std::vector<std::string> only;  // globs of checks' names; empty: all
  bool list = false;              // prints the checks and runs none
  bool slow = false;              // waits out leases of any length
  std::string json_file;          // where the results go too; empty: nowhere
};
// kOk: no check failed.
int Conformance(const GlobalOptions& options, const ConformanceOptions& conformance);

}  // namespace lamina::cli
