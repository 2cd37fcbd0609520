// What reads files that others wrote: the daemon's checkpoints, the command line's arrays and
// configs.
#include <openssl/evp.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <span>
#include <string>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "cli/config_json.h"
#include "cli/hf_bert.h"
#include "cli/npy.h"
#include "cli/safetensors.h"
#include "lamina/transformer/config.h"
#include "nlohmann/json.hpp"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/memory_file.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {
namespace {

using Json = nlohmann::json;

void WriteFile(const std::string& path, absl::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << bytes;
  if (!file.flush()) Broken("the rig can write a file");
}

// A safetensors file whose header is as long as its first bytes say: up to its last brace where
// they do not fit it.
std::string WithLength(absl::string_view bytes) {
  std::string file(bytes);
  if (file.size() < 8) return file;
  uint64_t length = 0;
  for (size_t i = 0; i < 8; ++i) length |= uint64_t{static_cast<unsigned char>(file[i])} << (8 * i);
  if (length >= 2 && length <= file.size() - 8 && file[8 + length - 1] != '\0') return file;
  const size_t brace = file.rfind('}');
  if (brace == std::string::npos || brace < 8) return file;
  length = brace + 1 - 8;
  for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
  return file;
}

// A checkpoint whose digest is its own, where it has one: else no change gets past the digest.
std::string WithDigest(std::string file) {
  constexpr std::string_view kBefore = "\"lamina.sha256\":\"";
  constexpr size_t kDigits = 64;
  const size_t key = file.find(kBefore);
  if (key == std::string::npos || file.size() < key + kBefore.size() + kDigits) return file;
  const size_t at = key + kBefore.size();
  file.replace(at, kDigits, kDigits, '0');
  std::array<unsigned char, 32> digest{};
  unsigned int length = 0;
  if (EVP_Digest(file.data(), file.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1)
    Broken("the rig has SHA-256");
  file.replace(at, kDigits,
               absl::BytesToHexString(
                   absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size())));
  return file;
}

void RunCheckpoint(absl::string_view input) {
  Daemon& daemon = Daemon::Get();
  const auto load = [&](const std::string& file) {
    WriteFile(daemon.checkpoints() + "/input.safetensors", file);
    for (const bool create : {true, false}) {  // then into the stack that is there
      v1::LoadCheckpointRequest request;
      request.set_stack("new");
      request.set_name("input");
      request.set_create(create);
      (void)daemon.Call(request);
    }
    daemon.End();
  };
  load(std::string(input));
  const std::string mended = WithDigest(WithLength(input));
  if (mended != input) load(mended);
}

void RunSafetensors(absl::string_view input) {
  const std::string mended = WithLength(input);
  for (const absl::string_view bytes : {input, absl::string_view(mended)}) {
    const MemoryFile memory(bytes);
    const auto file = cli::SafetensorsFile::Open(memory.path());
    if (!file.ok()) {
      if (!absl::IsInvalidArgument(file.status())) Broken(file.status().ToString());
      continue;
    }
    // Every byte of it can be read, and no byte is two tensors'.
    uint64_t total = 0;
    for (const auto& [name, tensor] : file->header().tensors) {
      total += tensor.bytes();
      std::string read(tensor.bytes(), '\0');
      const absl::Status status =
          file->ReadAt(file->data_offset() + tensor.begin, std::as_writable_bytes(std::span(read)));
      if (!status.ok()) Broken(status.ToString());
      if (read != bytes.substr(file->data_offset() + tensor.begin, tensor.bytes()))
        Broken("a tensor is the bytes that its header says");
    }
    if (total != file->size() - file->data_offset())
      Broken("a file's tensors are its bytes behind the header");
  }
}

void RunNpy(absl::string_view input) {
  const MemoryFile memory(input);
  const auto array = cli::ReadNpy(memory.path());
  if (!array.ok()) {
    if (!absl::IsInvalidArgument(array.status())) Broken(array.status().ToString());
    return;
  }
  int64_t elements = 1;
  for (const int64_t extent : array->shape) elements *= extent;
  if (elements != array->elements()) Broken("an array has as many elements as its shape says");
  for (const auto& status : {array->ToFloats().status(), array->ToInts().status()})
    if (!status.ok() && !absl::IsInvalidArgument(status)) Broken(status.ToString());
  // Written and read again it is the same.
  const MemoryFile again("");
  if (!cli::WriteNpy(again.path(), *array).ok()) Broken("an array that was read can be written");
  const auto read = cli::ReadNpy(again.path());
  if (!read.ok() || read->data != array->data || read->shape != array->shape)
    Broken("an array that was written reads as it was");
}

void RunConfigJson(absl::string_view input) {
  // What checkpoints carry.
  const auto stack = StackConfigFromJson(std::string(input));
  if (stack.ok()) {
    const auto again = StackConfigFromJson(ToJson(*stack));
    if (!again.ok() || ToJson(*again) != ToJson(*stack)) Broken("a config reads as it was written");
    (void)Resolve(*stack, 0);
  }
  // What the command line is given.
  const Json json = Json::parse(input, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return;
  const auto config = cli::ConfigFromJson(json);
  if (config.ok()) {
    const auto again = cli::ConfigFromJson(cli::ToJson(*config));
    if (!again.ok() || cli::ToJson(*again) != cli::ToJson(*config))
      Broken("a config reads as it was written");
  }
  for (const auto& status : {config.status(), cli::StackFieldsFromHfBert(json).status()})
    if (!status.ok() && !absl::IsInvalidArgument(status)) Broken(status.ToString());
}

}  // namespace

std::vector<Target> FileTargets() {
  return {
      {"checkpoint", "a checkpoint's file into LoadCheckpoint, with its digest put right", nullptr,
       RunCheckpoint},
      {"safetensors", "a .safetensors file into the command line's reader", nullptr,
       RunSafetensors},
      {"npy", "a .npy file into the command line's reader", nullptr, RunNpy},
      {"config_json", "a stack's config, or a BERT model's, as JSON", nullptr, RunConfigJson},
  };
}

}  // namespace lamina::fuzz
