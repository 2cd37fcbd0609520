// Every check of a handle, one by one, without gRPC around it.
#include "server/service/tensors.h"

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/session/session_manager.h"
#include "tests/server/engine/engine_rig.h"

namespace lamina::testing {
namespace {

constexpr uint64_t kLength = 8192;
constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
constexpr size_t kCap = 4096;

class TensorsTest : public ::testing::Test {
 protected:
  v1::Slice SliceAt(uint64_t offset, uint64_t size) const {
    v1::Slice slice;
    slice.set_region_id(region->id());
    slice.set_offset_bytes(offset);
    slice.set_size_bytes(size);
    return slice;
  }
  v1::Tensor TensorAt(uint64_t offset, uint64_t size, const std::vector<int64_t>& shape,
                      v1::DataType dtype = v1::DATA_TYPE_FLOAT32) const {
    v1::Tensor tensor;
    tensor.set_dtype(dtype);
    for (const int64_t extent : shape) tensor.add_shape(extent);
    *tensor.mutable_slice() = SliceAt(offset, size);
    return tensor;
  }
  absl::Status Resolve(const v1::Tensor& tensor) {
    return ResolveInput("input", tensor, kCap, *session).status();
  }

  std::unique_ptr<SessionManager> manager = SessionManager::Create({}, {});
  std::shared_ptr<Session> session = Value(manager->Open("")).session;
  std::shared_ptr<Region> region = Value(session->CreateRegion(kLength));
};

TEST_F(TensorsTest, SlicesInsideTheRegionPointIntoIt) {
  char* const begin = static_cast<char*>(region->data());
  for (const auto& [offset, count] : std::vector<std::pair<uint64_t, int64_t>>{
           {0, 1}, {0, 2048}, {4, 2047}, {kLength - 4, 1}, {4096, 1024}}) {
    const auto size = static_cast<uint64_t>(count) * 4;
    CallTensor tensor =
        Value(ResolveInput("input", TensorAt(offset, size, {count}), kCap, *session));
    EXPECT_EQ(tensor.data, begin + offset);
    EXPECT_EQ(tensor.bytes(), size);
    EXPECT_EQ(tensor.transport, TensorTransport::kMemfd);
    EXPECT_EQ(tensor.keep, region);
  }
}

TEST_F(TensorsTest, SlicesThatPassTheEndAreRefusedWithTheNumbers) {
  // Offset, elements. In all of these the size is the shape's, so only the end is at fault.
  for (const auto& [offset, count] :
       std::vector<std::pair<uint64_t, int64_t>>{{0, 2049},
                                                 {4, 2048},
                                                 {kLength, 1},
                                                 {kLength + 4, 1},
                                                 {uint64_t{1} << 32, 1},
                                                 {uint64_t{1} << 63, 1},
                                                 {kMax - 3, 1},     // offset + size wraps to 0
                                                 {kMax - 7, 2},     // to 0
                                                 {kMax - 3, 2048},  // into the region
                                                 {0, int64_t{1} << 60}}) {
    const auto size = static_cast<uint64_t>(count) * 4;
    EXPECT_THAT(
        Resolve(TensorAt(offset, size, {count})),
        IsStatus(kInvalid, absl::StrCat("input.slice: offset_bytes ", offset, " with size_bytes ",
                                        size, " passes the region's end at ", kLength)));
  }
}

TEST_F(TensorsTest, SizesThatAreNotTheShapesAreRefused) {
  for (const uint64_t size : {uint64_t{0}, uint64_t{20}, uint64_t{23}, uint64_t{25}, uint64_t{28},
                              uint64_t{1} << 63, kMax}) {
    EXPECT_THAT(Resolve(TensorAt(0, size, {2, 3})),
                IsStatus(kInvalid, absl::StrCat("input.slice.size_bytes: ", size, " must be 24")));
  }
}

TEST_F(TensorsTest, OffsetsAreMultiplesOfTheElement) {
  for (const auto& [dtype, element, offset, good] :
       std::vector<std::tuple<v1::DataType, uint64_t, uint64_t, bool>>{
           {v1::DATA_TYPE_FLOAT32, 4, 1, false},
           {v1::DATA_TYPE_FLOAT32, 4, 2, false},
           {v1::DATA_TYPE_FLOAT32, 4, 4, true},
           {v1::DATA_TYPE_INT32, 4, 6, false},
           {v1::DATA_TYPE_BFLOAT16, 2, 2, true},
           {v1::DATA_TYPE_BFLOAT16, 2, 3, false},
           {v1::DATA_TYPE_FLOAT16, 2, 6, true},
           {v1::DATA_TYPE_FLOAT16, 2, 1, false}}) {
    const absl::Status status = Resolve(TensorAt(offset, element * 6, {6}, dtype));
    if (good) {
      EXPECT_TRUE(status.ok()) << status;
    } else {
      EXPECT_THAT(
          status,
          IsStatus(kInvalid, absl::StrCat("input.slice.offset_bytes: ", offset,
                                          " must be a multiple of the element size ", element)));
    }
  }
}

TEST_F(TensorsTest, ShapesWhoseProductOverflowsAreRefused) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
           {most},
           {most, most},
           {most, most, most, most},
           {int64_t{1} << 61},
           {int64_t{1} << 31, int64_t{1} << 31, 2},
           {int64_t{1} << 32, int64_t{1} << 32},             // the product wraps to 0
           {int64_t{1} << 32, int64_t{1} << 31, 2, 1},       // too
           {(int64_t{1} << 32) + 1, (int64_t{1} << 32)}}) {  // to a small number
    for (const uint64_t size : {uint64_t{0}, uint64_t{4}, kLength}) {
      EXPECT_THAT(Resolve(TensorAt(0, size, shape)),
                  IsStatus(kInvalid, "input.shape: its size in bytes overflows"));
    }
  }
}

