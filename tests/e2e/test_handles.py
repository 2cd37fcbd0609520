"""Every check of a handle, one by one: each refusal names what is wrong, and nothing has changed."""

import fcntl
import os
import socket
import struct

import grpc
import numpy as np
import pytest
from lamina.v1 import config_service_pb2 as cpb
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import session_service_pb2 as spb
from lamina.v1 import tensor_pb2 as tpb
from raw import BYTES, SHAPE, Raw, refused

PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def ready(raw):
    raw.stack()
    before = raw.describe()
    yield raw
    # Nothing that a test sent has changed the stack, and the daemon serves on.
    after = raw.describe()
    assert (after.forward_count, after.step, after.outstanding_contexts) == (
        before.forward_count, before.step, before.outstanding_contexts)
    assert raw.forward(training=False).output.shape == list(SHAPE)


def test_a_slice_may_end_with_its_region_and_not_later(ready):
    region = ready.region(PAGE)
    memory = np.frombuffer(ready.mapped(region), np.float32)
    memory[:] = 1
    last = PAGE - BYTES
    inside = ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region, last)))
    assert inside.input_transport == tpb.TRANSPORT_MEMFD
    assert inside.output.inline_data == ready.forward(training=False).output.inline_data
    with refused("INVALID_ARGUMENT", "input.slice", str(last + 4), str(PAGE)):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region, last + 4)))


@pytest.mark.parametrize("offset", [PAGE, PAGE + 4, 1 << 40, 2**63, 2**64 - BYTES, 2**64 - BYTES + 4, 2**64 - 4])
def test_offsets_that_pass_the_end_or_overflow(ready, offset):
    with refused("INVALID_ARGUMENT", "input.slice", str(offset)):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(PAGE), offset)))


@pytest.mark.parametrize("size", [0, BYTES - 4, BYTES + 4, 2**63, 2**64 - 1])
def test_sizes_that_are_not_the_shapes(ready, size):
    with refused("INVALID_ARGUMENT", "input.slice.size_bytes", str(size), str(BYTES)):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(), size=size)))


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned_offsets(ready, offset):
    with refused("INVALID_ARGUMENT", "input.slice.offset_bytes", "multiple"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(), offset)))


@pytest.mark.parametrize("shape", [(2**31, 2**31, 2), (2**62, 2, 2, 2), (2**63 - 1, 2**63 - 1)])
def test_shapes_whose_size_overflows(ready, shape):
    with refused("INVALID_ARGUMENT", "input.shape", "overflow"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(), shape=shape)))


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1, 1), (2, 0, 16), (2, -8, 16)])
def test_shapes_that_are_none(ready, shape):
    with refused("INVALID_ARGUMENT", "input.shape"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(), shape=shape)))


@pytest.mark.parametrize("dtype", [tpb.DATA_TYPE_UNSPECIFIED, tpb.DATA_TYPE_INT32, 77])
def test_dtypes_that_the_stack_does_not_take(ready, dtype):
    with refused("INVALID_ARGUMENT", "input"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(ready.region(), dtype=dtype)))


def test_another_sessions_region_is_not_found(ready, daemon):
    other = Raw(daemon.target)
    region = other.region()
    with refused("NOT_FOUND", "region") as caught:
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region)))
    assert region.region_id not in caught.value.details() and ready.session not in caught.value.details()
    with refused("NOT_FOUND"):
        ready.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=ready.session, region_id=region.region_id))
    assert len(other.sessions.ListRegions(spb.ListRegionsRequest(session_id=other.session)).regions) == 1
    assert not ready.sessions.ListRegions(spb.ListRegionsRequest(session_id=ready.session)).regions
    other.close()


def test_a_released_region_is_not_found(ready):
    region = ready.region()
    ready.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=ready.session, region_id=region.region_id))
    with refused("NOT_FOUND", "region"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region)))
    with refused("NOT_FOUND", "region"):
        ready.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=ready.session, region_id=region.region_id))


