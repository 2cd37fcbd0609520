#include "server/service/tensors.h"

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/service/conversions.h"

namespace lamina {
namespace {

template <typename... Parts>
absl::Status Invalid(absl::string_view field, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(field, parts...));
}

absl::StatusOr<Shape> CheckedShape(absl::string_view field, const v1::Tensor& tensor,
                                   size_t element_size) {
  const int rank = tensor.shape_size();
  if (rank < 1 || rank > Shape::kMaxRank) {
    return Invalid(field, ".shape: has ", rank, " extents, must have 1 to ", Shape::kMaxRank);
  }
  // What a 64-bit signed size can hold, well below what an address can.
  uint64_t room = static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) / element_size;
  for (int i = 0; i < rank; ++i) {
    const int64_t extent = tensor.shape(i);
    if (extent < 1) return Invalid(field, ".shape[", i, "]: ", extent, " must be at least 1");
    room /= static_cast<uint64_t>(extent);
    if (room == 0) return Invalid(field, ".shape: its size in bytes overflows 63 bits");
  }
  switch (rank) {
    case 1:
      return Shape{tensor.shape(0)};
    case 2:
      return Shape{tensor.shape(0), tensor.shape(1)};
    case 3:
      return Shape{tensor.shape(0), tensor.shape(1), tensor.shape(2)};
    default:
      return Shape{tensor.shape(0), tensor.shape(1), tensor.shape(2), tensor.shape(3)};
  }
}

}  // namespace

absl::StatusOr<CallTensor> ResolveSlice(absl::string_view field, const v1::Slice& slice,
                                        size_t bytes, size_t element_size, Session& session) {
  auto region = session.FindRegion(slice.region_id());
  if (!region.ok()) {
    return absl::Status(region.status().code(),
                        absl::StrCat(field, ".slice.", region.status().message()));
  }
  const uint64_t offset = slice.offset_bytes();
  const uint64_t size = slice.size_bytes();
  const uint64_t length = (*region)->length();
  if (size != bytes) {
    return Invalid(field, ".slice.size_bytes: ", size, " must be ", bytes,
                   ", the shape's elements times their size");
  }
  if (size > length || offset > length - size) {
    return Invalid(field, ".slice: offset_bytes ", offset, " with size_bytes ", size,
                   " passes the region's end at ", length);
  }
  if (offset % element_size != 0) {
    return Invalid(field, ".slice.offset_bytes: ", offset,
                   " must be a multiple of the element size ", element_size);
  }
  CallTensor part;
  part.data = static_cast<char*>((*region)->data()) + offset;
  const bool on_device = (*region)->kind() != RegionKind::kMemfd;
  part.memory = on_device ? Memory::kDevice : Memory::kHost;
  part.transport = on_device ? TensorTransport::kDevice : TensorTransport::kMemfd;
  part.keep = *std::move(region);
  return part;
}

absl::StatusOr<CallTensor> ResolveInput(absl::string_view field, const v1::Tensor& tensor,
                                        size_t inline_cap, Session& session) {
  const auto dtype = FromProto(tensor.dtype());
  if (!dtype) {
    return Invalid(field, ".dtype: ", static_cast<int>(tensor.dtype()),
                   " must be FLOAT32, BFLOAT16, FLOAT16 or INT32");
  }
  auto shape = CheckedShape(field, tensor, SizeOf(*dtype));
  if (!shape.ok()) return shape.status();
  const size_t bytes = static_cast<size_t>(shape->elements()) * SizeOf(*dtype);
  CallTensor result;
  switch (tensor.storage_case()) {
    case v1::Tensor::kSlice: {
      auto resolved = ResolveSlice(field, tensor.slice(), bytes, SizeOf(*dtype), session);
      if (!resolved.ok()) return resolved.status();
      result = *std::move(resolved);
      break;
    }
    case v1::Tensor::kInlineData:
      if (tensor.inline_data().size() > inline_cap) {
        return Invalid(field, ".inline_data: ", tensor.inline_data().size(),
                       " bytes pass the cap of ", inline_cap, "; use a region");
      }
      if (tensor.inline_data().size() != bytes) {
        return Invalid(field, ".inline_data: has ", tensor.inline_data().size(), " bytes, ",
                       shape->ToString(), " of ", Name(*dtype), " takes ", bytes);
      }
      // Read only: the engine never writes to what it takes as an input.
      result.data = const_cast<char*>(tensor.inline_data().data());
      result.transport = TensorTransport::kInline;
      break;
    case v1::Tensor::STORAGE_NOT_SET:
      return Invalid(field, ": needs a slice or inline_data");
  }
  result.dtype = *dtype;
  result.shape = *shape;
  return result;
}

absl::StatusOr<CallTensor> ResolveTarget(absl::string_view field, const v1::TensorTarget& target,
                                         DType dtype, const Shape& shape, size_t inline_cap,
                                         Session& session) {
  const size_t bytes = static_cast<size_t>(shape.elements()) * SizeOf(dtype);
  CallTensor result;
  if (target.destination_case() == v1::TensorTarget::kSlice) {
    auto resolved = ResolveSlice(field, target.slice(), bytes, SizeOf(dtype), session);
    if (!resolved.ok()) return resolved.status();
    result = *std::move(resolved);
  } else {
    if (bytes > inline_cap) {
      return Invalid(field, ": an inline result of ", bytes, " bytes passes the cap of ",
                     inline_cap, "; use a region");
    }
    result.transport = TensorTransport::kInline;
  }
  result.dtype = dtype;
  result.shape = shape;
  return result;
}

absl::StatusOr<Fence> ResolveFence(absl::string_view field, bool present, const v1::Fence& fence,
                                   Session& session) {
  if (!present) return Fence{};
  if (fence.value() == 0) return Invalid(field, ".value: 0 must be at least 1");
  auto place = ResolveSlice(field, fence.slice(), sizeof(uint64_t), sizeof(uint64_t), session);
  if (!place.ok()) return place.status();
  if (place->memory != Memory::kHost) {
    return Invalid(field, ".slice.region_id: a fence lies in a REGION_KIND_MEMFD region");
  }
  return Fence{.at = static_cast<uint64_t*>(place->data),
               .value = fence.value(),
               .keep = std::move(place->keep)};
}

void FillResult(const v1::TensorTarget& target, const CallTensor& where, std::string inline_bytes,
                v1::Tensor* result) {
  result->set_dtype(ToProto(where.dtype));
  SetShape(where.shape, result->mutable_shape());
  if (target.destination_case() == v1::TensorTarget::kSlice) {
    *result->mutable_slice() = target.slice();
  } else {
    *result->mutable_inline_data() = std::move(inline_bytes);
  }
}

}  // namespace lamina
