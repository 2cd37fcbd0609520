// Encoders as Hugging Face's BERT keeps them: names, config.json, files.
//
// A layer's tensors are called PREFIX + "layer.<i>." + name, with PREFIX such as "encoder." or
// "bert.encoder."; docs/checkpoints.md has the table of names.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/safetensors.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

// One tensor of a layer.
struct HfBertTensor {
  std::string name;       // "attention.self.query.weight"
  std::string old_name;   // "attention.output.LayerNorm.gamma"; empty: it never had another
  std::string parameter;  // "attn_qw"
  client::Shape shape;    // [out, in] or [out]
};
// All of a layer's, in the model's order.
std::vector<HfBertTensor> HfBertLayer(const client::StackConfig& config);

// The stack's fields that a config.json tells, as ConfigFromJson takes them. batch_size is 8 and
// max_seq_length the model's positions; what BertConfig has a default for may be missing.
// INVALID_ARGUMENT: a field that is missing, of the wrong type or out of range, or a model whose
// encoder is not BERT's.
absl::StatusOr<nlohmann::json> StackFieldsFromHfBert(const nlohmann::json& config);
// The encoder's part of a config.json.
nlohmann::json HfBertFromStack(const client::StackConfig& config);
// INVALID_ARGUMENT, listing the fields, where the config.json is of another encoder than the stack.
absl::Status CheckSameEncoder(const nlohmann::json& hf_config, const client::StackConfig& config);

// A model's files: one, or the shards that an index names.
class HfBertFiles {
 public:
  // `path`: a folder with model.safetensors, with model.safetensors.index.json or with one other
  // .safetensors file; or such a file. INVALID_ARGUMENT, naming the file: what cannot be read or
  // is damaged; an index that names other folders or does not fit its shards.
  static absl::StatusOr<HfBertFiles> Open(const std::string& path);

  struct Found {
    const SafetensorsFile* file;
    const SafetensorsTensor* tensor;
  };
  const std::vector<SafetensorsFile>& files() const { return files_; }
  const std::map<std::string, Found>& tensors() const { return tensors_; }  // of all files
  const std::string& index_path() const { return index_path_; }             // empty: no index
  const std::string& config_path() const { return config_path_; }  // beside; may not be there

 private:
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Found> tensors_;
  std::string index_path_, config_path_;
};

// What stands before "layer.<i>." in the names: `given` where it is not empty and some name begins
// so, else the one prefix that ends in "encoder.". INVALID_ARGUMENT: none, or several (lists them).
absl::StatusOr<std::string> HfBertPrefix(const HfBertFiles& files, const std::string& given);

struct HfBertMatch {
  std::string parameter;  // "layers.3.attn_qw"
  client::Shape shape;
  HfBertFiles::Found found;
};
// The tensor of each of the stack's parameters. INVALID_ARGUMENT lists every tensor that is
// missing, that is more than the layers have, that has another shape or that is not of floating
// elements.
absl::StatusOr<std::vector<HfBertMatch>> MatchHfBert(const HfBertFiles& files,
                                                     const std::string& prefix,
                                                     const client::StackConfig& config);

// F32, F16, BF16: the elements that MatchHfBert lets through.
std::optional<client::DType> FloatingType(const SafetensorsTensor& tensor);

// Whether there is a folder of that path.
bool IsFolder(const std::string& path);

}  // namespace lamina::cli