def test_output_and_input_may_not_overlap(ready):
    region = ready.region()
    target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=64, size_bytes=BYTES))
    with refused("INVALID_ARGUMENT", "output", "overlap"):
        ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region), output=target))


def test_output_slices_are_checked_like_inputs(ready):
    region = ready.region(PAGE)
    for offset, size in ((PAGE, BYTES), (0, BYTES - 4), (2, BYTES), (2**64 - 4, BYTES)):
        target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=offset, size_bytes=size))
        with refused("INVALID_ARGUMENT", "output.slice"):
            ready.layer.Forward(ready.forward_request(training=False, output=target))


def test_kernels_write_the_region_itself_and_nothing_beside_the_slice(ready):
    region = ready.region()
    memory = np.frombuffer(ready.mapped(region), np.float32)
    memory[:] = 1
    offset = 16384
    memory[offset // 4 - 64 :] = 7  # around and under the result
    target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=offset, size_bytes=BYTES))
    answer = ready.layer.Forward(ready.forward_request(training=False, input=ready.slice(region), output=target))
    assert answer.output_transport == tpb.TRANSPORT_MEMFD and answer.output.slice == target.slice
    inline = np.frombuffer(ready.forward(training=False).output.inline_data, np.float32)
    begin, end = offset // 4, (offset + BYTES) // 4
    assert np.array_equal(memory[begin:end], inline)
    assert np.all(memory[begin - 64 : begin] == 7) and np.all(memory[end:] == 7)


def test_mask_and_lengths_by_slice(ready):
    region = ready.region()
    memory = ready.mapped(region)
    lengths = np.frombuffer(memory, np.int32, 2, 32768)
    lengths[:] = (3, 8)
    by_slice = ready.slice(region, 32768, 8, (2,), tpb.DATA_TYPE_INT32)
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with_lengths = ready.forward(training=False, input=ready.tensor(values), lengths=by_slice)
    mask = np.where(np.arange(8)[None, :] < lengths[:, None], 0, -np.inf).astype(np.float32)
    with_mask = ready.forward(training=False, input=ready.tensor(values), mask=ready.tensor(mask[:, None, None, :]))
    assert np.allclose(np.frombuffer(with_lengths.output.inline_data, np.float32),
                       np.frombuffer(with_mask.output.inline_data, np.float32), atol=1e-6)
    for bad in ((0, 8), (9, 1), (-1, 2), (2**31 - 1, 1)):
        lengths[:] = bad
        with refused("INVALID_ARGUMENT", "lengths"):
            ready.forward(training=False, lengths=by_slice)


def test_inline_sizes(ready):
    too_short = tpb.Tensor(dtype=tpb.DATA_TYPE_FLOAT32, shape=SHAPE, inline_data=b"\0" * (BYTES - 1))
    with refused("INVALID_ARGUMENT", "input.inline_data", str(BYTES)):
        ready.forward(training=False, input=too_short)
    with refused("INVALID_ARGUMENT", "input", "slice or inline_data"):
        ready.forward(training=False, input=tpb.Tensor(dtype=tpb.DATA_TYPE_FLOAT32, shape=SHAPE))


# --- every field that takes a slice ---


