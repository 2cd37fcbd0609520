// Regions, slices of them, and the broker: what a daemon that maps memory must check.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "cli/conformance/broker_socket.h"
#include "cli/conformance/busy.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

constexpr uint64_t kDevicePage = uint64_t{2} << 20;
constexpr uint64_t kActivation = 3 * 5 * 16 * 4;  // bytes of the small stack's

v1::CreateRegionRequest RegionOf(const std::string& session_id, uint64_t size_bytes,
                                 v1::RegionKind kind = v1::REGION_KIND_UNSPECIFIED) {
  v1::CreateRegionRequest request;
  request.set_session_id(session_id);
  request.set_size_bytes(size_bytes);
  request.set_kind(kind);
  return request;
}

bool OffersDevice(Daemon& daemon) {
  for (const int transport : daemon.info().transports())
    if (transport == v1::TRANSPORT_DEVICE) return true;
  return false;
}

void NeedDevice(Daemon& daemon) {
  daemon.NeedRegions();
  if (!OffersDevice(daemon)) Skip("this daemon offers no device regions");
}

v1::ListRegionsRequest List(const std::string& session_id) {
  v1::ListRegionsRequest request;
  request.set_session_id(session_id);
  return request;
}

v1::ReleaseRegionRequest ReleaseOf(const std::string& session_id, const std::string& region_id) {
  v1::ReleaseRegionRequest request;
  request.set_session_id(session_id);
  request.set_region_id(region_id);
  return request;
}

// A rig with a region that holds its input first.
struct HandleRig : Rig {
  explicit HandleRig(Daemon& of) : Rig(of), region(of, session.id(), 3 * 4096) {
    std::memcpy(region.bytes(), x.inline_data().data(), kActivation);
  }
  v1::ForwardRequest EvaluateSlice(uint64_t offset, uint64_t size = kActivation) const {
    return Evaluate(InSlice(shape, region.Slice(offset, size)));
  }
  MappedRegion region;
};

// A tensor or target of a call, as that call with this slice there; all else is right with it.
struct Place {
  const char* field;
  uint64_t bytes;  // that the slice must have
  std::function<grpc::Status(const v1::Slice&)> call;
};

std::vector<Place> EveryPlace(Rig& rig, const std::string& context) {
  Daemon& daemon = rig.daemon;
  const auto forward = [&](auto put) {
    return [&rig, &daemon, put](const v1::Slice& slice) {
      v1::ForwardRequest request = rig.Evaluate();
      put(&request, slice);
      return daemon.Call(request).status;
    };
  };
  const auto backward = [&](auto put) {
    return [&rig, &daemon, context, put](const v1::Slice& slice) {
      v1::BackwardRequest request = rig.Backward(context);
      put(&request, slice);
      return daemon.Call(request).status;
    };
  };
  const auto integers = [](int64_t count, const v1::Slice& slice) {
    v1::Tensor tensor = InSlice({count}, slice);
    tensor.set_dtype(v1::DATA_TYPE_INT32);
    return tensor;
  };
  return {
      {"input", kActivation, forward([](auto* f, const v1::Slice& slice) {
         *f->mutable_input()->mutable_slice() = slice;
       })},
      {"output", kActivation,
       forward([](auto* f, const v1::Slice& slice) { *f->mutable_output() = SliceTarget(slice); })},
      {"mask", 3 * 5 * 4, forward([](auto* f, const v1::Slice& slice) {
         *f->mutable_mask() = InSlice({3, 5}, slice);
       })},
      {"lengths", 3 * 4, forward([=](auto* f, const v1::Slice& slice) {
         *f->mutable_lengths() = integers(3, slice);
       })},
      {"cumulative_lengths", 3 * 4, forward([=](auto* f, const v1::Slice& slice) {
         *f->mutable_input() = Inline({6, 16}, Floats(96, 0.5f));
         *f->mutable_cumulative_lengths() = integers(3, slice);
       })},
      {"output_grad", kActivation, backward([](auto* b, const v1::Slice& slice) {
         *b->mutable_output_grad()->mutable_slice() = slice;
       })},
      {"input_grad", kActivation, backward([](auto* b, const v1::Slice& slice) {
         *b->mutable_input_grad() = SliceTarget(slice);
       })},
      {"tensors[0].tensor", 24 * 4,
       [&](const v1::Slice& slice) {
         return daemon.Call(rig.Set("layers.0.inter_b", InSlice({24}, slice))).status;
       }},
      {"target", 24 * 4,
       [&](const v1::Slice& slice) {
         auto request = rig.Parameters({"layers.0.inter_b"});
         request.set_session_id(rig.session.id());
         *request.mutable_target() = SliceTarget(slice);
         return daemon.Call(request).status;
       }},
      {"target", 24 * 4,
       [&](const v1::Slice& slice) {
         auto request = rig.Gradients({"layers.0.inter_b"});
         request.set_session_id(rig.session.id());
         *request.mutable_target() = SliceTarget(slice);
         return daemon.Call(request).status;
       }},
  };
}

