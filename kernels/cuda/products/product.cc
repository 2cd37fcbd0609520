#include "products/product.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "elementwise/bias.cuh"
#include "kernel_limits.h"
#include "products/cublas_lt.h"
#include "products/product_any.cuh"

namespace lamina::cuda {
namespace {

// Far more shapes than a stack meets; a client that varies them without end must not grow the map
// without end.
constexpr size_t kMaxPlans = 4096;

absl::Status Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuda: ", what, ": ", cublasLtGetStatusName(status)));
}

absl::Status Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cuda: ", what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
}

cudaDataType_t CudaType(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// The largest power of two up to 256 that divides the address.
uint32_t Alignment(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256u;
  return static_cast<uint32_t>(address & (~address + 1));
}

// Up to how many tokens share an algorithm with `tokens`: the next multiple of a 32nd of the power
// of two below, and of 8. To choose one takes longer than to launch it, and packed batches, which
// bring another number of tokens with each step, would choose one for each of a layer's products.
int64_t RoundedTokens(int64_t tokens) {
  int64_t step = 8;
  while (step * 64 < tokens) step *= 2;
  return (tokens + step - 1) / step * step;
}

// How cuBLAS sees the operands of each kind.
struct Transposes {
  cublasOperation_t first, second;
};
Transposes TransposesOf(ProductKind kind) {
  switch (kind) {
    case ProductKind::kForward:
      return {CUBLAS_OP_T, CUBLAS_OP_N};
    case ProductKind::kInputGrad:
      return {CUBLAS_OP_N, CUBLAS_OP_N};
    case ProductKind::kWeightGrad:
      break;
  }
  return {CUBLAS_OP_N, CUBLAS_OP_T};
}

std::string Describe(const ProductArgs& a) {
  const char* kind = a.kind == ProductKind::kForward     ? "forward"
                     : a.kind == ProductKind::kInputGrad ? "input gradient"
                                                         : "weight gradient";
  return absl::StrCat(kind, " product m ", a.m, ", n ", a.n, ", k ", a.k, ", ", Name(a.dtype));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Products>> Products::Create() {
  if (absl::Status status = LoadCublasLt(); !status.ok()) return status;
  cublasLtHandle_t handle = nullptr;
  if (absl::Status status = Check(cublasLtCreate(&handle), "cublasLtCreate"); !status.ok()) {
    return status;
  }
  return std::unique_ptr<Products>(new Products(handle));
}

Products::~Products() {
  plans_.clear();
  cublasLtDestroy(handle_);
}

absl::StatusOr<Products::Plan> Products::SetUp(const Key& key, const void* bias) {
  Plan plan;
  const Transposes transposes = TransposesOf(key.kind);
  const cudaDataType_t type = CudaType(key.dtype);
  const cudaDataType_t result_type =
      key.kind == ProductKind::kWeightGrad ? CUDA_R_32F : CudaType(key.dtype);

  cublasLtMatmulDesc_t desc = nullptr;
  absl::Status status =
      Check(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product descriptor");
  if (!status.ok()) return status;
  plan.desc.reset(desc);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    if (status.ok()) {
      status.Update(Check(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value)),
                          "product descriptor attribute"));
    }
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, transposes.first);
  set(CUBLASLT_MATMUL_DESC_TRANSB, transposes.second);
  if (key.bias) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, cublasLtEpilogue_t{CUBLASLT_EPILOGUE_BIAS});
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  if (!status.ok()) return status;

  // Column-major [rows, cols] as stored, i.e. before the transposition.
  const auto layout = [&](Layout& out, cudaDataType_t t, int64_t rows, int64_t cols) {
    cublasLtMatrixLayout_t raw = nullptr;
    if (status.ok()) {
      status.Update(Check(cublasLtMatrixLayoutCreate(&raw, t, static_cast<uint64_t>(rows),
                                                     static_cast<uint64_t>(cols), rows),
                          "product layout"));
      out.reset(raw);
    }
  };
  const bool first_t = transposes.first == CUBLAS_OP_T;
  const bool second_t = transposes.second == CUBLAS_OP_T;
  layout(plan.first, type, first_t ? key.k : key.n, first_t ? key.n : key.k);
  layout(plan.second, type, second_t ? key.m : key.k, second_t ? key.k : key.m);
  layout(plan.result, result_type, key.n, key.m);
  if (!status.ok()) return status;
  return plan;
}

absl::StatusOr<Products::Plan> Products::Create(const Key& key, const void* bias) {
  absl::StatusOr<Plan> plan = SetUp(key, bias);
  if (!plan.ok()) return plan;
  Key rounded = key;
  int64_t& tokens = key.kind == ProductKind::kWeightGrad ? rounded.k : rounded.m;
  tokens = RoundedTokens(tokens);
  auto found = choices_.find(rounded);
  if (found == choices_.end()) {
    absl::StatusOr<Plan> larger = SetUp(rounded, bias);
    if (!larger.ok()) return larger;
    absl::StatusOr<Choice> choice = Choose(rounded, *larger);
    if (!choice.ok()) return choice.status();
    if (choices_.size() >= kMaxPlans) choices_.clear();
    found = choices_.emplace(rounded, *choice).first;
  }
  plan->choice = found->second;
  plan->shared = !(rounded == key);
  return plan;
}