def calls_with_slices(raw):
    """{field: (bytes that it takes, call with a slice)}: each place of the contract where a client names memory."""
    context = raw.forward().context_id
    mutated = lambda message, **fields: message(stack="s", mutation=raw.next(), **fields)
    values = "layers.0.norm_w"
    tensor = lambda s, shape, dtype=tpb.DATA_TYPE_FLOAT32: tpb.Tensor(dtype=dtype, shape=shape, slice=s)
    target = lambda s: tpb.TensorTarget(slice=s)
    ones = raw.tensor(np.ones(SHAPE, np.float32))
    forward, backward = raw.layer.Forward, raw.layer.Backward
    evaluate = lambda **fields: forward(raw.forward_request(training=False, **fields))
    return context, {
        "input.slice": (BYTES, lambda s: evaluate(input=tensor(s, SHAPE))),
        "mask.slice": (64, lambda s: evaluate(mask=tensor(s, (2, 8)))),
        "lengths.slice": (8, lambda s: evaluate(lengths=tensor(s, (2,), tpb.DATA_TYPE_INT32))),
        "output.slice": (BYTES, lambda s: evaluate(output=target(s))),
        "output_grad.slice": (BYTES, lambda s: backward(raw.backward_request(context, output_grad=tensor(s, SHAPE)))),
        "input_grad.slice": (BYTES, lambda s: backward(raw.backward_request(context, output_grad=ones, input_grad=target(s)))),
        "tensors[0].tensor.slice": (64, lambda s: raw.config.SetParameters(mutated(
            cpb.SetParametersRequest, tensors=[cpb.NamedTensor(name=values, tensor=tensor(s, (16,)))]))),
        "target.slice": (64, lambda s: raw.config.GetParameters(cpb.GetParametersRequest(
            stack="s", names=[values], session_id=raw.session, target=target(s)))),
        "target.slice of gradients": (64, lambda s: raw.config.GetGradients(cpb.GetGradientsRequest(
            stack="s", names=[values], session_id=raw.session, target=target(s)))),
    }


FIELDS = ["input.slice", "mask.slice", "lengths.slice", "output.slice", "output_grad.slice", "input_grad.slice",
          "tensors[0].tensor.slice", "target.slice", "target.slice of gradients"]


@pytest.mark.parametrize("field", FIELDS)
def test_every_slice_is_checked(raw, daemon, field):
    raw.stack()
    context, calls = calls_with_slices(raw)
    size, call = calls[field]
    name = field.split(" of ")[0]
    region = raw.region(PAGE)
    raw.mapped(region)[:] = b"\x01\x00\x00\x00" * (PAGE // 4)  # lengths of 1; other values are small
    before, weights, gradients = raw.describe(), raw.parameters(), raw.gradients()
    other = Raw(daemon.target)
    foreign = other.region(PAGE)
    slice_of = lambda r, offset, size: tpb.Slice(region_id=r.region_id, offset_bytes=offset, size_bytes=size)
    for offset in (PAGE - size + 4, PAGE, 2**63, 2**64 - 4, 2**64 - size):
        with refused("INVALID_ARGUMENT", name):
            call(slice_of(region, offset, size))
    for wrong in (0, size - 4, size + 4, 2**64 - 4):
        with refused("INVALID_ARGUMENT", f"{name}.size_bytes"):
            call(slice_of(region, 0, wrong))
    for offset in (1, 2, 3):
        with refused("INVALID_ARGUMENT", f"{name}.offset_bytes"):
            call(slice_of(region, offset, size))
    for unknown in (foreign.region_id, "0" * 32, "", "x" * 32, region.region_id.upper() + "0"):
        with refused("NOT_FOUND", "region") as caught:
            call(tpb.Slice(region_id=unknown, size_bytes=size))
        assert not unknown or unknown not in caught.value.details()
    other.close()
    assert raw.describe() == before
    for were, are in ((weights, raw.parameters()), (gradients, raw.gradients())):
        assert all(np.array_equal(were[n], are[n]) for n in were)
    call(slice_of(region, PAGE - size, size))  # up to the region's very end
    raw.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=raw.session, region_id=region.region_id))
    raw.describe()


def test_a_dead_sessions_regions_are_gone(raw, daemon):
    raw.stack()
    other = Raw(daemon.target)
    region = other.region()
    other.close()
    with refused("NOT_FOUND"):
        raw.forward(training=False, input=raw.slice(region))
    answer, descriptors, _, _ = ask(raw.broker, b"LMN1" + other.session.encode() + region.region_id.encode())
    assert struct.unpack("<IQ", answer) == (5, 0) and not descriptors


