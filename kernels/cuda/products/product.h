// Matrix products through cuBLASLt, with the plan of each (descriptors, algorithm) kept, so that a
// repeated step creates nothing. Numbers of tokens that are near each other share an algorithm, so
// that a step with another one waits for no choice.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina::cuda {

// What a transformer layer needs of a product. All matrices are dense and row-major.
enum class ProductKind : uint8_t {
  kForward = 1,     // d[m, n]  = a[m, k] b[n, k]^T + bias[n]
  kInputGrad = 2,   // d[m, n]  = a[m, k] b[k, n] (+ d where accumulate)
  kWeightGrad = 3,  // d[m, n] += a[k, m]^T b[k, n], d in fp32
};

struct ProductArgs {
  ProductKind kind = ProductKind::kForward;
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kF32;  // of a and b; of bias and d too, but for kWeightGrad
  const void* a = nullptr;
  const void* b = nullptr;
  const void* bias = nullptr;  // kForward only; null: none
  void* d = nullptr;
  bool accumulate = false;  // kInputGrad only
  Workspace workspace;
};

// Results are deterministic: algorithms whose split reductions run in place are excluded, except
// from weight gradients in an unordered workspace. fp32 operands are multiplied in fp32, never
// TF32. One thread at a time.
class Products {
 public:
  static absl::StatusOr<std::unique_ptr<Products>> Create();
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // Enqueues the product on `stream`. INTERNAL with cuBLAS's or CUDA's error.
  absl::Status Run(const ProductArgs& args, cudaStream_t stream);

 private:
  // Everything that the choice of an algorithm depends on.
  struct Key {
    ProductKind kind;
    DType dtype;
    bool bias;        // fused as an epilogue
    bool accumulate;  // d holds what to add to
    bool unordered;   // split reductions may run in place
    int64_t m, n, k;
    uint32_t align_a, align_b, align_d;  // bytes, powers of two up to 256
    size_t workspace_bytes;
    bool operator==(const Key& o) const {
      return kind == o.kind && dtype == o.dtype && bias == o.bias && accumulate == o.accumulate &&
             unordered == o.unordered && m == o.m && n == o.n && k == o.k && align_a == o.align_a &&
             align_b == o.align_b && align_d == o.align_d && workspace_bytes == o.workspace_bytes;
    }
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.kind, key.dtype, key.bias, key.accumulate, key.unordered,
                        key.m, key.n, key.k, key.align_a, key.align_b, key.align_d,
                        key.workspace_bytes);
    }
  };
  struct Destroy {
    void operator()(cublasLtMatmulDesc_t desc) const { cublasLtMatmulDescDestroy(desc); }
    void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
    void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
  };
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;
  using Desc = Owned<cublasLtMatmulDesc_t>;
  using Layout = Owned<cublasLtMatrixLayout_t>;
  using Preference = Owned<cublasLtMatmulPreference_t>;

  struct Choice {
    cublasLtMatmulAlgo_t algorithm{};
    bool supported = false;  // false: cuBLASLt has no algorithm for it, and product_any does it
  };

  // cuBLAS thinks column-major, where a row-major matrix is its own transpose; so its A is our b,
  // its B is our a, and its D [n, m] is our d.
  struct Plan {
    Desc desc;
    Layout first, second, result;
    Choice choice;
    bool shared = false;  // the choice is that of somewhat more tokens
  };

  explicit Products(cublasLtHandle_t handle) : handle_(handle) {}
  absl::StatusOr<Plan*> FindOrCreate(const Key& key, const void* bias);
  absl::StatusOr<Plan> Create(const Key& key, const void* bias);
  // A plan without an algorithm.
  absl::StatusOr<Plan> SetUp(const Key& key, const void* bias);
  // The algorithm for such a plan: the place where candidates can be timed instead.
  absl::StatusOr<Choice> Choose(const Key& key, const Plan& plan);
  absl::Status RunAny(const ProductArgs& args, cudaStream_t stream);

  cublasLtHandle_t handle_;
  absl::flat_hash_map<Key, std::unique_ptr<Plan>> plans_;
  absl::flat_hash_map<Key, Choice> choices_;  // for rounded numbers of tokens
};

}  // namespace lamina::cuda
