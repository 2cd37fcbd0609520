#include "cli/hf_bert.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "cli/config_json.h"
#include "cli/read_file.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using Json = nlohmann::json;

constexpr const char* kModelFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr const char* kConfigFile = "config.json";
constexpr absl::string_view kEncoder = "encoder.";
constexpr absl::string_view kLayer = "layer.";
constexpr int64_t kDefaultBatchSize = 8;
constexpr int64_t kDefaultPositions = 512;
constexpr int64_t kMaxSeqLength = 8192;  // StackConfig's
constexpr int64_t kMaxLayers = 1024;     // StackConfig's
// Models whose encoder layer is BERT's to the letter; they differ before it and after it.
constexpr std::array<absl::string_view, 7> kModelTypes = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie", "data2vec-text"};

// A field of a config.json; nullptr where it is missing or null.
const Json* FieldOf(const Json& config, const char* key) {
  const auto found = config.find(key);
  return found == config.end() || found->is_null() ? nullptr : &*found;
}

absl::Status WrongField(const char* key, const Json& value, absl::string_view expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("'", key, "' is ", value.dump(-1, ' ', true, Json::error_handler_t::replace),
                   "; expected ", expected));
}

// Reads integers and numbers one after another and keeps the first error.
class FieldReader {
 public:
  explicit FieldReader(const Json& config) : config_(config) {}
  const absl::Status& status() const { return status_; }

  int64_t Integer(const char* key, int64_t most, std::optional<int64_t> absent = std::nullopt) {
    const Json* value = Find(key, absent.has_value());
    if (value == nullptr) return absent.value_or(0);
    if (!value->is_number_integer() || *value < 1 || *value > most) {
      Fail(WrongField(key, *value, absl::StrCat("an integer in [1, ", most, "]")));
      return 0;
    }
    return value->get<int64_t>();
  }
  double Number(const char* key, double absent) {
    const Json* value = Find(key, true);
    if (value == nullptr) return absent;
    if (!value->is_number()) Fail(WrongField(key, *value, "a number"));
    return value->is_number() ? value->get<double>() : absent;
  }
  bool Bool(const char* key, bool absent) {
    const Json* value = Find(key, true);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) Fail(WrongField(key, *value, "true or false"));
    return value->is_boolean() ? value->get<bool>() : absent;
  }
  std::string String(const char* key, const char* absent) {
    const Json* value = Find(key, true);
    if (value == nullptr) return absent;
    if (!value->is_string()) Fail(WrongField(key, *value, "a string"));
    return value->is_string() ? value->get<std::string>() : absent;
  }
  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

 private:
  const Json* Find(const char* key, bool optional) {
    const Json* value = FieldOf(config_, key);
    if (value == nullptr && !optional) {
      Fail(absl::InvalidArgumentError(absl::StrCat("'", key, "' is missing")));
    }
    return value;
  }
  const Json& config_;
  absl::Status status_;
};

bool Exists(const std::string& path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0;
}

std::string FolderOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// The one file in a folder that holds the tensors, or their index.
absl::StatusOr<std::string> ModelFileIn(const std::string& folder) {
  for (const char* name : {kModelFile, kIndexFile}) {
    if (std::string path = absl::StrCat(folder, "/", name); Exists(path)) return path;
  }
  std::set<std::string> others;
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder.c_str()), &closedir);
  while (const dirent* entry = entries == nullptr ? nullptr : readdir(entries.get())) {
    if (absl::EndsWith(entry->d_name, ".safetensors")) others.insert(entry->d_name);
  }
  if (others.size() == 1) return absl::StrCat(folder, "/", *others.begin());
  return absl::InvalidArgumentError(absl::StrCat(
      "'", folder, "': has no ", kModelFile, ", no ", kIndexFile,
      others.empty()
          ? " and no other .safetensors file"
          : absl::StrCat(" and several others, name one: ", absl::StrJoin(others, ", "))));
}

