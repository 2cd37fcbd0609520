// Parameters and gradients by name: whole, by slice, as a stream; and writing them.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cli/conformance/broker_socket.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

const char* const kQkv = "layers.1.attn_qkvw";  // [3H, H] = [48, 16]
const char* const kBias = "layers.0.inter_b";   // [I] = [24]

struct Streamed {
  grpc::Status status;
  std::vector<v1::StreamParametersResponse> chunks;
};

Streamed Stream(Daemon& daemon, const v1::StreamParametersRequest& request) {
  grpc::ClientContext context;
  daemon.Prepare(&context);
  Streamed streamed;
  const auto stream = daemon.config().StreamParameters(&context, request);
  v1::StreamParametersResponse chunk;
  while (stream->Read(&chunk)) streamed.chunks.push_back(chunk);
  streamed.status = stream->Finish();
  daemon.Count(v1::ConfigService::service_full_name(), "StreamParameters", streamed.status);
  return streamed;
}

v1::StreamParametersRequest StreamOf(const Rig& rig, const std::vector<std::string>& names = {}) {
  v1::StreamParametersRequest request;
  request.set_stack(rig.stack.name());
  for (const std::string& name : names) request.add_names(name);
  return request;
}

// The tensors that the chunks make up; a Violation where they don't.
std::vector<v1::NamedTensor> Assemble(const Streamed& streamed, uint64_t inline_cap) {
  Require(streamed.status.ok(), "StreamParameters answers ", Describe(streamed.status));
  std::vector<v1::NamedTensor> tensors;
  for (const auto& chunk : streamed.chunks) {
    Require(chunk.data().size() <= inline_cap, "a chunk has ", chunk.data().size(),
            " bytes, more than the inline cap");
    if (chunk.offset_bytes() == 0) {
      v1::NamedTensor& named = tensors.emplace_back();
      named.set_name(chunk.name());
      named.mutable_tensor()->set_dtype(chunk.dtype());
      *named.mutable_tensor()->mutable_shape() = chunk.shape();
    }
    Require(!tensors.empty() && tensors.back().name() == chunk.name(), "a chunk of ", chunk.name(),
            " comes before its first one");
    std::string* data = tensors.back().mutable_tensor()->mutable_inline_data();
    Require(data->size() == chunk.offset_bytes(), "a chunk of ", chunk.name(), " begins at ",
            chunk.offset_bytes(), ", after ", data->size(), " bytes");
    data->append(chunk.data());
  }
  return tensors;
}

void RequireSame(const google::protobuf::RepeatedPtrField<v1::NamedTensor>& got,
                 const std::vector<v1::NamedTensor>& streamed) {
  Require(got.size() == static_cast<int>(streamed.size()), "the stream has ", streamed.size(),
          " tensors, the message ", got.size());
  for (int i = 0; i < got.size(); ++i) {
    Require(Bytes(got[i]) == Bytes(streamed[static_cast<size_t>(i)]), "the stream's tensor ", i,
            " is another than the message's ", got[i].name());
  }
}

// Two parts of the fused tensor, rows of it.
void PartsAreTheFusedOnesRows(Daemon& daemon) {
  const Rig rig(daemon);
  const auto got =
      daemon.Ok(rig.Parameters({kQkv, "layers.1.attn_qw", "layers.1.attn_kw", "layers.1.attn_vw"}));
  Require(got.tensors_size() == 4, "four names give ", got.tensors_size(), " tensors");
  std::string parts;
  for (int i = 1; i < 4; ++i) {
    Require(got.tensors(i).tensor().shape(0) == 16, "a part has not H rows");
    parts += got.tensors(i).tensor().inline_data();
  }
  Require(parts == got.tensors(0).tensor().inline_data(), "q, k and v are not the rows of ", kQkv);
}