// What is wrong with slices of a region where these bytes are wanted.
using BadSlices = std::function<std::vector<v1::Slice>(const MappedRegion&, uint64_t bytes)>;

// Each bad slice is refused in every place, with the field and the word, and nothing has changed.
void RefusesInEveryPlace(Daemon& daemon, Code code, const std::string& word,
                         const BadSlices& bad_slices) {
  HandleRig rig(daemon);
  const std::string context = rig.Context();
  const StackState before = rig.State();
  const std::string memory(rig.region.bytes(), rig.region.length());
  Cases cases;
  for (const Place& place : EveryPlace(rig, context)) {
    for (const v1::Slice& slice : bad_slices(rig.region, place.bytes)) {
      cases.Try(absl::StrCat(place.field, ", offset ", slice.offset_bytes(), ", size ",
                             slice.size_bytes()),
                [&] {
                  const grpc::Status status = place.call(slice);
                  Daemon::Refused("the call", status, code, {place.field, word});
                });
    }
  }
  cases.Done();
  rig.RequireUnchanged(before, "a refused slice");
  Require(std::memcmp(rig.region.bytes(), memory.data(), memory.size()) == 0,
          "a refused slice has changed the region");
  daemon.Ok(rig.EvaluateSlice(0));
}

void TakesAndGivesSlices(Daemon& daemon) {
  HandleRig rig(daemon);
  const std::string expected = daemon.Ok(rig.Evaluate()).output().inline_data();
  const uint64_t at = 4096 + 256;
  std::memset(rig.region.bytes() + 4096, 0x5a, 2 * 4096);
  v1::ForwardRequest request = rig.EvaluateSlice(0);
  *request.mutable_output() = SliceTarget(rig.region.Slice(at, kActivation));
  const auto answer = daemon.Ok(request);
  Require(answer.input_transport() == v1::TRANSPORT_MEMFD &&
              answer.output_transport() == v1::TRANSPORT_MEMFD,
          "slices are not reported as MEMFD");
  Require(Bytes(answer.output().slice()) == Bytes(request.output().slice()),
          "the output's slice is not the one that was asked for");
  Require(std::memcmp(rig.region.bytes() + at, expected.data(), kActivation) == 0,
          "the output in the slice is another than the inline one");
  for (uint64_t i = 4096; i < rig.region.length(); ++i)
    Require((i >= at && i < at + kActivation) || rig.region.bytes()[i] == 0x5a, "byte ", i,
            " outside the output's slice was written");
  Require(std::memcmp(rig.region.bytes(), rig.x.inline_data().data(), kActivation) == 0,
          "the input has changed");
  // The last bytes of the region are the region's too.
  const uint64_t last = rig.region.length() - kActivation;
  std::memcpy(rig.region.bytes() + last, rig.x.inline_data().data(), kActivation);
  Require(daemon.Ok(rig.EvaluateSlice(last)).output().inline_data() == expected,
          "an input at the region's end gives another output");
}