TEST_F(TensorsTest, ShapesThatAreNoneAreRefused) {
  EXPECT_THAT(Resolve(TensorAt(0, 0, {})), IsStatus(kInvalid, "input.shape: has 0 extents"));
  EXPECT_THAT(Resolve(TensorAt(0, 4, {1, 1, 1, 1, 1})),
              IsStatus(kInvalid, "input.shape: has 5 extents, must have 1 to 4"));
  EXPECT_TRUE(Resolve(TensorAt(0, 4, {1, 1, 1, 1})).ok());
  EXPECT_THAT(Resolve(TensorAt(0, 0, {2, 0})),
              IsStatus(kInvalid, "input.shape[1]: 0 must be at least 1"));
  EXPECT_THAT(Resolve(TensorAt(0, 4, {-1, -1})),
              IsStatus(kInvalid, "input.shape[0]: -1 must be at least 1"));
  EXPECT_THAT(Resolve(TensorAt(0, 4, {std::numeric_limits<int64_t>::min()})),
              IsStatus(kInvalid, "input.shape[0]"));
}

TEST_F(TensorsTest, TypesThatAreNoneAreRefused) {
  for (const int dtype : {0, 5, 99, -1}) {
    EXPECT_THAT(Resolve(TensorAt(0, 4, {1}, static_cast<v1::DataType>(dtype))),
                IsStatus(kInvalid, absl::StrCat("input.dtype: ", dtype)));
  }
}

TEST_F(TensorsTest, AnotherSessionsRegionIsNotFoundAndNotNamed) {
  const std::shared_ptr<Session> other = Value(manager->Open("")).session;
  const absl::Status foreign = ResolveInput("input", TensorAt(0, 4, {1}), kCap, *other).status();
  EXPECT_THAT(foreign, IsStatus(kNotFound, "input.slice.region_id"));
  EXPECT_EQ(std::string(foreign.message()).find(region->id()), std::string::npos);
  v1::Tensor nobodys = TensorAt(0, 4, {1});
  nobodys.mutable_slice()->set_region_id(std::string(32, 'f'));
  EXPECT_EQ(ResolveInput("input", nobodys, kCap, *other).status(), foreign);
  nobodys.mutable_slice()->clear_region_id();
  EXPECT_EQ(ResolveInput("input", nobodys, kCap, *other).status(), foreign);
}

TEST_F(TensorsTest, AResolvedSliceKeepsItsRegionMapped) {
  std::optional<CallTensor> tensor =
      Value(ResolveInput("input", TensorAt(0, kLength, {2048}), kCap, *session));
  ASSERT_TRUE(session->ReleaseRegion(region->id()).ok());
  region.reset();
  EXPECT_EQ(manager->live_regions(), 1);
  static_cast<char*>(tensor->data)[kLength - 1] = 1;
  tensor.reset();
  EXPECT_EQ(manager->live_regions(), 0);
}

TEST_F(TensorsTest, InlineTensors) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  tensor.add_shape(1024);
  EXPECT_THAT(Resolve(tensor), IsStatus(kInvalid, "input: needs a slice or inline_data"));
  tensor.set_inline_data(std::string(kCap, 'x'));
  EXPECT_EQ(Value(ResolveInput("input", tensor, kCap, *session)).data, tensor.inline_data().data())
      << "no copy is made";
  for (const size_t size : {size_t{0}, size_t{1}, kCap - 1, kCap - 4}) {
    tensor.set_inline_data(std::string(size, 'x'));
    EXPECT_THAT(Resolve(tensor), IsStatus(kInvalid, absl::StrCat("input.inline_data: has ", size,
                                                                 " bytes, [1024]")));
  }
  tensor.set_shape(0, 1025);
  tensor.set_inline_data(std::string(kCap + 4, 'x'));
  EXPECT_THAT(Resolve(tensor), IsStatus(kInvalid, absl::StrCat("input.inline_data: ", kCap + 4,
                                                               " bytes pass the cap of ", kCap)));
}

TEST_F(TensorsTest, Targets) {
  const auto resolve = [&](const v1::TensorTarget& target, const Shape& shape) {
    return ResolveTarget("output", target, DType::kF32, shape, kCap, *session);
  };
  v1::TensorTarget target;
  // Absent and inline are the same.
  for (int round = 0; round < 2; ++round) {
    const CallTensor inline_target = Value(resolve(target, {1024}));
    EXPECT_EQ(inline_target.data, nullptr);
    EXPECT_EQ(inline_target.transport, TensorTransport::kInline);
    EXPECT_THAT(resolve(target, {1025}).status(),
                IsStatus(kInvalid, absl::StrCat("output: an inline result of 4100 bytes passes the "
                                                "cap of ",
                                                kCap)));
    target.mutable_inline_();
  }
  *target.mutable_slice() = SliceAt(4096, 4096);
  EXPECT_EQ(Value(resolve(target, {1024})).data, static_cast<char*>(region->data()) + 4096);
  EXPECT_THAT(resolve(target, {1023}).status(), IsStatus(kInvalid, "output.slice.size_bytes"));
  *target.mutable_slice() = SliceAt(4100, 4096);
  EXPECT_THAT(resolve(target, {1024}).status(), IsStatus(kInvalid, "output.slice: offset_bytes"));
  *target.mutable_slice() = SliceAt(2, 4096);
  EXPECT_THAT(resolve(target, {1024}).status(), IsStatus(kInvalid, "output.slice.offset_bytes"));
  target.mutable_slice()->set_region_id("?");
  EXPECT_THAT(resolve(target, {1024}).status(), IsStatus(kNotFound, "output.slice.region_id"));
}

}  // namespace
}  // namespace lamina::testing