void SetsWhatGetReads(Daemon& daemon) {
  Rig rig(daemon);
  const v1::Tensor qkv = Inline({48, 16}, Values(48 * 16, 3)), bias = Inline({24}, Values(24, 4));
  v1::SetParametersRequest set = rig.Set(kQkv, qkv);
  *set.add_tensors() = rig.Set(kBias, bias).tensors(0);
  const auto before = daemon.Ok(rig.Parameters());
  rig.Mutate(set);
  const auto after = daemon.Ok(rig.Parameters());
  for (int i = 0; i < after.tensors_size(); ++i) {
    const auto& now = after.tensors(i);
    const v1::Tensor& expected = now.name() == kQkv    ? qkv
                                 : now.name() == kBias ? bias
                                                       : before.tensors(i).tensor();
    Require(Bytes(now.tensor()) == Bytes(expected), now.name(),
            now.name() == kQkv || now.name() == kBias ? " is not what was written"
                                                      : " has changed, and was not named");
  }
  // A part writes its rows of the fused tensor alone.
  const v1::Tensor k = Inline({16, 16}, Values(256, 5));
  rig.Mutate(rig.Set("layers.1.attn_kw", k));
  const std::string fused = daemon.Ok(rig.Parameters({kQkv})).tensors(0).tensor().inline_data();
  const std::string& q = qkv.inline_data();
  Require(fused == q.substr(0, 1024) + k.inline_data() + q.substr(2048),
          "writing attn_kw has not changed the middle third of ", kQkv, " alone");
}

void SetsAllOrNone(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  const auto good = [&] { return rig.Set(kBias, Inline({24}, Values(24, 4))); };
  struct Bad {
    const char* what;
    Code code;
    const char* word;
    std::function<void(v1::SetParametersRequest*)> spoil;
  };
  const auto second = [](v1::SetParametersRequest* set, const char* name,
                         const v1::Tensor& tensor) {
    v1::NamedTensor* named = set->add_tensors();
    named->set_name(name);
    *named->mutable_tensor() = tensor;
  };
  const v1::Tensor ones = Inline({16}, Floats(16, 1.0f));
  const std::vector<Bad> bad = {
      {"another shape", Code::INVALID_ARGUMENT, "tensors[1].tensor.shape",
       [&](auto* set) { second(set, "layers.0.norm_w", Inline({15}, Floats(15, 1.0f))); }},
      {"another dtype", Code::INVALID_ARGUMENT, "tensors[1].tensor",
       [&](auto* set) {
         second(set, "layers.0.norm_w", Inline({16}, std::vector<int32_t>(16, 1)));
       }},
      {"bytes that are not the shape's", Code::INVALID_ARGUMENT, "tensors[1].tensor.inline_data",
       [&](auto* set) {
         second(set, "layers.0.norm_w", ones);
         set->mutable_tensors(1)->mutable_tensor()->mutable_inline_data()->pop_back();
       }},
      {"no values", Code::INVALID_ARGUMENT, "tensors[1].tensor",
       [&](auto* set) {
         second(set, "layers.0.norm_w", ones);
         set->mutable_tensors(1)->mutable_tensor()->clear_storage();
       }},
      {"a name given twice", Code::INVALID_ARGUMENT, "tensors[1].name",
       [&](auto* set) { second(set, kBias, set->tensors(0).tensor()); }},
      {"a name that is none", Code::NOT_FOUND, "layers.0.nothing",
       [&](auto* set) { second(set, "layers.0.nothing", ones); }},
      {"a layer that is none", Code::NOT_FOUND, "layers.2.norm_w",
       [&](auto* set) { second(set, "layers.2.norm_w", ones); }},
      {"a stack that is none", Code::NOT_FOUND, "no-such-stack",
       [](auto* set) { set->set_stack("no-such-stack"); }},
      {"no mutation", Code::INVALID_ARGUMENT, "mutation", [](auto* set) { set->clear_mutation(); }},
      {"sequence 0", Code::INVALID_ARGUMENT, "mutation.sequence",
       [](auto* set) { set->mutable_mutation()->set_sequence(0); }},
      {"a session that is none", Code::NOT_FOUND, "session",
       [](auto* set) { set->mutable_mutation()->set_session_id(std::string(32, '0')); }},
      {"a gap in the sequence", Code::FAILED_PRECONDITION, "mutation.sequence",
       [](auto* set) { set->mutable_mutation()->set_sequence(set->mutation().sequence() + 1); }},
  };
  Cases cases;
  for (const Bad& one : bad) {
    cases.Try(one.what, [&] {
      v1::SetParametersRequest request = good();
      one.spoil(&request);
      daemon.Refuses(request, one.code, {one.word});
      rig.RequireUnchanged(before, "the refused call");
    });
  }
  cases.Done();
  rig.Mutate(good());  // the session goes on where it was
}

