// Regions in device memory: who gets them, that calls use them where they are, and how they end.
// The device is CountingBackend's, whose memory a test can map.
#include <cstring>

#include "absl/strings/str_cat.h"
#include "tests/server/service/service_rig.h"
#include "tests/server/session/broker_client.h"

namespace lamina::testing {
namespace {

constexpr size_t kPage = size_t{2} << 20;

v1::CreateRegionRequest RegionRequest(const Client& client, v1::RegionKind kind,
                                      uint64_t size = 1) {
  v1::CreateRegionRequest request;
  request.set_session_id(client.session_id);
  request.set_kind(kind);
  request.set_size_bytes(size);
  return request;
}

TEST(DeviceRegionsOnACpu, AreRefusedAndNotAdvertised) {
  Service service;
  Client client(service.address());
  for (const v1::RegionKind kind : {v1::REGION_KIND_DEVICE, v1::REGION_KIND_DEVICE_IPC}) {
    const absl::Status status = client.Send(RegionRequest(client, kind));
    EXPECT_THAT(status, IsStatus(kUnimplemented, v1::RegionKind_Name(kind)));
    EXPECT_THAT(status, IsStatus(kUnimplemented, "use REGION_KIND_MEMFD"));
  }
  const v1::GetServerInfoResponse info = client.Do(v1::GetServerInfoRequest());
  for (const int transport : info.transports()) EXPECT_NE(transport, v1::TRANSPORT_DEVICE);
  EXPECT_EQ(info.total_device_region_cap_bytes(), 0u);
}

TEST(DeviceRegionsTurnedOff, AreRefused) {
  ServiceOptions options{.host_memory = false};
  options.sessions.device_region_cap_bytes = 0;
  Service service(options);
  Client client(service.address());
  EXPECT_THAT(client.Send(RegionRequest(client, v1::REGION_KIND_DEVICE)),
              IsStatus(kUnimplemented, "--device-region-cap-bytes"));
}

class DeviceRegionTest : public ::testing::Test {
 protected:
  DeviceRegionTest() { client.Create(); }

