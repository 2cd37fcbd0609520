// The op suite's rig: a device, one call's tensors on it, and comparison with the oracle.
//
// Every tensor lies between guard bands whose bytes are checked after the run; outputs are poisoned
// with NaN before it; inputs must come back unchanged; and each call runs twice, in different
// memory and with differently poisoned workspace, and must give the same bits; unless it is allowed
// to add in any order.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "lamina/kernels/backend.h"
#include "ref/ops.h"
#include "support/rounding.h"
#include "support/shapes.h"

namespace lamina::testing {

using ref::Vec;

// The backend for "cpu" or "cuda:0", made once a process; null, and the reason, where this machine
// has no such device. Any other failure throws.
Backend* OpenDevice(const std::string& device, std::string* reason);

// One run of one op: makes its tensors, and checks afterwards what the op must have left alone.
class OpRun {
 public:
  // `round` 0 or 1: which poison. `offset`: tensors begin so many elements after a 256-byte
  // boundary.
  OpRun(Backend& backend, int round, int64_t offset);
  OpRun(const OpRun&) = delete;
  OpRun& operator=(const OpRun&) = delete;
  ~OpRun();

  Backend& backend() { return backend_; }

  // Rounds `values` to dtype; the op must leave them as they are.
  TensorView In(DType dtype, const Shape& shape, const Vec& values);
  TensorView In(const std::vector<int32_t>& values);
  // Results are called by `name`. Out's contents are NaN before, InOut's are `before`, rounded.
  TensorView Out(const char* name, DType dtype, const Shape& shape);
  TensorView InOut(const char* name, DType dtype, const Shape& shape, const Vec& before);
  const RngState* Rng(const RngState& rng);
  OptimizerControl* ControlOut(const char* name);
  const OptimizerControl* ControlIn(const OptimizerControl& control);
  const LambSegment* Segments(const std::vector<LambSegment>& segments);
  // Exactly WorkspaceBytes(dims), guarded too.
  Workspace WorkspaceFor(const LayerDims& dims);
  // Memory of so many bytes for sums to be left in, guarded and poisoned like a workspace.
  PendingSums PendingFor(size_t bytes);
  // From now on, workspaces allow sums in any order.
  void AllowAnyOrder() { unordered_ = true; }

  // Waits, then fails the test where a guard band or an input has changed. The bytes of each
  // result.
  std::map<std::string, std::vector<uint8_t>> Finish();

 private:
  struct Buffer {
    std::string name;  // empty: an input
    char* memory = nullptr;
    size_t begin = 0, bytes = 0;  // where the tensor lies in it
    std::vector<uint8_t> before;  // the whole of the memory; of a workspace its two guard bands
    bool scratch = false;         // workspace: its contents are nobody's business
  };
  Buffer& AddBuffer(const std::string& name, size_t begin, size_t bytes);
  char* Scratch(size_t bytes);
  void* Place(const std::string& name, std::vector<uint8_t> contents, size_t element_size);
  void CheckGuards(const Buffer& workspace);

  Backend& backend_;
  int round_;
  int64_t offset_;
  bool unordered_ = false;
  std::list<Buffer> buffers_;
};

// What an op left in its outputs.
class Results {
 public:
  Results(std::map<std::string, std::vector<uint8_t>> bytes) : bytes_(std::move(bytes)) {}
  Vec Values(const std::string& name, DType dtype) const { return Decode(dtype, bytes_.at(name)); }
  const std::vector<uint8_t>& Bytes(const std::string& name) const { return bytes_.at(name); }

