#include "products.h"

#include <omp.h>

#include <cstdlib>
#include <functional>
#include <new>
#include <unordered_map>
#include <utility>

#include <oneapi/dnnl/dnnl.hpp>

#include "absl/strings/str_cat.h"

namespace lamina::cpu {
namespace {

// A stack has a dozen shapes; a client that varies the sequence length makes more. Past this many
// all are dropped and made again.
constexpr size_t kMostPrimitives = 2048;

struct Key {
  int64_t m, n, k;
  DType in, out;
  bool transpose_a, transpose_b, bias, accumulate;
  friend bool operator==(const Key&, const Key&) = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    size_t h = 0;
    const auto mix = [&h](size_t v) { h = (h ^ v) * 0x9E3779B97F4A7C15u + (h >> 29); };
    mix(static_cast<size_t>(key.m));
    mix(static_cast<size_t>(key.n));
    mix(static_cast<size_t>(key.k));
    mix(static_cast<size_t>(key.in) << 8 | static_cast<size_t>(key.out));
    mix(static_cast<size_t>(key.transpose_a) | static_cast<size_t>(key.transpose_b) << 1 |
        static_cast<size_t>(key.bias) << 2 | static_cast<size_t>(key.accumulate) << 3);
    return h;
  }
};

struct Primitive {
  dnnl::matmul matmul;
  dnnl::memory a, b, bias, c, scratchpad;
};

// oneDNN takes its thread count from OpenMP's setting for the calling thread.
class ThreadCount {
 public:
  explicit ThreadCount(int threads) : before_(omp_get_max_threads()), changed_(before_ != threads) {
    if (changed_) omp_set_num_threads(threads);
  }
  ~ThreadCount() {
    if (changed_) omp_set_num_threads(before_);
  }
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  int before_;
  bool changed_;
};

dnnl::memory::data_type TypeOf(DType t) {
  return t == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

dnnl::memory::desc Matrix(int64_t rows, int64_t columns, bool transposed, DType type) {
  return {{rows, columns},
          TypeOf(type),
          transposed ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{columns, 1}};
}

}  // namespace

class Products::Impl {
 public:
  explicit Impl(int threads)
      : threads_(threads),
        engine_(dnnl::engine::kind::cpu, 0),
        stream_(engine_),
        bf16_((static_cast<unsigned>(dnnl::get_effective_cpu_isa()) &
               static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16)) ==
              static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16)) {}

  bool bf16() const { return bf16_; }

  absl::Status Multiply(const Product& p) {
    const ThreadCount threads(threads_);
    try {
      const Key key{p.m,         p.n,           p.k,           p.in,
                    p.out,       p.transpose_a, p.transpose_b, p.bias != nullptr,
                    p.accumulate};
      auto found = primitives_.find(key);
      if (found == primitives_.end()) {
        if (primitives_.size() >= kMostPrimitives) primitives_.clear();
        found = primitives_.emplace(key, Make(key)).first;
      }
      return Run(found->second, p);
    } catch (const dnnl::error& e) {
      return absl::InternalError(absl::StrCat("product [", p.m, ", ", p.k, "] x [", p.k, ", ", p.n,
                                              "]: oneDNN: ", e.what(), " (status ",
                                              static_cast<int>(e.status), ")"));
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "product [", p.m, ", ", p.k, "] x [", p.k, ", ", p.n, "]: no memory for its primitive"));
    }
  }

 private:
  Primitive Make(const Key& key) {
    const auto a = Matrix(key.m, key.k, key.transpose_a, key.in);
    const auto b = Matrix(key.k, key.n, key.transpose_b, key.in);
    const auto bias = key.bias ? Matrix(1, key.n, false, key.in) : dnnl::memory::desc();
    const auto c = Matrix(key.m, key.n, false, key.out);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (key.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::primitive_desc description(
        key.bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c), attributes,
        engine_);
    const auto scratchpad = description.scratchpad_desc();
    Reserve(scratchpad.get_size());
    const auto unbound = [this](const dnnl::memory::desc& d) {
      return dnnl::memory(d, engine_, DNNL_MEMORY_NONE);
    };
    Primitive made;
    made.matmul = dnnl::matmul(description);
    made.a = unbound(a);
    made.b = unbound(b);
    if (key.bias) made.bias = unbound(bias);
    made.c = unbound(c);
    if (scratchpad.get_size() > 0) made.scratchpad = unbound(scratchpad);
    return made;
  }

  absl::Status Run(const Primitive& primitive, const Product& p) {
    // By the C interface: the C++ one builds a map for each call.
    dnnl_exec_arg_t args[5];
    int count = 0;
    const auto bind = [&](int name, const dnnl::memory& memory, void* data) {
      memory.set_data_handle(data);
      args[count++] = dnnl_exec_arg_t{name, memory.get()};
    };
    bind(DNNL_ARG_SRC, primitive.a, const_cast<void*>(p.a));
    bind(DNNL_ARG_WEIGHTS, primitive.b, const_cast<void*>(p.b));
    bind(DNNL_ARG_DST, primitive.c, p.c);
    if (p.bias != nullptr) bind(DNNL_ARG_BIAS, primitive.bias, const_cast<void*>(p.bias));
    if (primitive.scratchpad) bind(DNNL_ARG_SCRATCHPAD, primitive.scratchpad, scratchpad_.get());
    const dnnl_status_t status =
        dnnl_primitive_execute(primitive.matmul.get(), stream_.get(), count, args);
    if (status != dnnl_success)
      return absl::InternalError(absl::StrCat("product [", p.m, ", ", p.k, "] x [", p.k, ", ", p.n,
                                              "]: oneDNN status ", static_cast<int>(status)));
    return absl::OkStatus();
  }

  // One buffer serves every primitive: one runs at a time. About 128 KiB a thread.
  void Reserve(size_t bytes) {
    if (bytes <= scratchpad_bytes_) return;
    constexpr size_t kPage = 4096;
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    scratchpad_.reset(std::aligned_alloc(kPage, rounded));
    scratchpad_bytes_ = scratchpad_ ? rounded : 0;
    if (!scratchpad_) throw std::bad_alloc();
  }

  struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
  };

  const int threads_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  const bool bf16_;
  std::unordered_map<Key, Primitive, KeyHash> primitives_;
  std::unique_ptr<void, FreeDeleter> scratchpad_;
  size_t scratchpad_bytes_ = 0;
};

Products::Products(int threads) : impl_(std::make_unique<Impl>(threads)) {}
Products::~Products() = default;
bool Products::bf16() const { return impl_->bf16(); }
absl::Status Products::Multiply(const Product& product) { return impl_->Multiply(product); }

}  // namespace lamina::cpu