// An index's map from tensors to the shards' names.
absl::StatusOr<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  const auto bad = [&path](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "': ", what...));
  };
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxSafetensorsHeader);
  if (!text.ok()) return text.status();
  const Json json = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return bad("is not a JSON object");
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) {
    return bad("has no 'weight_map' from tensors to files");
  }
  std::map<std::string, std::string> files;
  for (const auto& [name, file] : map->items()) {
    const std::string text_of = file.is_string() ? file.get<std::string>() : "";
    // A name beside the index and nothing else: an index must not lead out of its folder.
    if (!absl::EndsWith(text_of, ".safetensors") || text_of.find('/') != std::string::npos) {
      return bad("tensor ", Quoted(name), " is in ", file.is_string() ? Quoted(text_of) : "no file",
                 "; expected the name of a .safetensors file beside it");
    }
    files.emplace(name, text_of);
  }
  return files;
}

}  // namespace

bool IsFolder(const std::string& path) {
  struct stat status {};
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::vector<HfBertTensor> HfBertLayer(const client::StackConfig& config) {
  const int64_t h = config.hidden_size;
  const int64_t i = config.intermediate_size == -1 ? 4 * h : config.intermediate_size;
  std::vector<HfBertTensor> tensors;
  const auto linear = [&tensors](const std::string& name, const std::string& weight,
                                 const std::string& bias, int64_t out, int64_t in) {
    tensors.push_back({name + ".weight", "", weight, {out, in}});
    tensors.push_back({name + ".bias", "", bias, {out}});
  };
  const auto norm = [&](const std::string& name, const std::string& weight,
                        const std::string& bias) {
    tensors.push_back({name + ".weight", name + ".gamma", weight, {h}});
    tensors.push_back({name + ".bias", name + ".beta", bias, {h}});
  };
  linear("attention.self.query", "attn_qw", "attn_qb", h, h);
  linear("attention.self.key", "attn_kw", "attn_kb", h, h);
  linear("attention.self.value", "attn_vw", "attn_vb", h, h);
  linear("attention.output.dense", "attn_ow", "attn_ob", h, h);
  norm("attention.output.LayerNorm", "attn_nw", "attn_nb");
  linear("intermediate.dense", "inter_w", "inter_b", i, h);
  linear("output.dense", "output_w", "output_b", h, i);
  norm("output.LayerNorm", "norm_w", "norm_b");
  return tensors;
}

absl::StatusOr<Json> StackFieldsFromHfBert(const Json& config) {
  FieldReader read(config);
  if (const std::string type = read.String("model_type", "bert");
      std::find(kModelTypes.begin(), kModelTypes.end(), type) == kModelTypes.end()) {
    read.Fail(WrongField(
        "model_type", type,
        absl::StrCat("a model with BERT's encoder: ", absl::StrJoin(kModelTypes, ", "))));
  }
  if (const std::string kind = read.String("position_embedding_type", "absolute");
      kind != "absolute") {
    read.Fail(WrongField("position_embedding_type", kind,
                         "\"absolute\": attention with relative positions is another function"));
  }
  const std::string activation = read.String("hidden_act", "gelu");
  const bool tanh = activation == "gelu_new" || activation == "gelu_pytorch_tanh";
  if (activation != "gelu" && !tanh) {
    read.Fail(WrongField("hidden_act", activation,
                         "\"gelu\" (erf), \"gelu_new\" or \"gelu_pytorch_tanh\" (tanh)"));
  }
  if (read.Bool("add_cross_attention", false)) {
    read.Fail(WrongField("add_cross_attention", true, "false: the layer has self-attention alone"));
  }
  constexpr int64_t kMost = int64_t{1} << 31;  // far above what the daemon takes, and it says so
  Json fields = {
      {"hidden_size", read.Integer("hidden_size", kMost)},
      {"heads", read.Integer("num_attention_heads", kMost)},
      {"num_hidden_layers", read.Integer("num_hidden_layers", kMaxLayers)},
      {"intermediate_size", read.Integer("intermediate_size", kMost)},
      {"layer_norm_eps", read.Number("layer_norm_eps", 1e-12)},
      {"attn_dropout_ratio", read.Number("attention_probs_dropout_prob", 0.1)},
      {"hidden_dropout_ratio", read.Number("hidden_dropout_prob", 0.1)},
      {"initializer_range", read.Number("initializer_range", 0.02)},
      {"gelu", tanh ? "tanh" : "erf"},
      {"pre_layer_norm", false},
      {"batch_size", kDefaultBatchSize},
      {"max_seq_length",
       std::min(read.Integer("max_position_embeddings", kMost, kDefaultPositions), kMaxSeqLength)}};
  if (read.Bool("is_decoder", false)) fields["causal"] = true;
  if (!read.status().ok()) return read.status();
  return fields;
}

Json HfBertFromStack(const client::StackConfig& config) {
  return {{"architectures", {"BertModel"}},
          {"model_type", "bert"},
          {"hidden_size", config.hidden_size},
          {"num_attention_heads", config.heads},
          {"num_hidden_layers", config.num_hidden_layers},
          {"intermediate_size", config.intermediate_size},
          {"layer_norm_eps", config.layer_norm_eps},
          {"hidden_act", config.gelu == client::Gelu::kTanh ? "gelu_new" : "gelu"},
          {"attention_probs_dropout_prob", config.attn_dropout_ratio},
          {"hidden_dropout_prob", config.hidden_dropout_ratio},
          {"initializer_range", config.initializer_range},
          {"max_position_embeddings", config.max_seq_length},
          {"position_embedding_type", "absolute"}};
}

absl::Status CheckSameEncoder(const Json& hf_config, const client::StackConfig& config) {
  const absl::StatusOr<Json> fields = StackFieldsFromHfBert(hf_config);
  if (!fields.ok()) return fields.status();
  const Json own = ToJson(config);
  std::vector<std::string> differences;
  for (const char* key : {"hidden_size", "heads", "num_hidden_layers", "intermediate_size",
                          "layer_norm_eps", "gelu"}) {
    if ((*fields)[key] != own[key]) {
      differences.push_back(
          absl::StrCat(key, " ", (*fields)[key].dump(), ", the stack's is ", own[key].dump()));
    }
  }
  if (differences.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("is of another encoder: ", absl::StrJoin(differences, "; ")));
}

absl::StatusOr<HfBertFiles> HfBertFiles::Open(const std::string& path) {
  std::string file = path;
  while (file.size() > 1 && file.back() == '/') file.pop_back();
  if (IsFolder(file)) {
    absl::StatusOr<std::string> found = ModelFileIn(file);
    if (!found.ok()) return found.status();
    file = *std::move(found);
  }
  HfBertFiles model;
  const std::string folder = FolderOf(file);
  model.config_path_ = absl::StrCat(folder, "/", kConfigFile);
  std::map<std::string, std::string> where;  // of an index: tensor -> file
  std::set<std::string> paths = {file};
  if (absl::EndsWith(file, ".json")) {
    absl::StatusOr<std::map<std::string, std::string>> index = ReadIndex(file);
    if (!index.ok()) return index.status();
    where = *std::move(index);
    model.index_path_ = file;
    paths.clear();
    for (const auto& [tensor, name] : where) paths.insert(absl::StrCat(folder, "/", name));
  }
  for (const std::string& one : paths) {
    absl::StatusOr<SafetensorsFile> opened = SafetensorsFile::Open(one);
    if (!opened.ok()) return opened.status();
    model.files_.push_back(*std::move(opened));
  }
  for (const SafetensorsFile& opened : model.files_) {
    for (const auto& [name, tensor] : opened.header().tensors) {
      const auto [at, added] = model.tensors_.emplace(name, Found{&opened, &tensor});
      if (added) continue;
      return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), " is in '",
                                                     at->second.file->path(), "' and in '",
                                                     opened.path(), "'"));
    }
  }
  for (const auto& [name, shard] : where) {
    const auto found = model.tensors_.find(name);
    if (found != model.tensors_.end() &&
        found->second.file->path() == absl::StrCat(folder, "/", shard)) {
      continue;
    }
    return absl::InvalidArgumentError(absl::StrCat("'", file, "': tensor ", Quoted(name),
                                                   " is not in '", shard, "', as it says"));
  }
  return model;
}