void RefusesBadReads(Daemon& daemon) {
  const Rig rig(daemon);
  Cases cases;
  const auto refuse = [&](const char* what, const auto& request, Code code, const char* word) {
    cases.Try(what, [&] { daemon.Refuses(request, code, {word}); });
  };
  refuse("a name that is none", rig.Parameters({kBias, "layers.0.nothing"}), Code::NOT_FOUND,
         "layers.0.nothing");
  refuse("a layer that is none", rig.Parameters({"layers.2.norm_w"}), Code::NOT_FOUND,
         "layers.2.norm_w");
  refuse("a gradient's name that is none", rig.Gradients({"norm_w"}), Code::NOT_FOUND, "norm_w");
  auto elsewhere = rig.Parameters();
  elsewhere.set_stack("no-such-stack");
  refuse("a stack that is none", elsewhere, Code::NOT_FOUND, "no-such-stack");
  auto gradients = rig.Gradients();
  gradients.set_stack("no-such-stack");
  refuse("gradients of a stack that is none", gradients, Code::NOT_FOUND, "no-such-stack");
  auto typed = rig.Parameters();
  typed.set_dtype(v1::DATA_TYPE_BFLOAT16);
  refuse("bf16 of an fp32 stack", typed, Code::INVALID_ARGUMENT, "dtype");
  typed.set_dtype(v1::DATA_TYPE_INT32);
  refuse("int32", typed, Code::INVALID_ARGUMENT, "dtype");
  auto slice = rig.Parameters({kBias});
  slice.set_session_id(std::string(32, '0'));
  slice.mutable_target()->mutable_slice()->set_size_bytes(96);
  refuse("a session that is none", slice, Code::NOT_FOUND, "session");
  slice.set_session_id(rig.session.id());
  slice.mutable_target()->mutable_slice()->set_region_id(std::string(32, '0'));
  refuse("a region that is none", slice, Code::NOT_FOUND, "region");
  cases.Done();
}

void StreamsRefuseToo(Daemon& daemon) {
  const Rig rig(daemon);
  Cases cases;
  const auto refuse = [&](const char* what, const v1::StreamParametersRequest& request, Code code) {
    cases.Try(what, [&] {
      const Streamed streamed = Stream(daemon, request);
      Daemon::Refused("StreamParameters", streamed.status, code);
      Require(streamed.chunks.empty(), "chunks came before the refusal");
    });
  };
  refuse("a name that is none", StreamOf(rig, {kBias, "layers.0.nothing"}), Code::NOT_FOUND);
  auto request = StreamOf(rig);
  request.set_stack("no-such-stack");
  refuse("a stack that is none", request, Code::NOT_FOUND);
  request = StreamOf(rig);
  request.set_dtype(v1::DATA_TYPE_INT32);
  refuse("int32", request, Code::INVALID_ARGUMENT);
  request.set_dtype(v1::DATA_TYPE_BFLOAT16);
  request.set_gradients(true);
  refuse("gradients in bf16", request, Code::INVALID_ARGUMENT);
  cases.Done();
}

