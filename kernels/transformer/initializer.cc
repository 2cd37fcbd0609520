#include "initializer.h"

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "lamina/kernels/philox.h"

namespace lamina {
namespace {

// Keeps these draws apart from the dropout masks of the same seed.
constexpr uint32_t kInitKey = 0x494E4954u;  // "INIT"
// Below this many elements, starting threads costs more than they save.
constexpr int64_t kElementsPerThread = 1 << 18;

// Elements [begin, end); begin is a multiple of 4. Each Philox call gives two Box-Muller pairs.
void FillRange(uint64_t seed, uint64_t parameter, double deviation, float* out, int64_t begin,
               int64_t end) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  constexpr double kStep = 1.0 / 4294967296.0;  // 2^-32
  for (int64_t first = begin; first < end; first += 4) {
    const uint64_t call = static_cast<uint64_t>(first) / 4;
    const uint32_t counter[4] = {static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32),
                                 static_cast<uint32_t>(parameter),
                                 static_cast<uint32_t>(parameter >> 32)};
    const Philox4 bits = Philox4x32<10>(counter, static_cast<uint32_t>(seed),
                                        static_cast<uint32_t>(seed >> 32) ^ kInitKey);
    double normal[4];
    for (int pair = 0; pair < 4; pair += 2) {
      const double radius = deviation * std::sqrt(-2.0 * std::log((bits.word[pair] + 0.5) * kStep));
      const double angle = kTwoPi * ((bits.word[pair + 1] + 0.5) * kStep);
      normal[pair] = radius * std::cos(angle);
      normal[pair + 1] = radius * std::sin(angle);
    }
    const int64_t count = std::min<int64_t>(4, end - first);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(normal[i]);
  }
}

}  // namespace

void FillNormal(uint64_t seed, uint64_t parameter, double deviation, float* out, int64_t count) {
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t workers =
      std::clamp<int64_t>(count / kElementsPerThread, 1, std::min<int64_t>(cores, 32));
  const int64_t share = ((count + workers - 1) / workers + 3) / 4 * 4;
  std::vector<std::thread> threads;
  for (int64_t begin = share; begin < count; begin += share)
    threads.emplace_back(FillRange, seed, parameter, deviation, out, begin,
                         std::min(begin + share, count));
  FillRange(seed, parameter, deviation, out, 0, std::min(share, count));
  for (std::thread& thread : threads) thread.join();
}

double InitialDeviation(const StackConfig& config, ParameterRole role) {
  if (role == ParameterRole::kOutputMatrix && config.adjust_init_range)
    return config.initializer_range /
           std::sqrt(2.0 * static_cast<double>(config.num_hidden_layers));
  return config.initializer_range;
}

void FillInitial(const StackConfig& config, const ParameterLayout& layout, int64_t parameter,
                 float* out) {
  const int kind = static_cast<int>(parameter % kParametersPerLayer);
  const ParameterRole role = kParameterKinds[kind].role;
  const int64_t count = layout.ShapeOf(kind).elements();
  if (IsMatrix(role)) {
    FillNormal(static_cast<uint64_t>(config.seed), static_cast<uint64_t>(parameter),
               InitialDeviation(config, role), out, count);
  } else {
    std::fill_n(out, count, role == ParameterRole::kGamma ? 1.0f : 0.0f);
  }
}

}  // namespace lamina