absl::StatusOr<std::string> HfBertPrefix(const HfBertFiles& files, const std::string& given) {
  const std::string where =
      files.index_path().empty() ? files.files().front().path() : files.index_path();
  std::set<std::string> prefixes;
  for (const auto& [name, found] : files.tensors()) {
    if (!given.empty() && absl::StartsWith(name, absl::StrCat(given, kLayer))) return given;
    const size_t at = name.find(absl::StrCat(kEncoder, kLayer));
    if (at == std::string::npos || (at > 0 && name[at - 1] != '.')) continue;
    prefixes.insert(name.substr(0, at + kEncoder.size()));
  }
  std::vector<std::string> quoted;
  for (const std::string& prefix : prefixes) quoted.push_back(Quoted(prefix));
  const std::string list = absl::StrJoin(quoted, ", ");
  if (!given.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", where, "': no tensor's name begins with ", Quoted(absl::StrCat(given, kLayer)),
        quoted.empty() ? "" : absl::StrCat("; prefixes that there are: ", list)));
  }
  if (prefixes.size() == 1) return *prefixes.begin();
  return absl::InvalidArgumentError(absl::StrCat(
      "'", where, "': ",
      prefixes.empty() ? "has no tensor of an encoder, such as "
                         "'bert.encoder.layer.0.attention.self.query.weight'"
                       : absl::StrCat("has several encoders, choose with --prefix: ", list)));
}