// A stack whose values pass the inline cap.
void StreamsWhatPassesTheCap(Daemon& daemon) {
  const uint64_t cap = daemon.info().inline_cap_bytes();
  if (cap > uint64_t{64} << 20) Skip("the inline cap is ", cap, " bytes: the stack would be large");
  v1::StackConfig config = SmallConfig();
  // Four bytes for each of 12 H^2 weights of a layer, without optimizer state.
  const double hidden = std::sqrt(static_cast<double>(cap) / 48);
  config.set_hidden_size((static_cast<int64_t>(hidden) / 64 + 1) * 64);
  config.clear_intermediate_size();
  config.set_num_hidden_layers(1);
  config.set_training(false);
  const Rig rig(daemon, config);
  daemon.Refuses(rig.Parameters(), Code::INVALID_ARGUMENT,
                 {"target", std::to_string(cap), "StreamParameters"});
  const std::vector<v1::NamedTensor> streamed = Assemble(Stream(daemon, StreamOf(rig)), cap);
  uint64_t bytes = 0;
  for (const auto& named : streamed) {
    const auto& shape = named.tensor().shape();
    const uint64_t whole = 4 * static_cast<uint64_t>(Elements({shape.begin(), shape.end()}));
    Require(named.tensor().inline_data().size() == whole, named.name(), " comes with ",
            named.tensor().inline_data().size(), " of its ", whole, " bytes");
    bytes += whole;
  }
  Require(bytes > cap && streamed.size() == 12, "the stream has ", streamed.size(),
          " tensors of the layer's twelve, ", bytes, " bytes");
  const std::string& bias = streamed[1].name();
  RequireSame(daemon.Ok(rig.Parameters({bias})).tensors(), {streamed[1]});
}

void ReadsIntoSlices(Daemon& daemon) {
  Rig rig(daemon);
  daemon.Ok(rig.Backward(rig.Context()));
  rig.session.Applied();
  const MappedRegion region(daemon, rig.session.id(), 8192);
  const uint64_t size = (24 + 48 * 16) * 4, offset = 64;
  const auto compare = [&](auto by_slice, const auto& inlined) {
    std::memset(region.bytes(), 0x5a, region.length());
    by_slice.set_session_id(rig.session.id());
    *by_slice.mutable_target() = SliceTarget(region.Slice(offset, size));
    const auto answer = daemon.Ok(by_slice);
    uint64_t at = offset;
    for (int i = 0; i < 2; ++i) {
      const v1::Slice& slice = answer.tensors(i).tensor().slice();
      const std::string& expected = inlined.tensors(i).tensor().inline_data();
      Require(slice.region_id() == region.id() && slice.offset_bytes() == at &&
                  slice.size_bytes() == expected.size(),
              "the tensors do not lie one after another in the slice");
      Require(std::memcmp(region.bytes() + at, expected.data(), expected.size()) == 0,
              "the slice has other values of ", answer.tensors(i).name(), " than the message");
      at += expected.size();
    }
    for (uint64_t i = 0; i < region.length(); ++i) {
      Require((i >= offset && i < offset + size) || region.bytes()[i] == 0x5a, "byte ", i,
              " outside the slice was written");
    }
    Cases cases;
    for (const uint64_t wrong : {size - 4, size + 4}) {
      cases.Try(absl::StrCat(wrong, " bytes for ", size), [&] {
        *by_slice.mutable_target() = SliceTarget(region.Slice(offset, wrong));
        daemon.Refuses(by_slice, Code::INVALID_ARGUMENT, {"size_bytes", std::to_string(size)});
      });
    }
    cases.Done();
  };
  compare(rig.Parameters({kBias, kQkv}), daemon.Ok(rig.Parameters({kBias, kQkv})));
  compare(rig.Gradients({kBias, kQkv}), daemon.Ok(rig.Gradients({kBias, kQkv})));
}

void GradientsNeedTraining(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_training(false);
  const Rig rig(daemon, config);
  daemon.Refuses(rig.Gradients(), Code::FAILED_PRECONDITION, {"training"});
  auto stream = StreamOf(rig);
  stream.set_gradients(true);
  Daemon::Refused("StreamParameters", Stream(daemon, stream).status, Code::FAILED_PRECONDITION,
                  {"training"});
}