void GradientsThroughSlices(Daemon& daemon) {
  HandleRig rig(daemon);
  std::memcpy(rig.region.bytes(), rig.dy.inline_data().data(), kActivation);
  const auto inlined = rig.Mutate(rig.Backward(rig.Context()));
  v1::BackwardRequest request = rig.Backward(rig.Context());
  *request.mutable_output_grad() = InSlice(rig.shape, rig.region.Slice(0, kActivation));
  *request.mutable_input_grad() = SliceTarget(rig.region.Slice(4096, kActivation));
  const auto answer = rig.Mutate(request);
  Require(answer.input_transport() == v1::TRANSPORT_MEMFD &&
              answer.output_transport() == v1::TRANSPORT_MEMFD,
          "slices are not reported as MEMFD");
  Require(std::memcmp(rig.region.bytes() + 4096, inlined.input_grad().inline_data().data(),
                      kActivation) == 0,
          "the input's gradient in the slice is another than the inline one");
}

void RefusesOverlap(Daemon& daemon) {
  HandleRig rig(daemon);
  const std::string context = rig.Context();
  const StackState before = rig.State();
  Cases cases;
  for (const uint64_t offset : {uint64_t{0}, uint64_t{4}, kActivation - 4}) {
    cases.Try(absl::StrCat("output at ", offset), [&] {
      v1::ForwardRequest request = rig.EvaluateSlice(0);
      *request.mutable_output() = SliceTarget(rig.region.Slice(offset, kActivation));
      daemon.Refuses(request, Code::INVALID_ARGUMENT, {"output", "overlap"});
    });
    cases.Try(absl::StrCat("input_grad at ", offset), [&] {
      v1::BackwardRequest request = rig.Backward(context);
      *request.mutable_output_grad() = InSlice(rig.shape, rig.region.Slice(0, kActivation));
      *request.mutable_input_grad() = SliceTarget(rig.region.Slice(offset, kActivation));
      daemon.Refuses(request, Code::INVALID_ARGUMENT, {"input_grad", "overlap"});
    });
  }
  cases.Done();
  rig.RequireUnchanged(before, "a refused overlap");
  // Side by side is no overlap.
  v1::ForwardRequest request = rig.EvaluateSlice(0);
  *request.mutable_output() = SliceTarget(rig.region.Slice(kActivation, kActivation));
  daemon.Ok(request);
}

void RegionsAreTheirSessions(Daemon& daemon) {
  OwnSession other(daemon);
  const MappedRegion theirs(daemon, other.id(), 4096);
  RefusesInEveryPlace(daemon, Code::NOT_FOUND, "region_id",
                      [&](const MappedRegion&, uint64_t bytes) {
                        return std::vector<v1::Slice>{theirs.Slice(0, bytes)};
                      });
  const OwnSession mine(daemon);
  daemon.Refuses(ReleaseOf(mine.id(), theirs.id()), Code::NOT_FOUND, {"region_id"});
  Require(daemon.Ok(List(mine.id())).regions_size() == 0, "another session's region is listed");
  Require(daemon.Ok(List(other.id())).regions_size() == 1, "the owner's region is gone");
}

void SealsItsMemory(Daemon& daemon) {
  const OwnSession session(daemon);
  daemon.NeedRegions();
  const auto region = daemon.Ok(RegionOf(session.id(), 1)).region();
  const BrokerAnswer answer =
      AskBroker(daemon.session_info().broker_path(), session.id(), region.region_id());
  Require(answer.code == Code::OK && answer.descriptor >= 0, "the broker hands out no descriptor");
  struct Closer {
    int descriptor;
    ~Closer() { close(descriptor); }
  } closer{answer.descriptor};
  Require(answer.length == region.length_bytes(), "the broker tells a length of ", answer.length,
          "; CreateRegion told ", region.length_bytes());
  struct stat info {};
  Require(fstat(answer.descriptor, &info) == 0 &&
              static_cast<uint64_t>(info.st_size) == region.length_bytes(),
          "the file has ", info.st_size, " bytes");
  const int seals = fcntl(answer.descriptor, F_GET_SEALS);
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  Require(seals >= 0 && (seals & kNeeded) == kNeeded,
          "the memory is not sealed with SHRINK, GROW and SEAL: seals are ", seals);
  Require(ftruncate(answer.descriptor, 0) != 0, "a client can shrink the region");
  Require(ftruncate(answer.descriptor, 1 << 20) != 0, "a client can grow the region");
  Require(fcntl(answer.descriptor, F_ADD_SEALS, F_SEAL_WRITE) != 0, "a client can add seals");
}