 private:
  std::map<std::string, std::vector<uint8_t>> bytes_;
};

// Runs `op` twice, as this file's head says. Throws where it returns an error.
Results RunTwice(Backend& backend, const std::function<absl::Status(OpRun&)>& op,
                 int64_t offset = 0);
// Runs `op` once, and lets it add in any order: its bits may differ from RunTwice's.
Results RunInAnyOrder(Backend& backend, const std::function<absl::Status(OpRun&)>& op,
                      int64_t offset = 0);

// --- tolerances ---
//
// An output of dtype D whose exact value is y, made from products and sums in fp32, may be off by
//   u(D) |y|              its own rounding, u the unit roundoff of D
// + Growth(n) sum |terms| the sum's: u(fp32) a term, and the errors of n additions, taken as
//                         independent, grow with sqrt(n) (Higham and Mary, "A New Approach to
//                         Probabilistic Rounding Error Analysis", 2019). Eight deviations: no
//                         chance failure in any number of elements. For n <= 4096 that also covers
//                         tensor cores, which truncate once in 16 terms: n/16 * 2 u <= 8 sqrt(n) u.
// + Tiny(D)               where y is subnormal in D.
// What goes into the sums is exact: the oracle reads the rounded inputs.
double Growth(int64_t n);
constexpr double kF32Roundoff = 0x1p-24;

// What gelu'(x) in fp32 may be off by: the second term, x times a density, loses ulps of x^3 in the
// tanh form (1 - tanh^2 cancels while the inner derivative grows with x^2) until the density
// vanishes.
double GeluDerivativeError(double x);

// Values and how far from each a result may be.
struct Bounded {
  Vec want, bound;
};
// `before` [cols] plus the sums of the columns of `terms`, which are known to `errors` and were
// summed either so or, independently of each other, rounded to `dtype`.
Bounded ColumnSumsAddedTo(const Vec& before, DType dtype, const Vec& terms, const Vec& errors);

// Fails where |got - want| > bound somewhere, or got is not finite where want is; says where it is
// worst and how many there are. Each bound must be finite and at least 0.
void ExpectWithin(const char* what, const Vec& got, const Vec& want, const Vec& bound);

// --- parameters ---

inline constexpr DType kActs[] = {DType::kF32, DType::kBF16, DType::kF16};

// A test over device x act x Case; Case has Name(), fit for a test's name. One that has
// `many_blocks` set is long for the oracle and of a size that a GPU alone cuts up: the CPU skips
// it.
template <typename Case>
class OpTest : public ::testing::TestWithParam<std::tuple<const char*, DType, Case>> {
 public:
  static std::string ParamName(
      const ::testing::TestParamInfo<std::tuple<const char*, DType, Case>>& info) {
    return std::string(Name(std::get<1>(info.param))) + "_" + std::get<2>(info.param).Name();
  }

 protected:
  void SetUp() override {
    if constexpr (requires(const Case& c) { c.many_blocks; }) {
      if (param().many_blocks && std::string("cpu") == std::get<0>(this->GetParam()))
        GTEST_SKIP() << "long, and a CPU has no such blocks";
    }
    std::string reason;
    backend_ = OpenDevice(std::get<0>(this->GetParam()), &reason);
    if (backend_ == nullptr) GTEST_SKIP() << reason;
  }
  Backend& backend() { return *backend_; }
  DType act() const { return std::get<1>(this->GetParam()); }
  const Case& param() const { return std::get<2>(this->GetParam()); }

 private:
  Backend* backend_ = nullptr;
};

// Test names begin with the device: cpu/LinearTest.Forward/fp32_B1_..., cuda/LinearTest...
#define LAMINA_OP_SUITE(suite, cases)                                                             \
  INSTANTIATE_TEST_SUITE_P(                                                                       \
      cpu, suite,                                                                                 \
      ::testing::Combine(::testing::Values("cpu"), ::testing::ValuesIn(::lamina::testing::kActs), \
                         ::testing::ValuesIn(cases)),                                             \
      suite::ParamName);                                                                          \
  INSTANTIATE_TEST_SUITE_P(cuda, suite,                                                           \
                           ::testing::Combine(::testing::Values("cuda:0"),                        \
                                              ::testing::ValuesIn(::lamina::testing::kActs),      \
                                              ::testing::ValuesIn(cases)),                        \
                           suite::ParamName)

}  // namespace lamina::testing
