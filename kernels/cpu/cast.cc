#include "cast.h"

#include <algorithm>
#include <cstring>

namespace lamina::cpu {

absl::Status Cast(const Context& context, const CastArgs& args) {
  constexpr int64_t kGrain = 32768;
  constexpr int64_t kBlock = 1024;  // between two 16-bit dtypes: through this many floats
  const size_t from = SizeOf(args.src.dtype), to = SizeOf(args.dst.dtype);
  const ActKernels& source = context.kernels.of(args.src.dtype);
  const ActKernels& target = context.kernels.of(args.dst.dtype);
  ParallelRanges(context.threads, args.src.elements(), kGrain,
                 [&](int, int64_t begin, int64_t end) {
                   const char* src = args.src.as<char>() + static_cast<size_t>(begin) * from;
                   char* dst = args.dst.as<char>() + static_cast<size_t>(begin) * to;
                   int64_t n = end - begin;
                   if (args.src.dtype == args.dst.dtype) {
                     std::memcpy(dst, src, static_cast<size_t>(n) * from);
                   } else if (args.dst.dtype == DType::kF32) {
                     source.to_f32(src, reinterpret_cast<float*>(dst), n);
                   } else if (args.src.dtype == DType::kF32) {
                     target.from_f32(reinterpret_cast<const float*>(src), dst, n);
                   } else {
                     float block[kBlock];
                     for (; n > 0; n -= kBlock, src += kBlock * from, dst += kBlock * to) {
                       source.to_f32(src, block, std::min(n, kBlock));
                       target.from_f32(block, dst, std::min(n, kBlock));
                     }
                   }
                 });
  return absl::OkStatus();
}

}  // namespace lamina::cpu