void BrokerRefuses(Daemon& daemon) {
  daemon.NeedRegions();
  const std::string& path = daemon.session_info().broker_path();
  const OwnSession mine(daemon), other(daemon);
  const MappedRegion region(daemon, mine.id(), 1);
  const std::string unknown(32, '0');
  Cases cases;
  const auto not_found = [&](const char* what, const std::string& session, const std::string& id) {
    cases.Try(what, [&] {
      const BrokerAnswer answer = AskBroker(path, session, id);
      if (answer.descriptor >= 0) close(answer.descriptor);
      Require(!answer.closed && answer.code == Code::NOT_FOUND, "the broker answers ",
              answer.closed ? "nothing" : CodeName(answer.code), "; it must be NOT_FOUND");
      Require(answer.length == 0 && answer.descriptor < 0,
              "a refusal comes with a length or a descriptor");
    });
  };
  not_found("a session that is none", unknown, region.id());
  not_found("a region that is none", mine.id(), unknown);
  not_found("another session's region", other.id(), region.id());
  not_found("the two ids changed over", region.id(), mine.id());
  const std::string good = BrokerRequest(mine.id(), region.id());
  for (const std::string& packet :
       {std::string("?"), good.substr(0, good.size() - 1), good + "0", "LMN2" + good.substr(4)}) {
    cases.Try(absl::StrCat("a packet of ", packet.size(), " bytes that is no request"), [&] {
      const BrokerAnswer answer = BrokerSocket(path).Ask(packet);
      if (answer.descriptor >= 0) close(answer.descriptor);
      Require(answer.closed, "the broker answers ", CodeName(answer.code),
              "; it must close the connection");
    });
  }
  cases.Done();
  // Several requests on one connection, good ones after refused ones.
  BrokerSocket socket(path);
  for (const bool is_good : {true, false, true}) {
    const BrokerAnswer answer = socket.Ask(is_good ? good : BrokerRequest(unknown, unknown));
    if (answer.descriptor >= 0) close(answer.descriptor);
    Require(answer.code == (is_good ? Code::OK : Code::NOT_FOUND) && !answer.closed,
            "the second or third request on a connection is not answered like the first");
  }
}

void ReleasedIsGone(Daemon& daemon) {
  const OwnSession session(daemon);
  const MappedRegion region(daemon, session.id(), 4096);
  std::memset(region.bytes(), 0x3c, region.length());
  daemon.Ok(ReleaseOf(session.id(), region.id()));
  daemon.Refuses(ReleaseOf(session.id(), region.id()), Code::NOT_FOUND, {"region_id"});
  Require(daemon.Ok(List(session.id())).regions_size() == 0, "a released region is listed");
  const BrokerAnswer answer =
      AskBroker(daemon.session_info().broker_path(), session.id(), region.id());
  if (answer.descriptor >= 0) close(answer.descriptor);
  Require(answer.code == Code::NOT_FOUND, "the broker hands a released region out");
  for (uint64_t i = 0; i < region.length(); ++i)
    Require(region.bytes()[i] == 0x3c, "the client's mapping has changed with the release");
}

