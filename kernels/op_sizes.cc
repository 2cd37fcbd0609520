// The choice of the sizes; apart from the choice of the backend, so that a program that only plans
// has no CUDA backend in it.
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "cpu/cpu_backend.h"
#include "cuda/cuda_sizes.h"
#include "lamina/kernels/backend.h"

namespace lamina {

absl::StatusOr<std::unique_ptr<const OpSizes>> OpSizes::Of(const std::string& kind, int threads) {
  constexpr int kHopperMultiprocessors = 132;
  if (kind == "cpu") return CreateCpuSizes(threads);
  if (kind == "cuda") return CudaOpSizes(kHopperMultiprocessors);
  return absl::InvalidArgumentError(
      absl::StrCat("kind is \"", kind, "\"; it must be \"cpu\" or \"cuda\""));
}

}  // namespace lamina