// The nearest bfloat16, ties to even.
uint16_t ToBFloat16(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void KeepsMasterWeights(Daemon& daemon) {
  v1::StackConfig config = SmallConfig();
  config.set_dtype(v1::DATA_TYPE_BFLOAT16);
  Rig rig(daemon, config);
  const Floats values = Values(24, 6);
  rig.Mutate(rig.Set(kBias, Inline({24}, values)));
  Require(FloatsOf(daemon.Ok(rig.Parameters({kBias})).tensors(0).tensor()) == values,
          "the master weights are not the fp32 values that were written");
  auto typed = rig.Parameters({kBias});
  typed.set_dtype(v1::DATA_TYPE_BFLOAT16);
  const v1::Tensor weights = daemon.Ok(typed).tensors(0).tensor();
  Require(weights.dtype() == v1::DATA_TYPE_BFLOAT16 && weights.inline_data().size() == 48,
          "the weights do not come as 24 bf16 values");
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t got = 0;
    std::memcpy(&got, weights.inline_data().data() + 2 * i, 2);
    Require(got == ToBFloat16(values[i]), "weight ", i, " is not the nearest bf16 of ", values[i]);
  }
}

}  // namespace

Group ParameterChecks() {
  return {
      "parameters",
      "Parameters and gradients by name",
      {
          {"parameters.get",
           "GetParameters gives the named ones in the names' order, all without names",
           [](Daemon& daemon) {
             const Rig rig(daemon);
             const auto all = daemon.Ok(rig.Parameters());
             Require(all.tensors_size() == 24, "no names give ", all.tensors_size(), " tensors");
             const auto two = daemon.Ok(rig.Parameters({kQkv, kBias}));
             Require(two.tensors_size() == 2 && two.tensors(0).name() == kQkv &&
                         two.tensors(1).name() == kBias,
                     "the tensors are not in the order of the names");
             for (const auto& named : all.tensors()) {
               FloatsOf(named.tensor());
               for (const auto& other : two.tensors())
                 Require(other.name() != named.name() || Bytes(other) == Bytes(named), named.name(),
                         " alone is another than among all");
             }
           }},
          {"parameters.parts", "attn_q*, attn_k* and attn_v* are the rows of the fused tensors",
           PartsAreTheFusedOnesRows},
          {"parameters.get-errors",
           "A read of what is not there is NOT_FOUND, one in another dtype INVALID_ARGUMENT",
           RefusesBadReads},
          {"parameters.stream", "StreamParameters gives what GetParameters gives, gradients too",
           [](Daemon& daemon) {
             Rig rig(daemon);
             rig.Mutate(rig.Backward(rig.Context()));
             const uint64_t cap = daemon.info().inline_cap_bytes();
             auto request = StreamOf(rig);
             RequireSame(daemon.Ok(rig.Parameters()).tensors(),
                         Assemble(Stream(daemon, request), cap));
             request.set_gradients(true);
             RequireSame(daemon.Ok(rig.Gradients()).tensors(),
                         Assemble(Stream(daemon, request), cap));
           }},
          {"parameters.stream-errors", "StreamParameters refuses what GetParameters refuses",
           StreamsRefuseToo},
          {"parameters.inline-cap",
           "More than the inline cap is INVALID_ARGUMENT inline, and streams in chunks below it",
           StreamsWhatPassesTheCap},
          {"parameters.slice",
           "Into a slice the tensors come one after another, and nothing beside it is written",
           ReadsIntoSlices},
          {"parameters.set", "SetParameters writes what GetParameters reads, and nothing else",
           SetsWhatGetReads},
          {"parameters.set-errors",
           "A SetParameters that is refused names what is wrong and writes nothing at all",
           SetsAllOrNone},
          {"parameters.master",
           "A bf16 stack keeps fp32 master weights, and its weights are the nearest bf16",
           KeepsMasterWeights},
          {"parameters.gradients-training-off",
           "Gradients with training off are FAILED_PRECONDITION", GradientsNeedTraining},
      }};
}

}  // namespace lamina::conformance