  Service service{{.host_memory = false}};
  Client client{service.address()};
};

TEST_F(DeviceRegionTest, SayWhatTheyAre) {
  const v1::GetServerInfoResponse info = client.Do(v1::GetServerInfoRequest());
  EXPECT_EQ(info.transports(info.transports_size() - 1), v1::TRANSPORT_DEVICE);
  EXPECT_EQ(info.total_device_region_cap_bytes(), size_t{8} << 30);
  const v1::Region region =
      client.Do(RegionRequest(client, v1::REGION_KIND_DEVICE, kPage + 1)).region();
  EXPECT_EQ(region.kind(), v1::REGION_KIND_DEVICE);
  EXPECT_EQ(region.length_bytes(), 2 * kPage);
  EXPECT_EQ(region.device_uuid(), service.engine().device().uuid);
  EXPECT_EQ(region.base_offset_bytes(), 0u);
  EXPECT_TRUE(region.registered());
  EXPECT_EQ(client.Do(v1::GetServerInfoRequest()).device_region_bytes(), 2 * kPage);
  v1::ListRegionsRequest list;
  list.set_session_id(client.session_id);
  EXPECT_EQ(client.Do(list).regions(0).SerializeAsString(), region.SerializeAsString());
}

TEST_F(DeviceRegionTest, TheBrokerGivesADescriptorOrAHandle) {
  BrokerClient broker(client.broker_path);
  const std::string device =
      client.Do(RegionRequest(client, v1::REGION_KIND_DEVICE)).region().region_id();
  BrokerClient::Answer answer = broker.Ask(client.session_id, device);
  EXPECT_EQ(answer.status, 0u);
  EXPECT_EQ(answer.length, kPage);
  EXPECT_GE(answer.descriptor, 0);
  EXPECT_EQ(answer.handle, "");
  close(answer.descriptor);
  const std::string ipc =
      client.Do(RegionRequest(client, v1::REGION_KIND_DEVICE_IPC)).region().region_id();
  answer = broker.Ask(client.session_id, ipc);
  EXPECT_EQ(answer.status, 0u);
  EXPECT_EQ(answer.length, kPage);
  EXPECT_EQ(answer.descriptor, -1);
  EXPECT_EQ(answer.handle.size(), 64u);
  // To nobody else.
  Client other(service.address());
  EXPECT_EQ(broker.Ask(other.session_id, ipc).bytes,
            broker.Ask(other.session_id, std::string(32, '0')).bytes);
}

TEST_F(DeviceRegionTest, StepsTakeAndGiveThemWithNoCopyThroughTheHost) {
  for (const v1::RegionKind kind : {v1::REGION_KIND_DEVICE, v1::REGION_KIND_DEVICE_IPC}) {
    const MappedRegion region = client.Region(kPage, kind);
    const v1::ForwardRequest plain = client.TrainRequest();
    // 4: not where kernels can take it, so it is moved on the device.
    for (const uint64_t at : {uint64_t{0}, uint64_t{256}, uint64_t{4}}) {
      SCOPED_TRACE(at);
      const uint64_t to = at + 8192;
      const v1::ForwardResponse expected = client.Do(client.TrainRequest());
      client.Took();
      v1::BackwardRequest back = client.BackwardRequestFor(expected.context_id());
      back.mutable_input_grad()->mutable_inline_();
      const std::string expected_grad = client.Do(back).input_grad().inline_data();
      client.Took();

      std::memcpy(region.data + at, plain.input().inline_data().data(), kBytes);
      v1::ForwardRequest request = client.TrainRequest();
      *request.mutable_input() = SliceOf(region.id, at);
      *request.mutable_output() = TargetOf(region.id, to);
      int64_t copies = service.backend().host_copies;
      const v1::ForwardResponse answer = client.Do(request);
      client.Took();
      EXPECT_LE(service.backend().host_copies - copies, 1) << "the dropout's state, and no tensor";
      EXPECT_EQ(answer.input_transport(), v1::TRANSPORT_DEVICE);
      EXPECT_EQ(answer.output_transport(), v1::TRANSPORT_DEVICE);
      EXPECT_EQ(std::string(region.data + to, kBytes), expected.output().inline_data());
      EXPECT_EQ(std::string(region.data + at, kBytes), plain.input().inline_data());

      std::memcpy(region.data + at,
                  client.BackwardRequestFor("").output_grad().inline_data().data(), kBytes);
      back = client.BackwardRequestFor(answer.context_id());
      *back.mutable_output_grad() = SliceOf(region.id, at);
      *back.mutable_input_grad() = TargetOf(region.id, to);
      copies = service.backend().host_copies;
      const v1::BackwardResponse gave = client.Do(back);
      client.Took();
      EXPECT_EQ(service.backend().host_copies, copies);
      EXPECT_EQ(gave.input_transport(), v1::TRANSPORT_DEVICE);
      EXPECT_EQ(gave.output_transport(), v1::TRANSPORT_DEVICE);
      EXPECT_EQ(std::string(region.data + to, kBytes), expected_grad);
    }
  }
  EXPECT_GT(service.Metric("lamina_tensor_bytes_total{role=\"input\",transport=\"device\"}") +
                service.Metric("lamina_tensor_bytes_total{transport=\"device\",role=\"input\"}"),
            0);
}

TEST_F(DeviceRegionTest, OneSideMayBeThereAndTheOtherElsewhere) {
  const v1::ForwardRequest plain = client.EvalRequest();
  const std::string expected = client.Do(plain).output().inline_data();
  const MappedRegion device = client.Region(kPage, v1::REGION_KIND_DEVICE);
  const MappedRegion host = client.Region();
  std::memcpy(device.data, plain.input().inline_data().data(), kBytes);
  v1::ForwardRequest request = plain;
  *request.mutable_input() = SliceOf(device.id, 0);
  *request.mutable_output() = TargetOf(host.id, 64);
  v1::ForwardResponse answer = client.Do(request);
  EXPECT_EQ(answer.input_transport(), v1::TRANSPORT_DEVICE);
  EXPECT_EQ(answer.output_transport(), v1::TRANSPORT_MEMFD);
  EXPECT_EQ(std::string(host.data + 64, kBytes), expected);
  request = plain;
  *request.mutable_output() = TargetOf(device.id, 4096);
  answer = client.Do(request);
  EXPECT_EQ(answer.input_transport(), v1::TRANSPORT_INLINE);
  EXPECT_EQ(answer.output_transport(), v1::TRANSPORT_DEVICE);
  EXPECT_EQ(std::string(device.data + 4096, kBytes), expected);
}

TEST_F(DeviceRegionTest, MasksAndLengthsLieThereToo) {
  const MappedRegion region = client.Region(kPage, v1::REGION_KIND_DEVICE);
  v1::ForwardRequest request = client.EvalRequest();
  *request.mutable_lengths() = InlineIntegers({3, 8, 5});
  const std::string expected = client.Do(request).output().inline_data();
  const int32_t lengths[] = {3, 8, 5};
  std::memcpy(region.data + 512, lengths, sizeof(lengths));
  *request.mutable_lengths() = SliceOf(region.id, 512, sizeof(lengths), {3});
  request.mutable_lengths()->set_dtype(v1::DATA_TYPE_INT32);
  EXPECT_EQ(client.Do(request).output().inline_data(), expected);
  const int32_t bad[] = {3, 9, 5};
  std::memcpy(region.data + 512, bad, sizeof(bad));
  EXPECT_THAT(client.Send(request), IsStatus(kInvalid, "lengths[1]: is 9"));

  request = client.EvalRequest();
  *request.mutable_mask() = InlineNoise(9, {kB, kS});
  const std::string masked = client.Do(request).output().inline_data();
  std::memcpy(region.data + 260, request.mask().inline_data().data(), kB * kS * sizeof(float));
  *request.mutable_mask() = SliceOf(region.id, 260, kB * kS * sizeof(float), {kB, kS});
  EXPECT_EQ(client.Do(request).output().inline_data(), masked);
}

TEST_F(DeviceRegionTest, ParametersComeAndGo) {
  const MappedRegion region = client.Region(kPage, v1::REGION_KIND_DEVICE);
  const std::string before = client.Parameters();
  v1::GetParametersRequest get;
  get.set_stack("s");
  get.add_names("layers.1.inter_w");
  const std::string values = client.Do(get).tensors(0).tensor().inline_data();
  get.set_session_id(client.session_id);
  *get.mutable_target() = TargetOf(region.id, 64, values.size());
  EXPECT_EQ(client.Do(get).tensors(0).tensor().slice().offset_bytes(), 64u);
  EXPECT_EQ(std::string(region.data + 64, values.size()), values);

  v1::SetParametersRequest set;
  set.set_stack("s");
  *set.mutable_mutation() = client.Next();
  v1::NamedTensor* tensor = set.add_tensors();
  tensor->set_name("layers.0.inter_w");
  *tensor->mutable_tensor() = SliceOf(region.id, 64, values.size(), {32, kH});
  client.Do(set);
  client.Took();
  EXPECT_NE(client.Parameters(), before);
  get.clear_target();
  get.set_names(0, "layers.0.inter_w");
  EXPECT_EQ(client.Do(get).tensors(0).tensor().inline_data(), values);

  client.Back(client.Train());
  v1::GetGradientsRequest gradients;
  gradients.set_stack("s");
  gradients.add_names("layers.0.norm_b");
  const std::string expected = client.Do(gradients).tensors(0).tensor().inline_data();
  gradients.set_session_id(client.session_id);
  *gradients.mutable_target() = TargetOf(region.id, 0, expected.size());
  client.Do(gradients);
  EXPECT_EQ(std::string(region.data, expected.size()), expected);
}

TEST_F(DeviceRegionTest, EveryCheckOfAHandleHolds) {
  const MappedRegion region = client.Region(kPage, v1::REGION_KIND_DEVICE);
  v1::ForwardRequest request = client.EvalRequest();
  const auto with = [&](uint64_t offset, uint64_t size = kBytes) {
    *request.mutable_input() = SliceOf(region.id, offset, size);
    return client.Send(request);
  };
  EXPECT_OK(with(kPage - kBytes));
  EXPECT_THAT(with(kPage - kBytes + 4), IsStatus(kInvalid, "passes the region's end"));
  EXPECT_THAT(with(~uint64_t{3}), IsStatus(kInvalid, "passes the region's end"));
  EXPECT_THAT(with(2), IsStatus(kInvalid, "multiple of the element size"));
  EXPECT_THAT(with(0, kBytes - 4), IsStatus(kInvalid, "size_bytes"));
  *request.mutable_output() = TargetOf(region.id, 64);
  EXPECT_THAT(with(0), IsStatus(kInvalid, "overlaps input"));
  request.clear_output();
  Client other(service.address());
  const MappedRegion foreign = other.Region(kPage, v1::REGION_KIND_DEVICE);
  *request.mutable_input() = SliceOf(foreign.id, 0);
  EXPECT_THAT(client.Send(request), IsStatus(kNotFound, "input.slice.region_id"));
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(region.id);
  client.Do(release);
  EXPECT_THAT(with(0), IsStatus(kNotFound, "input.slice.region_id"));
}

TEST_F(DeviceRegionTest, TheySurviveTheReleaseUntilTheCallThatUsesThemIsDone) {
  MappedRegion region = client.Region(kPage, v1::REGION_KIND_DEVICE);
  v1::ForwardRequest request = client.EvalRequest();
  const std::string expected = client.Do(request).output().inline_data();
  std::memcpy(region.data, request.input().inline_data().data(), kBytes);
  *request.mutable_input() = SliceOf(region.id, 0);
  service.backend().hold_op = 0;
  v1::ForwardResponse answer;
  std::thread call([&] { EXPECT_OK(client.Send(request, &answer)); });
  WaitUntil([&] { return service.backend().holding.load(); });
  v1::ReleaseRegionRequest release;
  release.set_session_id(client.session_id);
  release.set_region_id(region.id);
  client.Do(release);
  EXPECT_EQ(service.backend().shared_bytes, kPage);
  service.backend().holding = false;
  call.join();
  EXPECT_EQ(answer.output().inline_data(), expected);
  WaitUntil([&] { return service.backend().shared_bytes == 0; });
}

TEST_F(DeviceRegionTest, EndWithTheirSession) {
  {
    Client other(service.address());
    other.Do(RegionRequest(other, v1::REGION_KIND_DEVICE, 3 * kPage));
    other.Do(RegionRequest(other, v1::REGION_KIND_DEVICE_IPC));
    EXPECT_EQ(service.backend().shared_bytes, 4 * kPage);
    EXPECT_EQ(service.sessions().live_device_regions(), 2);
    EXPECT_EQ(service.sessions().live_regions(), 0);
    v1::DeleteSessionRequest end;
    end.set_session_id(other.session_id);
    other.Do(end);
  }
  EXPECT_EQ(service.backend().shared_bytes, 0u);
  EXPECT_EQ(service.sessions().live_device_regions(), 0);
  EXPECT_EQ(service.sessions().device_region_bytes(), 0u);
}

TEST(DeviceRegionCaps, HoldForTheSessionAndForAll) {
  ServiceOptions options{.host_memory = false};
  options.sessions.device_region_cap_bytes = 2 * kPage;
  options.sessions.total_device_region_cap_bytes = 3 * kPage;
  options.sessions.region_cap_bytes = 1 << 16;  // the other caps are the host's alone
  Service service(options);
  Client one(service.address()), two(service.address());
  one.Do(RegionRequest(one, v1::REGION_KIND_DEVICE, 2 * kPage));
  EXPECT_THAT(one.Send(RegionRequest(one, v1::REGION_KIND_DEVICE)),
              IsStatus(kExhausted, absl::StrCat("have ", 2 * kPage, " of at most ", 2 * kPage)));
  EXPECT_THAT(two.Send(RegionRequest(two, v1::REGION_KIND_DEVICE_IPC, kPage + 1)),
              IsStatus(kExhausted, absl::StrCat("have ", 2 * kPage, " of at most ", 3 * kPage)));
  EXPECT_OK(two.Send(RegionRequest(two, v1::REGION_KIND_DEVICE_IPC, kPage)));
  EXPECT_OK(two.Send(RegionRequest(two, v1::REGION_KIND_MEMFD, 4096)));
  EXPECT_EQ(service.backend().shared_bytes, 3 * kPage);
}

TEST_F(DeviceRegionTest, WhatTheDeviceHasNotIsRefusedAndUncharged) {
  service.backend().free_bytes = kPage - 1;
  EXPECT_THAT(client.Send(RegionRequest(client, v1::REGION_KIND_DEVICE)),
              IsStatus(kExhausted, absl::StrCat(kPage - 1)));
  service.backend().free_bytes = CountingBackend::kAsItIs;
  service.backend().fail_shared = true;
  EXPECT_THAT(client.Send(RegionRequest(client, v1::REGION_KIND_DEVICE)),
              IsStatus(kExhausted, "on demand"));
  service.backend().fail_shared = false;
  EXPECT_EQ(service.sessions().device_region_bytes(), 0u);
  EXPECT_EQ(service.sessions().live_device_regions(), 0);
  EXPECT_OK(client.Send(RegionRequest(client, v1::REGION_KIND_DEVICE)));
}

}  // namespace
}  // namespace lamina::testing
