// lamina checkpoint import and export: a model's files, where this command runs, to a stack and
// back.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/config_flags.h"
#include "cli/config_json.h"
#include "cli/describe.h"
#include "cli/hf_bert.h"
#include "cli/new_file.h"
#include "cli/read_file.h"
#include "nlohmann/json.hpp"
#include "src/float16.h"

namespace lamina::cli {
namespace {

using client::DType;
using client::NamedTensor;
using client::Tensor;
using Json = nlohmann::json;

std::string BaseName(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path.substr(path.rfind('/') + 1);
}

// Of a file, when it is read in pieces: what stays in a core's own cache.
constexpr size_t kPieceBytes = size_t{1} << 16;

// Calls `take` (absl::Status(offset, piece)) for one piece after another of a file's bytes
// [begin, end), with the offset from `begin`.
template <typename Take>
absl::Status InPieces(const SafetensorsFile& file, uint64_t begin, uint64_t end, Take take) {
  std::vector<std::byte> buffer(std::min<uint64_t>(kPieceBytes, end - begin));
  for (uint64_t at = begin; at < end; at += buffer.size()) {
    const std::span piece = std::span(buffer).first(std::min<uint64_t>(buffer.size(), end - at));
    if (absl::Status status = file.ReadAt(at, piece); !status.ok()) return status;
    if (absl::Status status = take(at - begin, piece); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// The elements as fp32, exactly.
absl::StatusOr<Tensor> AsFloats(const HfBertMatch& match) {
  const SafetensorsFile& file = *match.found.file;
  const uint64_t begin = file.data_offset() + match.found.tensor->begin;
  absl::StatusOr<Tensor> tensor = Tensor::Allocate(DType::kFloat32, match.shape);
  if (!tensor.ok()) return tensor;
  const std::span<float> floats = tensor->floats();
  const DType dtype = FloatingType(*match.found.tensor).value();
  if (dtype == DType::kFloat32) {
    const absl::Status status = file.ReadAt(begin, std::as_writable_bytes(floats));
    if (!status.ok()) return status;
    return tensor;
  }
  const absl::Status status =
      InPieces(file, begin, begin + match.found.tensor->bytes(),
               [&](uint64_t offset, std::span<const std::byte> piece) {
                 float* to = floats.data() + offset / sizeof(uint16_t);
                 for (size_t at = 0; at < piece.size(); at += sizeof(uint16_t)) {
                   uint16_t half = 0;
                   std::memcpy(&half, piece.data() + at, sizeof(half));
                   *to++ = dtype == DType::kFloat16 ? client::internal::FloatFromFloat16(half)
                                                    : client::internal::FloatFromBFloat16(half);
                 }
                 return absl::OkStatus();
               });
  if (!status.ok()) return status;
  return tensor;
}

// Sets a stack's parameters, as many at a time as a message may carry.
absl::Status Upload(const client::Client& daemon, const std::string& stack_name,
                    const std::vector<HfBertMatch>& matches) {
  const absl::StatusOr<client::ServerInfo> info = daemon.Info();
  if (!info.ok()) return info.status();
  const absl::StatusOr<client::Session> session =
      daemon.OpenSession({.client_name = "lamina checkpoint import"});
  if (!session.ok()) return session.status();
  const absl::StatusOr<client::Stack> stack = session->OpenStack(stack_name);
  if (!stack.ok()) return stack.status();
  std::vector<NamedTensor> batch;
  size_t bytes = 0;
  const auto flush = [&]() -> absl::Status {
    if (batch.empty()) return absl::OkStatus();
    absl::Status status = stack->SetParameters(batch);
    batch.clear();
    bytes = 0;
    return status;
  };
  for (const HfBertMatch& match : matches) {
    absl::StatusOr<Tensor> tensor = AsFloats(match);
    if (!tensor.ok()) return tensor.status();
    if (bytes + tensor->bytes() > info->inline_cap_bytes) {
      if (absl::Status status = flush(); !status.ok()) return status;
    }
    bytes += tensor->bytes();
    batch.push_back({.name = match.parameter, .tensor = *std::move(tensor)});
  }
  return flush();
}

// What an import makes: read and checked before the daemon is asked for anything.
struct Import {
  std::string name, prefix;
  client::StackConfig config;
  std::vector<HfBertMatch> matches;
  uint64_t bytes = 0;
};

absl::StatusOr<Import> PrepareImport(const HfBertFiles& files, const ImportOptions& options,
                                     const ConfigFlags& flags) {
  Import made;
  Json fields = {{"pre_layer_norm", false}};
  const bool has_config = access(files.config_path().c_str(), F_OK) == 0;
  if (has_config) {
    const absl::StatusOr<Json> config = ReadConfigFile(files.config_path());
    if (!config.ok()) return config.status();
    absl::StatusOr<Json> told = StackFieldsFromHfBert(*config);
    if (!told.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", files.config_path(), "': ", told.status().message()));
    }
    fields = *std::move(told);
  }
  const absl::StatusOr<client::StackConfig> config = flags.ResolveOver(fields);
  if (!config.ok()) return config.status();
  made.config = *config;
  if (made.config.pre_layer_norm) {
    return absl::InvalidArgumentError(
        "pre_layer_norm is true; hf-bert holds Post-LN layers, so leave it out");
  }
  if (!has_config) {
    for (const auto& [flag, value] :
         {std::pair("--hidden-size", made.config.hidden_size),
          std::pair("--heads", made.config.heads),
          std::pair("--num-hidden-layers", made.config.num_hidden_layers),
          std::pair("--batch-size", made.config.batch_size),
          std::pair("--max-seq-length", made.config.max_seq_length)}) {
      if (value != 0) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("there is no '", files.config_path(), "', so ", flag, " must be given"));
    }
  }
  const absl::StatusOr<std::string> prefix = HfBertPrefix(files, options.prefix);
  if (!prefix.ok()) return prefix.status();
  made.prefix = *prefix;
  absl::StatusOr<std::vector<HfBertMatch>> matches = MatchHfBert(files, made.prefix, made.config);
  if (!matches.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", options.path, "': ", matches.status().message()));
  }
  made.matches = *std::move(matches);
  for (const HfBertMatch& match : made.matches) made.bytes += match.found.tensor->bytes();
  made.name = options.name;
  if (made.name.empty()) {
    made.name = BaseName(options.path);
    for (const char* ending : {".index.json", ".safetensors"}) {
      if (absl::EndsWith(made.name, ending)) {
        made.name.resize(made.name.size() - std::strlen(ending));
      }
    }
  }
  return made;
}

// A file of an export, whole but for the encoder's tensors where it is a base's copy.
struct Target {
  NewFile file;
  uint64_t bytes = 0;
};

// Where a parameter's elements go.
struct Place {
  std::string parameter;
  size_t target = 0;
  uint64_t offset = 0;
  DType dtype = DType::kFloat32;
};

struct Export {
  std::vector<Target> targets;
  std::vector<Place> places;  // layer by layer
};

// The elements as the file has them.
std::string Converted(const Tensor& tensor, DType dtype) {
  const std::span<const float> floats = tensor.floats();
  std::string data(floats.size() * client::SizeOf(dtype), '\0');
  if (dtype == DType::kFloat32) {
    std::memcpy(data.data(), floats.data(), data.size());
    return data;
  }
  for (size_t i = 0; i < floats.size(); ++i) {
    const uint16_t half = dtype == DType::kFloat16 ? client::internal::Float16FromFloat(floats[i])
                                                   : client::internal::BFloat16FromFloat(floats[i]);
    std::memcpy(data.data() + i * sizeof(half), &half, sizeof(half));
  }
  return data;
}

absl::StatusOr<Export> CopyOfBase(const HfBertFiles& base, const ExportOptions& options,
                                  const client::StackConfig& config, const std::string& folder,
                                  const std::string& file_path) {
  const absl::StatusOr<std::string> prefix = HfBertPrefix(base, options.prefix);
  if (!prefix.ok()) return prefix.status();
  const absl::StatusOr<std::vector<HfBertMatch>> matches = MatchHfBert(base, *prefix, config);
  if (!matches.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", options.base, "': ", matches.status().message()));
  }
  if (!base.index_path().empty() && !file_path.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("'", options.base, "' is of several files, so '",
                                                   file_path, "' must be a folder"));
  }
  Export made;
  for (const SafetensorsFile& from : base.files()) {
    absl::StatusOr<NewFile> to = NewFile::Create(
        file_path.empty() ? absl::StrCat(folder, "/", BaseName(from.path())) : file_path);
    if (!to.ok()) return to.status();
    absl::Status status =
        InPieces(from, 0, from.size(), [&to](uint64_t offset, std::span<const std::byte> piece) {
          return to->WriteAt(offset, piece.data(), piece.size());
        });
    if (!status.ok()) return status;
    made.targets.push_back({.file = *std::move(to), .bytes = from.size()});
  }
  if (!base.index_path().empty()) {
    const absl::StatusOr<std::string> index = ReadFile(base.index_path(), kMaxSafetensorsHeader);
    if (!index.ok()) return index.status();
    absl::StatusOr<NewFile> to =
        NewFile::Create(absl::StrCat(folder, "/", BaseName(base.index_path())));
    if (!to.ok()) return to.status();
    absl::Status status = to->WriteAt(0, index->data(), index->size());
    if (!status.ok()) return status;
    made.targets.push_back({.file = *std::move(to), .bytes = index->size()});
  }
  for (const HfBertMatch& match : *matches) {
    made.places.push_back({.parameter = match.parameter,
                           .target = static_cast<size_t>(match.found.file - base.files().data()),
                           .offset = match.found.file->data_offset() + match.found.tensor->begin,
                           .dtype = FloatingType(*match.found.tensor).value()});
  }
  return made;
}

absl::StatusOr<Export> EncoderAlone(const ExportOptions& options, const client::StackConfig& config,
                                    const std::string& folder, const std::string& file_path) {
  // By name, as the reference library orders tensors of one type.
  std::map<std::string, std::pair<std::string, client::Shape>> by_name;
  const std::vector<HfBertTensor> layer = HfBertLayer(config);
  const std::string prefix = options.prefix.empty() ? "encoder." : options.prefix;
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    for (const HfBertTensor& tensor : layer) {
      by_name.emplace(absl::StrCat(prefix, "layer.", i, ".", tensor.name),
                      std::pair(absl::StrCat("layers.", i, ".", tensor.parameter), tensor.shape));
    }
  }
  const DType dtype = options.dtype.value_or(DType::kFloat32);
  std::vector<NewSafetensorsTensor> tensors;
  for (const auto& [name, parameter] : by_name) {
    tensors.push_back({.name = name, .dtype = dtype, .shape = parameter.second});
  }
  const std::string start = SafetensorsStart(tensors, {{"format", "pt"}});
  absl::StatusOr<NewFile> file =
      NewFile::Create(file_path.empty() ? absl::StrCat(folder, "/model.safetensors") : file_path);
  if (!file.ok()) return file.status();
  if (absl::Status status = file->WriteAt(0, start.data(), start.size()); !status.ok()) {
    return status;
  }
  Export made;
  uint64_t offset = start.size();
  for (const auto& [name, parameter] : by_name) {
    made.places.push_back(
        {.parameter = parameter.first, .target = 0, .offset = offset, .dtype = dtype});
    uint64_t bytes = client::SizeOf(dtype);
    for (const int64_t extent : parameter.second) bytes *= static_cast<uint64_t>(extent);
    offset += bytes;
  }
  made.targets.push_back({.file = *std::move(file), .bytes = offset});
  return made;
}

// Fills the places, a few tensors at a time in memory.
absl::Status Download(const client::Client& daemon, const std::string& stack_name, Export* made) {
  const absl::StatusOr<client::Session> session =
      daemon.OpenSession({.client_name = "lamina checkpoint export"});
  if (!session.ok()) return session.status();
  const absl::StatusOr<client::Stack> stack = session->OpenStack(stack_name);
  if (!stack.ok()) return stack.status();
  constexpr size_t kAtOnce = 16;  // a layer's
  for (size_t begin = 0; begin < made->places.size(); begin += kAtOnce) {
    const size_t end = std::min(begin + kAtOnce, made->places.size());
    std::vector<std::string> names;
    for (size_t i = begin; i < end; ++i) names.push_back(made->places[i].parameter);
    const absl::StatusOr<std::vector<NamedTensor>> tensors = stack->GetParameters(names);
    if (!tensors.ok()) return tensors.status();
    for (size_t i = begin; i < end; ++i) {
      const Place& place = made->places[i];
      const std::string data = Converted((*tensors)[i - begin].tensor, place.dtype);
      absl::Status status =
          made->targets[place.target].file.WriteAt(place.offset, data.data(), data.size());
      if (!status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

// A config.json that an export leaves beside the tensors.
struct ConfigFile {
  std::string path;
  bool there = false;   // it stays as it is
  std::string content;  // else what is written
};

absl::StatusOr<ConfigFile> PrepareConfigFile(const std::string& folder,
                                             const std::optional<HfBertFiles>& base,
                                             const client::StackConfig& config) {
  ConfigFile file{.path = absl::StrCat(folder, "/config.json")};
  const auto check = [&config](const std::string& path) -> absl::Status {
    const absl::StatusOr<Json> json = ReadConfigFile(path);
    if (!json.ok()) return json.status();
    const absl::Status same = CheckSameEncoder(*json, config);
    return same.ok() ? same
                     : absl::InvalidArgumentError(absl::StrCat("'", path, "': ", same.message()));
  };
  const bool base_has = base && access(base->config_path().c_str(), F_OK) == 0;
  if (base_has) {
    if (absl::Status status = check(base->config_path()); !status.ok()) return status;
  }
  if (access(file.path.c_str(), F_OK) == 0) {
    if (absl::Status status = check(file.path); !status.ok()) return status;
    file.there = true;
    return file;
  }
  if (base_has) {
    absl::StatusOr<std::string> content = ReadFile(base->config_path(), kMaxSafetensorsHeader);
    if (!content.ok()) return content.status();
    file.content = *std::move(content);
  } else {
    file.content = HfBertFromStack(config).dump(2) + "\n";
  }
  return file;
}

int Print(const GlobalOptions& options, const ExportOptions& from, const client::StackInfo& stack,
          const Export& made, const ConfigFile& config) {
  Json files = Json::array();
  std::string list;
  uint64_t bytes = 0;
  for (const Target& target : made.targets) {
    files.push_back(target.file.path());
    absl::StrAppend(&list, list.empty() ? "" : ", ", target.file.path());
    bytes += target.bytes;
  }
  if (options.json) {
    PrintJson(Json{{"stack", from.stack},
                   {"step", stack.step},
                   {"files", std::move(files)},
                   {"bytes", bytes},
                   {"tensors", made.places.size()},
                   {"config", config.path},
                   {"config_written", !config.there}});
  } else {
    PrintText(absl::StrCat("exported '", from.stack, "' after ", HumanCount(stack.step),
                           " steps to ", list, " (", HumanBytes(bytes), ", ", made.places.size(),
                           " tensors of it the stack's)\n", config.path,
                           config.there ? " was there and is kept" : " written"));
  }
  return kOk;
}

}  // namespace

int ImportCheckpoint(const GlobalOptions& options, const ImportOptions& from,
                     const ConfigFlags& flags) {
  const absl::StatusOr<HfBertFiles> files = HfBertFiles::Open(from.path);
  if (!files.ok()) return FailBy(options, files.status());
  const absl::StatusOr<Import> import = PrepareImport(*files, from, flags);
  if (!import.ok()) return FailBy(options, import.status());
  return WithClient(options, [&](const client::Client& daemon) {
    absl::StatusOr<client::StackInfo> info = daemon.CreateStack(import->name, import->config);
    if (!info.ok()) return Fail(options, info.status());
    absl::Status status = Upload(daemon, import->name, import->matches);
    if (status.ok()) {
      info = daemon.GetStack(import->name);
      status = info.status();
    }
    if (!status.ok()) {
      const absl::Status deleted = daemon.DeleteStack(import->name);
      return Fail(
          options,
          absl::Status(status.code(), absl::StrCat(status.message(), "; the stack '", import->name,
                                                   deleted.ok() ? "' is deleted again"
                                                                : "' could not be deleted again: ",
                                                   deleted.message())));
    }
    if (options.json) {
      Json json = ToJson(*info);
      json["imported"] = {{"path", from.path},
                          {"prefix", import->prefix},
                          {"tensors", import->matches.size()},
                          {"bytes", import->bytes}};
      PrintJson(json);
    } else {
      PrintText(absl::StrCat(StackText(*info), "\n\nimported ", import->matches.size(),
                             " tensors (", HumanBytes(import->bytes), ") under ",
                             Quoted(import->prefix + "layer."), " from ", from.path));
    }
    return static_cast<int>(kOk);
  });
}

int ExportCheckpoint(const GlobalOptions& options, const ExportOptions& to) {
  std::optional<HfBertFiles> base;
  if (!to.base.empty()) {
    if (to.dtype) return FailUsage(options, "--dtype: with --base each tensor keeps its own");
    absl::StatusOr<HfBertFiles> opened = HfBertFiles::Open(to.base);
    if (!opened.ok()) return FailBy(options, opened.status());
    base = *std::move(opened);
  }
  return WithClient(options, [&](const client::Client& daemon) -> int {
    const absl::StatusOr<client::StackInfo> info = daemon.GetStack(to.stack);
    if (!info.ok()) return Fail(options, info.status());
    const client::StackConfig& config = info->config;
    if (config.pre_layer_norm || config.causal) {
      return Fail(options,
                  absl::FailedPreconditionError(absl::StrCat(
                      "stack '", to.stack, "' is ", config.pre_layer_norm ? "Pre-LN" : "causal",
                      "; hf-bert holds Post-LN encoders that see all tokens")));
    }
    const bool to_file = absl::EndsWith(to.path, ".safetensors") && !IsFolder(to.path);
    std::string folder = to.path;
    if (to_file) {
      const size_t slash = to.path.rfind('/');
      folder = slash == std::string::npos ? "." : to.path.substr(0, slash + 1);
    } else if (mkdir(folder.c_str(), 0777) != 0 && errno != EEXIST) {
      return Fail(options, absl::InternalError(
                               absl::StrCat("making '", folder, "': ", std::strerror(errno))));
    }
    while (folder.size() > 1 && folder.back() == '/') folder.pop_back();

    const absl::StatusOr<ConfigFile> config_file = PrepareConfigFile(folder, base, config);
    if (!config_file.ok()) return FailBy(options, config_file.status());
    const std::string file_path = to_file ? to.path : "";
    absl::StatusOr<Export> made = base ? CopyOfBase(*base, to, config, folder, file_path)
                                       : EncoderAlone(to, config, folder, file_path);
    if (!made.ok()) return FailBy(options, made.status());
    if (absl::Status status = Download(daemon, to.stack, &*made); !status.ok()) {
      return Fail(options, status);
    }
    // Tensors of two steps would make a model that never was.
    const absl::StatusOr<client::StackInfo> after = daemon.GetStack(to.stack);
    if (!after.ok()) return Fail(options, after.status());
    if (after->step != info->step) {
      return Fail(options, absl::AbortedError(absl::StrCat(
                               "stack '", to.stack, "' was trained while it was read, from step ",
                               info->step, " to ", after->step, "; nothing is written")));
    }
    if (!config_file->there) {
      absl::StatusOr<NewFile> file = NewFile::Create(config_file->path);
      if (!file.ok()) return Fail(options, file.status());
      const std::string& content = config_file->content;
      absl::Status status = file->WriteAt(0, content.data(), content.size());
      if (!status.ok()) return Fail(options, status);
      made->targets.push_back({.file = *std::move(file), .bytes = content.size()});
    }
    for (Target& target : made->targets) {
      if (absl::Status status = target.file.Commit(); !status.ok()) return Fail(options, status);
    }
    if (!config_file->there) made->targets.pop_back();  // printed apart
    return Print(options, to, *info, *made, *config_file);
  });
}

}  // namespace lamina::cli
