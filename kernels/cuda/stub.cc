// What a build without CUDA has in place of the backend.
#include "cuda_backend.h"

namespace lamina {

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int /*ordinal*/) {
  return absl::UnimplementedError("built without CUDA; configure with -DLAMINA_CUDA=ON");
}

}  // namespace lamina
