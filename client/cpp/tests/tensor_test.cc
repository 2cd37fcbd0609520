#include "lamina/client/tensor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace lamina::client {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(Tensor, AllocateIsZeroedAlignedAndShared) {
  const Tensor tensor = Tensor::Allocate(DType::kFloat32, {3, 5}).value();
  EXPECT_EQ(tensor.size(), 15u);
  EXPECT_EQ(tensor.bytes(), 60u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.data()) % 64, 0u);
  EXPECT_THAT(tensor.floats(), Each(0.0f));
  const Tensor copy = tensor;
  copy.floats()[7] = 2.5f;
  EXPECT_EQ(tensor.floats()[7], 2.5f);
  EXPECT_FALSE(tensor.in_region());
}

TEST(Tensor, RefusesShapes) {
  EXPECT_THAT(Message(Tensor::Allocate(DType::kFloat32, {2, 0}).status()),
              HasSubstr("every extent must be >= 1"));
  EXPECT_THAT(Message(Tensor::Allocate(DType::kFloat32, {}).status()), HasSubstr("1..4"));
  EXPECT_THAT(Message(Tensor::Allocate(DType::kFloat32, {1, 1, 1, 1, 1}).status()),
              HasSubstr("1..4"));
  const int64_t huge = int64_t{1} << 40;
  EXPECT_THAT(Message(Tensor::Allocate(DType::kFloat32, {huge, huge}).status()),
              HasSubstr("overflows"));
}

TEST(Tensor, WrapUsesTheCallersMemory) {
  std::array<float, 6> values{1, 2, 3, 4, 5, 6};
  const Tensor tensor = Tensor::Wrap(values.data(), DType::kFloat32, {2, 3}).value();
  tensor.floats()[0] = 9;
  EXPECT_EQ(values[0], 9);
  EXPECT_FALSE(Tensor::Wrap(nullptr, DType::kFloat32, {1}).ok());
  char* odd = reinterpret_cast<char*>(values.data()) + 1;
  EXPECT_THAT(Message(Tensor::Wrap(odd, DType::kFloat32, {1}).status()), HasSubstr("not aligned"));
}

TEST(Tensor, ViewsStayInside) {
  const Tensor words = Tensor::Allocate(DType::kInt32, {8}).value();
  const Tensor tail = words.View(DType::kFloat32, {2}, 24).value();
  tail.floats()[1] = 1.0f;
  EXPECT_EQ(words.ints()[7], 0x3f800000);
  // A view of a view counts from the view.
  const Tensor last = tail.View(DType::kInt32, {1}, 4).value();
  EXPECT_EQ(last.ints()[0], 0x3f800000);
  EXPECT_FALSE(words.View(DType::kFloat32, {2}, 28).ok());
  EXPECT_FALSE(words.View(DType::kFloat32, {9}, 0).ok());
  EXPECT_FALSE(words.View(DType::kFloat32, {1}, std::numeric_limits<size_t>::max() - 2).ok());
  EXPECT_FALSE(tail.View(DType::kFloat32, {2}, 4).ok());
  EXPECT_THAT(Message(words.View(DType::kFloat32, {1}, 2).status()), HasSubstr("not aligned"));
  EXPECT_TRUE(words.View(DType::kFloat16, {1}, 2).ok());
}

TEST(Tensor, ViewOutlivesWhatItWasTakenFrom) {
  Tensor view;
  {
    const Tensor whole = Tensor::Allocate(DType::kFloat32, {4}).value();
    whole.floats()[3] = 4;
    view = whole.View(DType::kFloat32, {1}, 12).value();
  }
  EXPECT_EQ(view.floats()[0], 4);
}

TEST(Tensor, ReshapeKeepsTheElements) {
  const Tensor tensor = Tensor::Allocate(DType::kFloat32, {2, 6}).value();
  const Tensor reshaped = tensor.Reshape({3, 4}).value();
  EXPECT_THAT(reshaped.shape(), ElementsAre(3, 4));
  EXPECT_EQ(reshaped.data(), tensor.data());
  EXPECT_FALSE(tensor.Reshape({3, 5}).ok());
}

TEST(Tensor, ConvertsFloats) {
  const std::vector<float> values = {0.0f, -1.5f, 3.14159f, 65504.0f};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(Name(dtype));
    const Tensor tensor = Tensor::Allocate(dtype, {4}).value();
    ASSERT_TRUE(tensor.CopyFrom(values).ok());
    const std::vector<float> back = tensor.ToFloats().value();
    const float epsilon = dtype == DType::kFloat32    ? 0
                          : dtype == DType::kBFloat16 ? 0x1p-8f
                                                      : 0x1p-11f;
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_LE(std::abs(back[i] - values[i]), epsilon * std::abs(values[i])) << i;
    }
    EXPECT_FALSE(tensor.CopyFrom(std::span<const float>(values).first(3)).ok());
  }
  const Tensor ints = Tensor::Allocate(DType::kInt32, {4}).value();
  EXPECT_FALSE(ints.CopyFrom(values).ok());
  EXPECT_FALSE(ints.ToFloats().ok());
}

TEST(TensorDeathTest, WrongDTypeIsABug) {
  const Tensor halves = Tensor::Allocate(DType::kFloat16, {4}).value();
  EXPECT_DEATH(halves.floats(), "the tensor is fp16");
  EXPECT_DEATH(Tensor().ints(), "the tensor is absent");
}

}  // namespace
}  // namespace lamina::client