// How a Forward ends that waits for the device while `end` takes its region away after this pause.
// With OK its output must have been written: to the client's mapping, which outlives the region.
grpc::Status EndDuringUse(Daemon& daemon, Milliseconds pause,
                          const std::function<void(const HandleRig&)>& end) {
  HandleRig rig(daemon);
  const std::string expected = daemon.Ok(rig.Evaluate()).output().inline_data();
  Busy busy(daemon);
  v1::ForwardRequest request = rig.EvaluateSlice(0);
  *request.mutable_output() = SliceTarget(rig.region.Slice(4096, kActivation));
  busy.Start(3 * pause);
  grpc::Status status;
  std::thread waiting([&] {
    grpc::ClientContext context;
    daemon.Prepare(&context);
    v1::ForwardResponse response;
    status = daemon.layers().Forward(&context, request, &response);
  });
  std::this_thread::sleep_for(pause);
  try {
    end(rig);
  } catch (...) {
    waiting.join();
    throw;
  }
  waiting.join();
  busy.Join();
  daemon.Count(v1::LayerService::service_full_name(), "Forward", status);
  if (status.ok()) {
    Require(std::memcmp(rig.region.bytes() + 4096, expected.data(), kActivation) == 0,
            "the Forward that used the region has not written its output");
  }
  return status;
}

void FinishesWhatUsesTheRegion(Daemon& daemon, const std::function<void(const HandleRig&)>& end) {
  grpc::Status status;
  for (const Milliseconds pause : {Milliseconds(50), Milliseconds(150), Milliseconds(300)}) {
    status = EndDuringUse(daemon, pause, end);
    // On a busy machine the call may have come later than the region's end; then once more.
    if (status.error_code() != Code::NOT_FOUND) break;
  }
  Require(status.ok(), "the Forward that used the region answers ", Describe(status));
}

}  // namespace