def test_a_region_may_change_or_go_between_forward_and_backward(raw):
    """The context keeps what Backward needs: the client's memory is its own again once Forward is back."""
    raw.stack()
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    dy = tpb.TensorTarget(inline=tpb.InlineTarget())
    inline = raw.backward(raw.forward(input=raw.tensor(x)).context_id, input_grad=dy).input_grad.inline_data
    expected = raw.gradients()
    raw.layer.ZeroGradients(lpb.ZeroGradientsRequest(stack="s", mutation=raw.next()))
    raw.took()
    region = raw.region()
    memory = np.frombuffer(raw.mapped(region), np.float32)
    memory[: x.size] = x.ravel()
    lengths = np.frombuffer(memory, np.int32, 2, 32768)
    lengths[:] = 8
    context = raw.forward(input=raw.slice(region), lengths=raw.slice(region, 32768, 8, (2,), tpb.DATA_TYPE_INT32)).context_id
    memory[:] = np.nan
    raw.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=raw.session, region_id=region.region_id))
    assert raw.backward(context, input_grad=dy).input_grad.inline_data == inline
    assert all(np.array_equal(expected[n], g) for n, g in raw.gradients().items())


# --- regions and the broker ---


@pytest.mark.parametrize("size", [0, 2**46 + 1, 2**64 - 1])
def test_region_sizes(raw, size):
    with refused("INVALID_ARGUMENT", "size_bytes", str(size)):
        raw.region(size)


def test_region_caps(raw):
    with refused("RESOURCE_EXHAUSTED", "size_bytes", str(8 << 30)):
        raw.region(9 << 30)


def test_a_kind_that_is_none_is_refused(raw):
    with refused("INVALID_ARGUMENT", "kind"):
        raw.sessions.CreateRegion(spb.CreateRegionRequest(session_id=raw.session, kind=9, size_bytes=1))


def ask(path, packet):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(20)
        s.connect(path)
        s.send(packet)
        return socket.recv_fds(s, 64, 4)


def test_the_region_is_sealed(raw):
    region = raw.region(100)
    assert region.length_bytes == PAGE
    answer, descriptors, _, _ = ask(raw.broker, b"LMN1" + raw.session.encode() + region.region_id.encode())
    assert struct.unpack("<IQ", answer) == (0, PAGE) and len(descriptors) == 1
    descriptor = descriptors[0]
    for size in (0, 2 * PAGE):
        with pytest.raises(OSError):
            os.ftruncate(descriptor, size)
    seals = fcntl.fcntl(descriptor, 1034)  # F_GET_SEALS
    assert seals & 0x7 == 0x7  # SEAL, SHRINK, GROW
    os.close(descriptor)


def test_the_broker_hands_out_only_the_sessions_own(raw, daemon):
    other = Raw(daemon.target)
    region = other.region()
    for packet in (raw.session + region.region_id, "0" * 32 + region.region_id, other.session + "f" * 32):
        answer, descriptors, _, _ = ask(raw.broker, b"LMN1" + packet.encode())
        assert struct.unpack("<IQ", answer) == (5, 0) and not descriptors
    other.close()


@pytest.mark.parametrize("packet", [b"LMN1", b"XXXX" + b"0" * 64, b"LMN1" + b"0" * 63, b"LMN1" + b"0" * 65, b"\0" * 1000])
def test_the_broker_hangs_up_on_what_is_no_request(raw, packet):
    answer, descriptors, _, _ = ask(raw.broker, packet)
    assert answer == b"" and not descriptors
    assert raw.mapped(raw.region())  # and serves on


def test_many_silent_broker_connections_do_not_block_it(raw):
    silent = []
    for _ in range(50):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.connect(raw.broker)
        silent.append(s)
    assert raw.mapped(raw.region())
    for s in silent:
        s.close()


def test_the_sockets_are_the_owners_alone(daemon):
    for name in ("laminad.sock", "broker.sock"):
        assert os.stat(daemon.folder / name).st_mode & 0o777 == 0o600