absl::StatusOr<Products::Choice> Products::Choose(const Key& key, const Plan& plan) {
  cublasLtMatmulPreference_t raw = nullptr;
  absl::Status status = Check(cublasLtMatmulPreferenceCreate(&raw), "product preference");
  if (!status.ok()) return status;
  const Preference preference(raw);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    status.Update(Check(cublasLtMatmulPreferenceSetAttribute(raw, attribute, &value, sizeof(value)),
                        "product preference attribute"));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, key.workspace_bytes);
  // Split reductions through the workspace in fp32 are deterministic. In-place ones spare the
  // workspace and the kernel that adds it up, but their order is not promised.
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  if (key.unordered) reductions |= CUBLASLT_REDUCTION_SCHEME_INPLACE;
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_b);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_a);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_d);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_d);
  if (!status.ok()) return status;

  constexpr int kCandidates = 8;
  cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
  int found = 0;
  const cublasStatus_t answer = cublasLtMatmulAlgoGetHeuristic(
      handle_, plan.desc.get(), plan.first.get(), plan.second.get(), plan.result.get(),
      plan.result.get(), raw, kCandidates, results, &found);
  if (answer == CUBLAS_STATUS_NOT_SUPPORTED || answer == CUBLAS_STATUS_INVALID_VALUE) {
    return Choice{};
  }
  if (absl::Status checked = Check(answer, "product heuristic"); !checked.ok()) return checked;
  for (int i = 0; i < found; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    if (results[i].workspaceSize > key.workspace_bytes) continue;
    return Choice{.algorithm = results[i].algo, .supported = true};
  }
  return Choice{};
}

absl::StatusOr<Products::Plan*> Products::FindOrCreate(const Key& key, const void* bias) {
  if (const auto it = plans_.find(key); it != plans_.end()) return it->second.get();
  absl::StatusOr<Plan> plan = Create(key, bias);
  if (!plan.ok()) return plan.status();
  if (plans_.size() >= kMaxPlans) plans_.clear();
  auto [it, inserted] = plans_.emplace(key, std::make_unique<Plan>(*std::move(plan)));
  return it->second.get();
}

absl::Status Products::RunAny(const ProductArgs& args, cudaStream_t stream) {
  ProductAnyParams p;
  p.a = args.a;
  p.b = args.b;
  p.bias = args.bias;
  p.d = args.d;
  p.m = args.m;
  p.n = args.n;
  p.k = args.k;
  p.operand_dtype = args.dtype;
  p.result_dtype = args.dtype;
  switch (args.kind) {
    case ProductKind::kForward:
      p.a_row = args.k;
      p.a_col = 1;
      p.b_row = args.k;
      p.b_col = 1;
      break;
    case ProductKind::kInputGrad:
      p.a_row = args.k;
      p.a_col = 1;
      p.b_row = 1;
      p.b_col = args.n;
      p.accumulate = args.accumulate;
      break;
    case ProductKind::kWeightGrad:
      p.a_row = 1;
      p.a_col = args.m;
      p.b_row = 1;
      p.b_col = args.n;
      p.result_dtype = DType::kF32;
      p.accumulate = true;
      break;
  }
  return Check(LaunchProductAny(p, stream), Describe(args).c_str());
}

absl::Status Products::Run(const ProductArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return absl::OkStatus();
  // The epilogue reads the bias in vectors. Where it can't, d starts as the bias and the product
  // accumulates onto it: as exact, and rounded as often.
  const bool has_bias = args.bias != nullptr;
  const bool epilogue = has_bias && args.n % 8 == 0 && Alignment(args.bias) >= 16;
  const bool accumulate =
      args.kind == ProductKind::kWeightGrad || args.accumulate || (has_bias && !epilogue);
  const Key key{.kind = args.kind,
                .dtype = args.dtype,
                .bias = epilogue,
                .accumulate = accumulate,
                // Sums over tokens are the weight gradients' alone.
                .unordered = args.kind == ProductKind::kWeightGrad && args.workspace.unordered,
                .m = args.m,
                .n = args.n,
                .k = args.k,
                .align_a = Alignment(args.a),
                .align_b = Alignment(args.b),
                .align_d = Alignment(args.d),
                .workspace_bytes = std::min(args.workspace.bytes, kProductWorkspaceBytes)};
  absl::StatusOr<Plan*> found = FindOrCreate(key, args.bias);
  if (!found.ok()) return found.status();
  Plan& plan = **found;
  if (!plan.choice.supported) return RunAny(args, stream);

  if (epilogue) {
    absl::Status status =
        Check(cublasLtMatmulDescSetAttribute(plan.desc.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                             &args.bias, sizeof(args.bias)),
              "product bias");
    if (!status.ok()) return status;
  } else if (has_bias) {
    BroadcastBiasParams broadcast;
    broadcast.bias = args.bias;
    broadcast.y = args.d;
    broadcast.rows = args.m;
    broadcast.cols = args.n;
    broadcast.dtype = args.dtype;
    absl::Status status = Check(LaunchBroadcastBias(broadcast, stream), "bias");
    if (!status.ok()) return status;
  }
  const float alpha = 1.0f;
  const float beta = accumulate ? 1.0f : 0.0f;
  const auto multiply = [&] {
    return cublasLtMatmul(handle_, plan.desc.get(), &alpha, args.b, plan.first.get(), args.a,
                          plan.second.get(), &beta, args.d, plan.result.get(), args.d,
                          plan.result.get(), &plan.choice.algorithm, args.workspace.data,
                          key.workspace_bytes, stream);
  };
  const auto refused = [](cublasStatus_t status) {
    return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE;
  };
  cublasStatus_t status = multiply();
  if (refused(status) && plan.shared) {
    // Not an algorithm for so many tokens; perhaps there is another one.
    plan.shared = false;
    absl::StatusOr<Choice> own = Choose(key, plan);
    if (!own.ok()) return own.status();
    plan.choice = *own;
    if (plan.choice.supported) status = multiply();
  }
  if (refused(status)) {
    // Refused before anything was enqueued: the heuristic promised what the library can't do here.
    plan.choice.supported = false;
    return RunAny(args, stream);
  }
  return Check(status, Describe(args).c_str());
}

}  // namespace lamina::cuda
