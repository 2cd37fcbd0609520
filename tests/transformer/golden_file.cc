#include "golden_file.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "nlohmann/json.hpp"

namespace lamina::testing {

std::string GoldenFolder() {
  namespace fs = std::filesystem;
  if (const char* folder = std::getenv("LAMINA_GOLDEN_DIR"); folder != nullptr) return folder;
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path();
  std::string tried;
  for (const fs::path& folder : {bin / "golden", bin / "../golden", bin / "../tests/golden",
                                 bin / "../../../tests/golden"}) {
    if (fs::exists(folder / "weights-small.safetensors")) return folder.lexically_normal();
    tried.append(" ").append(folder.lexically_normal().string());
  }
  throw std::runtime_error("no golden tensors; set LAMINA_GOLDEN_DIR. Tried:" + tried);
}

GoldenFile ReadGolden(const std::string& name) {
  const std::string path = GoldenFolder() + "/" + name + ".safetensors";
  std::ifstream in(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes)) throw std::runtime_error("cannot read " + path);
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const size_t data = sizeof(header_bytes) + header_bytes;
  if (data > bytes.size()) throw std::runtime_error(path + " is cut short");
  const auto header = nlohmann::json::parse(bytes.substr(sizeof(header_bytes), header_bytes));

  GoldenFile file;
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") {
      file.metadata = entry.get<std::map<std::string, std::string>>();
      continue;
    }
    GoldenTensor tensor;
    const auto dims = entry.at("shape").get<std::vector<int64_t>>();
    switch (dims.size()) {
      case 1:
        tensor.shape = {dims[0]};
        break;
      case 2:
        tensor.shape = {dims[0], dims[1]};
        break;
      case 3:
        tensor.shape = {dims[0], dims[1], dims[2]};
        break;
      default:
        throw std::runtime_error(path + ": rank of " + key);
    }
    const size_t begin = data + entry.at("data_offsets").at(0).get<size_t>();
    const size_t end = data + entry.at("data_offsets").at(1).get<size_t>();
    const auto count = static_cast<size_t>(tensor.shape.elements());
    if (begin > end || end > bytes.size() || end - begin != 4 * count)
      throw std::runtime_error(path + ": bounds of " + key);
    if (entry.at("dtype") == "F32") {
      tensor.floats.resize(count);
      std::memcpy(tensor.floats.data(), bytes.data() + begin, end - begin);
    } else if (entry.at("dtype") == "I32") {
      tensor.ints.resize(count);
      std::memcpy(tensor.ints.data(), bytes.data() + begin, end - begin);
    } else {
      throw std::runtime_error(path + ": dtype of " + key);
    }
    file.tensors[key] = std::move(tensor);
  }
  return file;
}

}  // namespace lamina::testing
