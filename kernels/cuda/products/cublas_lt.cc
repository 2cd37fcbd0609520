#include "products/cublas_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace lamina::cuda {
namespace {

constexpr const char* kLibrary = "libcublasLt.so.13";
static_assert(CUBLAS_VER_MAJOR == 13, "the library's name carries its major version");

// One pointer a function, of the function's own type.
struct Functions {
  decltype(&::cublasLtCreate) Create;
  decltype(&::cublasLtDestroy) Destroy;
  decltype(&::cublasLtGetStatusName) GetStatusName;
  decltype(&::cublasLtMatmul) Matmul;
  decltype(&::cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic;
  decltype(&::cublasLtMatmulDescCreate) MatmulDescCreate;
  decltype(&::cublasLtMatmulDescDestroy) MatmulDescDestroy;
  decltype(&::cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute;
  decltype(&::cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate;
  decltype(&::cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy;
  decltype(&::cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute;
  decltype(&::cublasLtMatrixLayoutCreate) MatrixLayoutCreate;
  decltype(&::cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy;
};
Functions functions{};

absl::Status Load() {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  const std::string first_failure = library != nullptr ? "" : dlerror();
  if (library == nullptr)
    library =
        dlopen(absl::StrCat(LAMINA_CUDA_LIBRARIES, "/", kLibrary).c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return absl::FailedPreconditionError(
        absl::StrCat("cuda: can't load cuBLAS: ", first_failure,
                     "; install CUDA 13's libcublas, or name its folder in LD_LIBRARY_PATH"));
  absl::Status status;
  const auto find = [&](auto& function, const char* name) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr)
      status.Update(absl::FailedPreconditionError(
          absl::StrCat("cuda: ", kLibrary, " has no ", name, "; it is too old or too new")));
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find(functions.Create, "cublasLtCreate");
  find(functions.Destroy, "cublasLtDestroy");
  find(functions.GetStatusName, "cublasLtGetStatusName");
  find(functions.Matmul, "cublasLtMatmul");
  find(functions.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(functions.MatmulDescCreate, "cublasLtMatmulDescCreate");
  find(functions.MatmulDescDestroy, "cublasLtMatmulDescDestroy");
  find(functions.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
  find(functions.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
  find(functions.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
  find(functions.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
  find(functions.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
  find(functions.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
  return status;
}

}  // namespace

absl::Status LoadCublasLt() {
  static const absl::Status* const kLoaded = new absl::Status(Load());
  return *kLoaded;
}

}  // namespace lamina::cuda

// --- cublasLt.h's functions ---

using lamina::cuda::functions;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return functions.Create(handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return functions.Destroy(handle); }
const char* cublasLtGetStatusName(cublasStatus_t status) { return functions.GetStatusName(status); }

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  return functions.Matmul(handle, desc, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d,
                          d_layout, algo, workspace, workspace_bytes, stream);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a_layout,
    cublasLtMatrixLayout_t b_layout, cublasLtMatrixLayout_t c_layout,
    cublasLtMatrixLayout_t d_layout, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t results[], int* found) {
  return functions.MatmulAlgoGetHeuristic(handle, desc, a_layout, b_layout, c_layout, d_layout,
                                          preference, wanted, results, found);
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  return functions.MatmulDescCreate(desc, compute, scale);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  return functions.MatmulDescDestroy(desc);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  return functions.MatmulDescSetAttribute(desc, attribute, value, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return functions.MatmulPreferenceCreate(preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return functions.MatmulPreferenceDestroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  return functions.MatmulPreferenceSetAttribute(preference, attribute, value, bytes);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t stride) {
  return functions.MatrixLayoutCreate(layout, type, rows, cols, stride);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return functions.MatrixLayoutDestroy(layout);
}

}  // extern "C"
