// The commands. Each prints its result or its error and returns the exit code.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "cli/output.h"
#include "lamina/client.h"

namespace lamina::cli {

class ConfigFlags;

// Connects and runs; where no daemon answers it says which target was tried and how to start one,
// and returns kUnreachable.
int WithClient(const GlobalOptions& options, const std::function<int(const client::Client&)>& run);

// service_commands.cc
int Info(const GlobalOptions& options);
int Health(const GlobalOptions& options);
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
int Plan(const GlobalOptions& options, const client::StackConfig& config);
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
  int64_t batch = 0;  // 0: the stack's
  int64_t seq = 0;    // 0: the stack's
  double seconds = 5;
  bool regions = true;
  bool inline_tensors = true;
  bool forward_only = false;
};
int Bench(const GlobalOptions& options, const BenchOptions& bench);

}  // namespace lamina::cli