std::optional<client::DType> FloatingType(const SafetensorsTensor& tensor) {
  for (const client::DType dtype :
       {client::DType::kFloat32, client::DType::kFloat16, client::DType::kBFloat16}) {
    if (tensor.dtype == SafetensorsName(dtype)) return dtype;
  }
  return std::nullopt;
}

absl::StatusOr<std::vector<HfBertMatch>> MatchHfBert(const HfBertFiles& files,
                                                     const std::string& prefix,
                                                     const client::StackConfig& config) {
  if (config.num_hidden_layers < 1 || config.num_hidden_layers > kMaxLayers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "num_hidden_layers is ", config.num_hidden_layers, "; expected 1 to ", kMaxLayers));
  }
  std::vector<HfBertMatch> matches;
  std::vector<std::string> wrong;
  std::set<std::string> known;
  const std::string layers = absl::StrCat(prefix, kLayer);
  const std::vector<HfBertTensor> layer = HfBertLayer(config);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    for (const HfBertTensor& tensor : layer) {
      std::string name = absl::StrCat(layers, i, ".", tensor.name);
      auto found = files.tensors().find(name);
      if (!tensor.old_name.empty()) {
        const std::string old_name = absl::StrCat(layers, i, ".", tensor.old_name);
        const auto old_found = files.tensors().find(old_name);
        // With both names there, the old one is left over and listed as one too many.
        if (found == files.tensors().end() && old_found != files.tensors().end()) {
          name = old_name;
          found = old_found;
        }
      }
      known.insert(name);
      if (found == files.tensors().end()) {
        wrong.push_back(
            absl::StrCat("missing: ", Quoted(name), " ", client::ToString(tensor.shape)));
        continue;
      }
      const SafetensorsTensor& there = *found->second.tensor;
      if (there.shape != tensor.shape) {
        wrong.push_back(absl::StrCat("wrong shape: ", Quoted(name), " is ",
                                     client::ToString(there.shape), ", expected ",
                                     client::ToString(tensor.shape)));
      } else if (!FloatingType(there)) {
        wrong.push_back(absl::StrCat("wrong elements: ", Quoted(name), " is ", there.dtype,
                                     ", expected F32, F16 or BF16"));
      } else {
        matches.push_back({.parameter = absl::StrCat("layers.", i, ".", tensor.parameter),
                           .shape = tensor.shape,
                           .found = found->second});
      }
    }
  }
  for (auto at = files.tensors().lower_bound(layers);
       at != files.tensors().end() && absl::StartsWith(at->first, layers); ++at) {
    if (known.contains(at->first)) continue;
    wrong.push_back(absl::StrCat("not of these layers: ", Quoted(at->first), " ",
                                 client::ToString(at->second.tensor->shape)));
  }
  if (wrong.empty()) return matches;
  return absl::InvalidArgumentError(absl::StrCat(
      wrong.size(), wrong.size() == 1 ? " tensor does" : " tensors do", " not fit ",
      config.num_hidden_layers, " layers of hidden size ", config.hidden_size,
      " and intermediate size ",
      config.intermediate_size == -1 ? 4 * config.hidden_size : config.intermediate_size, ":\n  ",
      absl::StrJoin(wrong, "\n  ")));
}

}  // namespace lamina::cli