Group HandleChecks() {
  return {
      "handles",
      "Regions, slices and the broker",
      {
          {"handles.create",
           "A region has the wanted bytes, rounded up to whole pages, and an id of its own",
           [](Daemon& daemon) {
             const OwnSession session(daemon);
             const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
             std::vector<std::string> ids;
             for (const uint64_t size : {uint64_t{1}, page, page + 1}) {
               const auto region = daemon.Ok(RegionOf(session.id(), size)).region();
               Require(region.length_bytes() == (size + page - 1) / page * page, size,
                       " bytes give a region of ", region.length_bytes());
               Require(region.kind() == v1::REGION_KIND_MEMFD, "its kind is not MEMFD");
               Require(region.region_id().size() == 32 &&
                           std::all_of(region.region_id().begin(), region.region_id().end(),
                                       absl::ascii_isxdigit),
                       "its id is not 32 hexadecimal digits");
               ids.push_back(region.region_id());
             }
             const auto listed = daemon.Ok(List(session.id()));
             for (int i = 0; i < 3; ++i)
               Require(listed.regions_size() == 3 &&
                           listed.regions(i).region_id() == ids[static_cast<size_t>(i)],
                       "ListRegions has not the three in order of creation");
           }},
          {"handles.create-errors",
           "CreateRegion refuses a size of 0 or beyond measure, a kind that is none, and no "
           "session",
           [](Daemon& daemon) {
             const OwnSession session(daemon);
             const std::string& id = session.id();
             daemon.Refuses(RegionOf(id, 0), Code::INVALID_ARGUMENT, {"size_bytes"});
             daemon.Refuses(RegionOf(id, ~uint64_t{0}), Code::INVALID_ARGUMENT, {"size_bytes"});
             daemon.Refuses(RegionOf(id, 1, static_cast<v1::RegionKind>(99)),
                            Code::INVALID_ARGUMENT, {"kind"});
             daemon.Refuses(RegionOf(std::string(32, '0'), 1), Code::NOT_FOUND, {"session"});
             daemon.Refuses(List(std::string(32, '0')), Code::NOT_FOUND, {"session"});
             daemon.Refuses(ReleaseOf(std::string(32, '0'), ""), Code::NOT_FOUND, {"session"});
             daemon.Refuses(ReleaseOf(id, std::string(32, '0')), Code::NOT_FOUND, {"region_id"});
             Require(daemon.Ok(List(id)).regions_size() == 0, "a refused call has made a region");
           }},
          {"handles.kind-not-offered", "A kind that this daemon does not offer is UNIMPLEMENTED",
           [](Daemon& daemon) {
             if (OffersDevice(daemon)) Skip("this daemon offers device regions");
             const OwnSession session(daemon);
             for (const auto kind : {v1::REGION_KIND_DEVICE, v1::REGION_KIND_DEVICE_IPC})
               daemon.Refuses(RegionOf(session.id(), 4096, kind), Code::UNIMPLEMENTED,
                              {"kind", v1::RegionKind_Name(kind)});
           }},
          {"handles.device-regions",
           "A region in device memory says what it is; the broker gives its descriptor or handle",
           [](Daemon& daemon) {
             NeedDevice(daemon);
             const OwnSession session(daemon);
             for (const auto kind : {v1::REGION_KIND_DEVICE, v1::REGION_KIND_DEVICE_IPC}) {
               const auto made = daemon.Call(RegionOf(session.id(), kDevicePage + 1, kind));
               if (made.status.error_code() == Code::UNIMPLEMENTED) continue;  // the driver can't
               Require(made.status.ok(), made.status.error_message());
               const v1::Region& region = made.response.region();
               Require(region.kind() == kind, "the region is of another kind");
               Require(region.length_bytes() == 2 * kDevicePage, "its length is ",
                       region.length_bytes(), ", not whole pages of 2 MiB");
               Require(region.device_uuid() == daemon.info().device_uuid(),
                       "device_uuid is not that of GetServerInfo");
               const BrokerAnswer answer =
                   AskBroker(daemon.session_info().broker_path(), session.id(), region.region_id());
               Require(answer.code == Code::OK && answer.length == region.length_bytes(),
                       "the broker answered ", CodeName(answer.code), ", length ", answer.length);
               if (kind == v1::REGION_KIND_DEVICE) {
                 Require(answer.descriptor >= 0, "the broker gave no descriptor");
                 close(answer.descriptor);
               } else {
                 Require(answer.handle.size() == 64, "the broker gave no handle of 64 bytes");
               }
             }
           }},
          {"handles.device-slices",
           "Steps and parameters take and give slices of device memory, to the bit, and say so",
           [](Daemon& daemon) {
             NeedDevice(daemon);
             Rig rig(daemon);
             const v1::Region region =
                 daemon.Ok(RegionOf(rig.session.id(), kDevicePage, v1::REGION_KIND_DEVICE))
                     .region();
             const auto slice = [&](uint64_t offset, uint64_t bytes) {
               v1::Slice s;
               s.set_region_id(region.region_id());
               s.set_offset_bytes(offset);
               s.set_size_bytes(bytes);
               return s;
             };
             // Without a CUDA library values come in and out by calls: an output that was left in
             // the region is the next call's input.
             const std::string once = daemon.Ok(rig.Evaluate()).output().inline_data();
             v1::ForwardRequest first = rig.Evaluate();
             *first.mutable_output() = SliceTarget(slice(4096, kActivation));
             const v1::ForwardResponse gave = daemon.Ok(first);
             Require(gave.output_transport() == v1::TRANSPORT_DEVICE,
                     "the output's transport is not TRANSPORT_DEVICE");
             v1::ForwardRequest again = rig.Evaluate();
             again.mutable_input()->set_inline_data(once);
             const std::string twice = daemon.Ok(again).output().inline_data();
             const auto in_place =
                 daemon.Ok(rig.Evaluate(InSlice(rig.shape, slice(4096, kActivation))));
             Require(in_place.input_transport() == v1::TRANSPORT_DEVICE,
                     "the input's transport is not TRANSPORT_DEVICE");
             Require(in_place.output().inline_data() == twice,
                     "an output that was left in device memory is not what came inline");
             // Each check of a slice holds there too.
             for (const uint64_t offset :
                  {kDevicePage - kActivation + 4, kDevicePage, ~uint64_t{3}, ~uint64_t{0} - 63})
               daemon.Refuses(rig.Evaluate(InSlice(rig.shape, slice(offset, kActivation))),
                              Code::INVALID_ARGUMENT, {"input.slice"});
             daemon.Refuses(rig.Evaluate(InSlice(rig.shape, slice(2, kActivation))),
                            Code::INVALID_ARGUMENT, {"input.slice.offset_bytes"});
             first = rig.Evaluate(InSlice(rig.shape, slice(0, kActivation)));
             *first.mutable_output() = SliceTarget(slice(64, kActivation));
             daemon.Refuses(first, Code::INVALID_ARGUMENT, {"output"});
             const OwnSession other(daemon);
             const v1::Region foreign =
                 daemon.Ok(RegionOf(other.id(), kDevicePage, v1::REGION_KIND_DEVICE)).region();
             v1::Slice theirs = slice(0, kActivation);
             theirs.set_region_id(foreign.region_id());
             daemon.Refuses(rig.Evaluate(InSlice(rig.shape, theirs)), Code::NOT_FOUND,
                            {"region_id"});
             daemon.Ok(ReleaseOf(rig.session.id(), region.region_id()));
             daemon.Refuses(rig.Evaluate(InSlice(rig.shape, slice(0, kActivation))),
                            Code::NOT_FOUND, {"region_id"});
           }},
          {"handles.fences", "A call begins once its `ready` is reached, and leaves its `done`",
           [](Daemon& daemon) {
             const HandleRig rig(daemon);
             auto* number = reinterpret_cast<uint64_t*>(rig.region.bytes() + 8192);
             const auto fence = [&](uint64_t offset, uint64_t value) {
               v1::Fence f;
               *f.mutable_slice() = rig.region.Slice(8192 + offset, 8);
               f.set_value(value);
               return f;
             };
             v1::ForwardRequest request = rig.Evaluate();
             *request.mutable_done() = fence(8, 5);
             const std::string expected = daemon.Ok(request).output().inline_data();
             Require(std::atomic_ref<uint64_t>(number[1]).load() == 5,
                     "`done` was not stored when the answer came");
             request = rig.EvaluateSlice(0);
             *request.mutable_ready() = fence(0, 3);
             std::memset(rig.region.bytes(), 0, kActivation);  // not what it is to compute with
             std::thread stream([&] {
               std::this_thread::sleep_for(std::chrono::milliseconds(50));
               std::memcpy(rig.region.bytes(), rig.x.inline_data().data(), kActivation);
               std::atomic_ref<uint64_t>(number[0]).store(3);
             });
             const auto answer = daemon.Call(request);
             stream.join();
             Require(answer.status.ok(), answer.status.error_message());
             Require(answer.response.output().inline_data() == expected,
                     "a call with `ready` read its input before that was reached");
             for (const auto& [wrong, field] :
                  {std::pair(fence(0, 0), "ready.value"), std::pair(fence(4, 1), "ready.slice"),
                   std::pair(fence(4096, 1), "ready.slice")}) {
               *request.mutable_ready() = wrong;
               daemon.Refuses(request, Code::INVALID_ARGUMENT, {field});
             }
           }},
          {"handles.caps",
           "The caps on a session's regions and their bytes are RESOURCE_EXHAUSTED with the "
           "numbers",
           [](Daemon& daemon) {
             const OwnSession session(daemon);
             const uint64_t bytes = daemon.session_info().region_cap_bytes();
             daemon.Refuses(RegionOf(session.id(), bytes + 1), Code::RESOURCE_EXHAUSTED,
                            {"size_bytes", std::to_string(bytes)});
             const int64_t most = daemon.session_info().region_cap();
             if (most > 512) Skip("the cap is ", most, " regions");
             for (int64_t i = 0; i < most; ++i) daemon.Ok(RegionOf(session.id(), 1));
             daemon.Refuses(RegionOf(session.id(), 1), Code::RESOURCE_EXHAUSTED,
                            {"regions", std::to_string(most)});
           }},
          {"handles.slices",
           "Kernels read and write the slices that are named, and nothing beside them",
           TakesAndGivesSlices},
          {"handles.slices-backward", "Backward takes and gives slices as Forward does",
           GradientsThroughSlices},
          {"handles.bounds",
           "A slice must end with its region: offset_bytes <= length - size_bytes, unsigned",
           [](Daemon& daemon) {
             RefusesInEveryPlace(
                 daemon, Code::INVALID_ARGUMENT, "slice",
                 [](const MappedRegion& region, uint64_t bytes) {
                   std::vector<v1::Slice> bad;
                   for (const uint64_t offset :
                        {region.length() - bytes + 4, region.length(), uint64_t{1} << 40,
                         uint64_t{1} << 63,
                         // With these the sum of offset and size wraps around.
                         ~uint64_t{0} - bytes + 1, ~uint64_t{0} - bytes + 5, ~uint64_t{0} - 3})
                     bad.push_back(region.Slice(offset, bytes));
                   return bad;
                 });
           }},
          {"handles.size",
           "A slice's size is its shape's elements times their size, no less and no more",
           [](Daemon& daemon) {
             RefusesInEveryPlace(daemon, Code::INVALID_ARGUMENT, "slice.size_bytes",
                                 [](const MappedRegion& region, uint64_t bytes) {
                                   std::vector<v1::Slice> bad;
                                   for (const uint64_t size : {uint64_t{0}, bytes - 4, bytes + 4,
                                                               uint64_t{1} << 63, ~uint64_t{0}})
                                     bad.push_back(region.Slice(0, size));
                                   return bad;
                                 });
           }},
          {"handles.alignment", "A slice's offset is a multiple of the element size",
           [](Daemon& daemon) {
             RefusesInEveryPlace(daemon, Code::INVALID_ARGUMENT, "slice.offset_bytes",
                                 [](const MappedRegion& region, uint64_t bytes) {
                                   std::vector<v1::Slice> bad;
                                   for (const uint64_t offset : {1, 2, 3, 4097})
                                     bad.push_back(region.Slice(offset, bytes));
                                   return bad;
                                 });
           }},
          {"handles.overlap", "An output may not overlap the input, nor input_grad output_grad",
           RefusesOverlap},
          {"handles.session", "Another session's region is NOT_FOUND, in every place of every call",
           RegionsAreTheirSessions},
          {"handles.no-ids", "No error message has the id of a session or region in it",
           [](Daemon& daemon) {
             // Each answer of every check is searched for them; here are the calls that are refused
             // because of an id.
             const OwnSession mine(daemon), other(daemon);
             const auto theirs = daemon.Ok(RegionOf(other.id(), 1)).region().region_id();
             const Rig rig(daemon);
             daemon.Refuses(ReleaseOf(mine.id(), theirs), Code::NOT_FOUND);
             daemon.Refuses(ReleaseOf(theirs, mine.id()), Code::NOT_FOUND);
             daemon.Refuses(RegionOf(theirs, 1), Code::NOT_FOUND);
             v1::Slice slice;
             slice.set_region_id(theirs);
             slice.set_size_bytes(kActivation);
             daemon.Refuses(rig.Evaluate(InSlice(rig.shape, slice)), Code::NOT_FOUND);
             auto zero = rig.Zero();
             zero.mutable_mutation()->set_session_id(theirs);
             daemon.Refuses(zero, Code::NOT_FOUND);
           }},
          {"handles.seals", "A region's memory is sealed with SHRINK, GROW and SEAL",
           SealsItsMemory},
          {"handles.broker",
           "The broker answers NOT_FOUND to ids that do not fit together, and closes on what is no "
           "request",
           BrokerRefuses},
          {"handles.release",
           "A released region is NOT_FOUND everywhere; the client's mapping stays as it is",
           ReleasedIsGone},
          {"handles.release-during-use", "A call that uses a released region finishes first",
           [](Daemon& daemon) {
             FinishesWhatUsesTheRegion(daemon, [&](const HandleRig& rig) {
               daemon.Ok(ReleaseOf(rig.session.id(), rig.region.id()));
               daemon.Refuses(rig.EvaluateSlice(0), Code::NOT_FOUND, {"region_id"});
             });
           }},
          {"handles.session-end-during-use",
           "A call that uses a region of a session that ends finishes first",
           [](Daemon& daemon) {
             FinishesWhatUsesTheRegion(daemon, [&](const HandleRig& rig) {
               v1::DeleteSessionRequest request;
               request.set_session_id(rig.session.id());
               daemon.Ok(request);
             });
           }},
      }};
}

}  // namespace lamina::conformance
