"""Device memory that client and daemon both map. Needs a daemon on a GPU (LAMINA_TEST_DEVICE=cuda:0) and PyTorch with
CUDA, but for the first tests, which are a CPU daemon's."""

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap

import lamina
import numpy as np
import pytest
from daemon import ON_CPU, ROOT, Daemon, wait_until
from lamina.v1 import session_service_pb2 as spb
from lamina.v1 import tensor_pb2 as tpb
from raw import BYTES, SHAPE, Raw, refused

torch = pytest.importorskip("torch")
from lamina.torch import RemoteStack  # noqa: E402

on_a_gpu = pytest.mark.skipif(ON_CPU or not torch.cuda.is_available(),
                              reason="needs a daemon on a GPU (LAMINA_TEST_DEVICE=cuda:0) and PyTorch with CUDA")
on_a_cpu = pytest.mark.skipif(not ON_CPU, reason="is about a daemon on the CPU")

PAGE = 2 << 20
CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=64, heads=4, num_hidden_layers=3, seed=5,
              attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@on_a_cpu
def test_a_cpu_daemon_says_that_it_has_none(raw, client):
    for kind in (spb.REGION_KIND_DEVICE, spb.REGION_KIND_DEVICE_IPC):
        with refused("UNIMPLEMENTED", spb.RegionKind.Name(kind), "runs on the cpu", "REGION_KIND_MEMFD"):
            raw.sessions.CreateRegion(spb.CreateRegionRequest(session_id=raw.session, kind=kind, size_bytes=1))
    assert "device" not in client.info().transports
    assert not client.shares_device and "runs on the CPU" in client.why_no_device
    with pytest.raises(lamina.Unavailable, match="runs on the CPU"):
        client.empty((2, 2), device=True)


@on_a_cpu
def test_insisting_on_device_memory_fails_where_there_is_none(daemon):
    with lamina.connect(daemon.target, transport="device") as client:
        with pytest.raises(lamina.Unavailable, match="no device regions: .*runs on the CPU"):
            client.empty((2, 2))
    with pytest.raises(ValueError, match="'device'"):
        lamina.connect(daemon.target, transport="gpu")


# --- the contract, without the client's help ---


@pytest.fixture
def device(daemon):
    """lamina.cuda's Device that the daemon runs on."""
    from lamina.cuda import shared_device

    with lamina.connect(daemon.target) as client:
        found, why = shared_device(client.info().device_uuid)
    assert found is not None, why
    return found


def make(raw, kind=spb.REGION_KIND_DEVICE, size=1):
    return raw.sessions.CreateRegion(spb.CreateRegionRequest(session_id=raw.session, kind=kind, size_bytes=size)).region


def ask(raw, region):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(20)
        s.connect(raw.broker)
        s.send(b"LMN1" + raw.session.encode() + region.region_id.encode())
        answer, descriptors, _, _ = socket.recv_fds(s, 128, 4)
    return struct.unpack("<IQ", answer[:12]), answer[12:], descriptors


class Mapped:
    """A device region as a client maps it."""

    def __init__(self, raw, device, region):
        (status, self.length), handle, descriptors = ask(raw, region)
        assert status == 0 and self.length == region.length_bytes
        self.device = device
        if region.kind == spb.REGION_KIND_DEVICE:
            assert len(descriptors) == 1 and handle == b""
            self.address = device.map(descriptors[0], self.length)
            os.close(descriptors[0])
            self.close = lambda: device.unmap(self.address, self.length)
        else:
            assert not descriptors and len(handle) == 64
            self.address = device.open(handle)
            self.close = lambda: device.close(self.address)
        self.address += region.base_offset_bytes

    def write(self, offset, array):
        array = np.ascontiguousarray(array)
        self.device.copy_in(self.address + offset, array.ctypes.data, array.nbytes, 1)

    def read(self, offset, count, dtype=np.float32):
        array = np.empty(count, dtype)
        self.device.copy_out(array.ctypes.data, self.address + offset, array.nbytes, 1)
        return array


@on_a_gpu
@pytest.mark.parametrize("kind", [spb.REGION_KIND_DEVICE, spb.REGION_KIND_DEVICE_IPC], ids=["descriptor", "ipc"])
def test_a_region_is_shared_and_calls_use_it_in_place(raw, client, device, kind):
    raw.stack()
    region = make(raw, kind, PAGE + 1)
    assert (region.kind, region.length_bytes, region.base_offset_bytes, region.registered) == (kind, 2 * PAGE, 0, True)
    assert region.device_uuid == client.info().device_uuid
    memory = Mapped(raw, device, region)
    assert not memory.read(0, 2 * PAGE // 4).any()
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    expected = raw.forward(training=False, input=raw.tensor(x)).output.inline_data
    for offset in (0, 256, 4, 2 * PAGE - BYTES):  # 4: where kernels can't take it
        memory.write(offset, x)
        assert raw.forward(training=False, input=raw.slice(region, offset)).output.inline_data == expected
        target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=PAGE + offset % 512, size_bytes=BYTES))
        answer = raw.forward(training=False, input=raw.slice(region, offset), output=target)
        assert (answer.input_transport, answer.output_transport) == (tpb.TRANSPORT_DEVICE, tpb.TRANSPORT_DEVICE)
        assert memory.read(PAGE + offset % 512, x.size).tobytes() == expected
    lengths = np.array([3, 8], np.int32)
    memory.write(512, lengths)
    by_slice = raw.slice(region, 512, 8, (2,), tpb.DATA_TYPE_INT32)
    by_value = raw.tensor(lengths, tpb.DATA_TYPE_INT32)
    assert (raw.forward(training=False, lengths=by_slice).output.inline_data ==
            raw.forward(training=False, lengths=by_value).output.inline_data)
    memory.write(512, np.array([3, 9], np.int32))
    with refused("INVALID_ARGUMENT", "lengths[1]: is 9"):
        raw.forward(training=False, lengths=by_slice)
    memory.close()


@on_a_gpu
def test_handles_are_checked_as_everywhere(raw, daemon):
    raw.stack()
    region = make(raw)
    for offset in (PAGE - BYTES + 4, PAGE, 2**63, 2**64 - BYTES):
        with refused("INVALID_ARGUMENT", "input.slice"):
            raw.forward(training=False, input=raw.slice(region, offset))
    with refused("INVALID_ARGUMENT", "input.slice.offset_bytes"):
        raw.forward(training=False, input=raw.slice(region, 2))
    target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=64, size_bytes=BYTES))
    with refused("INVALID_ARGUMENT", "output", "overlap"):
        raw.forward(training=False, input=raw.slice(region), output=target)
    other = Raw(daemon.target)
    with refused("NOT_FOUND", "region"):
        raw.forward(training=False, input=raw.slice(make(other)))
    other.close()
    raw.sessions.ReleaseRegion(spb.ReleaseRegionRequest(session_id=raw.session, region_id=region.region_id))
    with refused("NOT_FOUND", "region"):
        raw.forward(training=False, input=raw.slice(region))


@on_a_gpu
def test_caps_are_kept_and_counted():
    with Daemon("--device-region-cap-bytes", "4MiB", "--total-device-region-cap-bytes", "6MiB") as daemon:
        raw, other = Raw(daemon.target), Raw(daemon.target)
        make(raw, size=2 * PAGE)
        with refused("RESOURCE_EXHAUSTED", "size_bytes", str(2 * PAGE)):
            make(raw)
        with refused("RESOURCE_EXHAUSTED", "size_bytes", str(3 * PAGE)):
            make(other, size=PAGE + 1)
        make(other, spb.REGION_KIND_DEVICE_IPC)
        metrics = daemon.metrics()
        assert (metrics["lamina_device_regions"], metrics["lamina_device_region_bytes"]) == (2, 3 * PAGE)
        raw.close()
        other.close()
        wait_until(lambda: daemon.metrics()["lamina_device_region_bytes"] == 0)
    with Daemon("--device-region-cap-bytes", "0") as daemon:
        raw = Raw(daemon.target)
        with refused("UNIMPLEMENTED", "--device-region-cap-bytes"):
            make(raw)
        raw.close()


# --- the Python client ---


@on_a_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_device_arrays_give_the_bits_of_host_arrays(client, dtype):
    stack = client.create_stack("s", dtype=dtype, **CONFIG)
    values = np.random.default_rng(1).standard_normal((4, 16, 64)).astype(np.float32)
    x = client.empty((4, 16, 64), dtype, device=True).fill_from(values)
    dy = client.empty((4, 16, 64), dtype, device=True).fill_from(values[::-1])
    host = stack.forward(values, training=False)[0]
    y, _ = stack.forward(x, training=False)
    assert isinstance(y, lamina.device.DeviceArray) and stack.last_transport == "device"
    assert stack.last_timing.input_seconds < 1e-4
    assert np.array_equal(y.numpy(), host)
    lengths = [3, 16, 5, 9]
    assert np.array_equal(stack.forward(x, training=False, lengths=lengths)[0].numpy(),
                          stack.forward(values, training=False, lengths=lengths)[0])
    twins = [client.create_stack(name, dtype=dtype, **CONFIG) for name in ("a", "b")]
    results = []
    for twin, (given_x, given_dy) in zip(twins, ((x, dy), (values, values[::-1]))):
        _, context = twin.forward(given_x)
        dx = twin.backward(context, given_dy)
        results.append((dx.numpy() if given_x is x else dx, twin.gradients()))
    assert np.array_equal(results[0][0], results[1][0])
    assert all(np.array_equal(g, results[1][1][name]) for name, g in results[0][1].items())
    out = client.empty((4, 16, 64), dtype, device=True)
    y, _ = stack.forward(x, training=False, out=out)
    assert y is out and np.array_equal(out.numpy(), host)
    with pytest.raises(TypeError, match="can't stand for"):
        stack.forward(client.empty((4, 16, 64), "fp16" if dtype == "fp32" else "fp32", device=True), training=False)


@on_a_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_torch_tensors_cross_in_place(client, dtype):
    stack = client.create_stack("s", dtype=dtype, **CONFIG)
    pool = client.session.device_pool()
    array = client.empty((4, 16, 64), dtype, device=True)
    x = torch.from_dlpack(array)
    assert x.is_cuda and x.dtype == TORCH[dtype] and x.data_ptr() == array.address
    x.normal_()
    y, _ = stack.forward(x, training=False)
    assert y.is_cuda and y.dtype == x.dtype and pool.place_of(y.data_ptr(), y.nbytes) is not None
    host = stack.forward(lamina.torch.as_array(x.cpu()), training=False)[0]
    assert np.array_equal(lamina.torch.as_array(y.cpu()), host)
    z, _ = stack.forward(y, training=False)  # a result is passed on in place
    assert np.array_equal(lamina.torch.as_array(z.cpu()), stack.forward(host, training=False)[0])
    elsewhere = x.clone()  # PyTorch's own memory: copied on the device
    assert torch.equal(stack.forward(elsewhere, training=False)[0], y)
    assert stack.last_transport == "device"
    with pytest.raises(ValueError, match="contiguous"):
        stack.forward(x.transpose(1, 2), training=False)


@on_a_gpu
def test_remote_stack_stays_on_the_device_by_itself(client, daemon):
    def steps(device):
        stack = client.create_stack("twin", **CONFIG)
        module = RemoteStack(stack)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(3):
            x = torch.randn(4, 16, 64, generator=generator).to(device).requires_grad_()
            loss = module(x, lengths=torch.tensor([3, 16, 5, 9])).square().mean()
            loss.backward()
            module.step(1e-2, zero_gradients=True)
            losses.append((x.grad.cpu(), x.grad.device.type))
        weights = module.weights()
        transport = module.transport
        client.delete_stack("twin")
        return losses, weights, transport

    on_host, on_device = steps("cpu"), steps("cuda")
    assert (on_host[2], on_device[2]) == ("memfd", "device")
    assert {d for _, d in on_device[0]} == {"cuda"}
    assert torch.allclose(on_host[0][0][0], on_device[0][0][0], rtol=1e-4, atol=1e-8)  # the loss's gradient is each device's own
    assert all(torch.allclose(w, on_device[1][name], atol=1e-4) for name, w in on_host[1].items())
    with lamina.connect(daemon.target, transport="memfd") as other:
        module = RemoteStack(other.create_stack("memfd", **CONFIG))
        assert module(torch.ones(1, 2, 64, device="cuda")).is_cuda and module.transport == "memfd"
        assert "'memfd' was asked for" in other.why_no_device
    with lamina.connect(daemon.target, transport="inline") as other:
        module = RemoteStack(other.stack("memfd"))
        assert module(torch.ones(1, 2, 64, device="cuda")).is_cuda and module.transport == "inline"


@on_a_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_parameters_stay_on_the_device(client, dtype):
    stack = client.create_stack("s", dtype=dtype, **CONFIG)
    names = ["layers.1.inter_w", "layers.0.attn_kw", "layers.2.norm_b"]
    for part in ("fp32", dtype):
        host, there = stack.parameters(names, part), stack.parameters(names, part, device=True)
        assert list(there) == names and all(np.array_equal(there[n].numpy(), host[n]) for n in names)
    y, context = stack.forward(np.ones((4, 16, 64), np.float32))
    stack.backward(context, y)
    gradients = stack.gradients(device=True)
    assert list(gradients) == list(stack.shapes())
    assert all(np.array_equal(g.numpy(), stack.gradients([n])[n]) for n, g in gradients.items())
    # One step of plain SGD, by PyTorch, on the daemon's own device.
    weights = {n: torch.from_dlpack(w) for n, w in stack.parameters(device=True).items()}
    for name, weight in weights.items():
        spin(1)
        weight.sub_(torch.from_dlpack(gradients[name]), alpha=0.1)
    stack.set_parameters(weights)
    after = stack.parameters()
    assert all(np.array_equal(after[n], w.cpu().numpy()) for n, w in weights.items())
    with pytest.raises(lamina.NotFound, match="layers.9.norm_b"):
        stack.parameters(["layers.9.norm_b"], device=True)
    with pytest.raises(TypeError, match="host memory"):
        stack.set_parameters({names[0]: weights[names[0]], names[2]: np.zeros(64, np.float32)})


@on_a_gpu
def test_memory_is_used_again_and_given_back(client, daemon):
    stack = client.create_stack("s", **CONFIG)
    x = torch.from_dlpack(client.empty((4, 16, 64), device=True)).normal_()
    first = stack.forward(x, training=False)[0].clone()
    for _ in range(50):
        assert torch.equal(stack.forward(x, training=False)[0], first)
    held = daemon.metrics()["lamina_device_region_bytes"]
    assert held <= 4 * PAGE
    views = [torch.from_dlpack(client.empty((64, 1024), device=True)) for _ in range(40)]
    for i, view in enumerate(views):
        view.fill_(i)
    assert [int(v[0, 0]) for v in views] == list(range(40))
    del views, view
    gc.collect()
    client.trim()
    assert daemon.metrics()["lamina_device_region_bytes"] <= held
    assert torch.equal(stack.forward(x, training=False)[0], first)


@on_a_gpu
def test_a_killed_client_leaves_nothing(client, daemon):
    stack = client.create_stack("s", **CONFIG)
    x = client.empty((4, 16, 64), device=True).fill_from(np.ones((4, 16, 64)))
    expected = stack.forward(x, training=False)[0].numpy()
    before = daemon.metrics()
    free = client.info().device_free_bytes
    program = textwrap.dedent("""
        import sys, time
        import lamina, numpy as np
        client = lamina.connect(sys.argv[1], transport="device")
        arrays = [client.empty((64 << 20,), device=True) for _ in range(4)]
        stack = client.stack("s")
        x = client.empty((4, 16, 64), device=True).fill_from(np.zeros((4, 16, 64)))
        print("ready", flush=True)
        while True:
            stack.backward(stack.forward(x)[1], x)
    """)
    process = subprocess.Popen([sys.executable, "-c", program, daemon.target], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}/client/python:{os.environ.get('PYTHONPATH', '')}"})
    assert process.stdout.readline() == b"ready\n"
    assert daemon.metrics()["lamina_device_region_bytes"] >= before["lamina_device_region_bytes"] + (1 << 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in ("lamina_device_regions", "lamina_device_region_bytes", "lamina_regions", "lamina_contexts"):
        wait_until(lambda name=name: daemon.metrics()[name] == before[name])
    wait_until(lambda: client.info().device_free_bytes >= free - (64 << 20))
    assert np.array_equal(stack.forward(x, training=False)[0].numpy(), expected)


# --- order ---


def spin(milliseconds):
    """Keeps PyTorch's current stream busy."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@on_a_gpu
@pytest.mark.parametrize("which", ["default", "own"])
def test_a_call_waits_for_the_stream_that_fills_its_input(client, which):
    """The input is written by a kernel that waits behind a long one when the call is made. Without the fence the daemon
    computes with what was there before, which the test shows as well: it would notice."""
    stack = client.create_stack("s", **CONFIG)
    x = torch.from_dlpack(client.empty((4, 16, 64), device=True)).zero_()
    noise = [torch.randn(4, 16, 64, device="cuda") for _ in range(3)]
    expected = [stack.forward(n.cpu().numpy(), training=False)[0] for n in noise]
    stale = stack.forward(np.zeros((4, 16, 64), np.float32), training=False)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if which == "own" else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for n, right in zip(noise, expected):
            spin(50)
            x.copy_(n)
            y, _ = stack.forward(x, training=False)
            assert np.array_equal(y.cpu().numpy(), right)
        x.zero_()
        stream.synchronize()
        spin(300)
        x.copy_(noise[0])
        call = stack._forward_call(x, None, None, False, None, None, None, None)
        assert call.request.HasField("ready")
        call.request.ClearField("ready")
        y = call.finish(client.session.read(call.method, call.request, call.keep))[0]
        with torch.cuda.stream(torch.cuda.Stream()):  # not behind the long kernel
            assert np.array_equal(y.cpu().numpy(), stale)
        stream.synchronize()


@on_a_gpu
def test_a_result_waits_for_the_stream_that_still_reads_what_was_there(client):
    stack = client.create_stack("s", **CONFIG)
    x = torch.from_dlpack(client.empty((4, 16, 64), device=True)).normal_()
    out = torch.from_dlpack(client.empty((4, 16, 64), device=True)).fill_(7)
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        stream = torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        spin(50)
        kept = out.clone()
        y, _ = stack.forward(x, training=False, out=out)
        assert y is out
        stream.synchronize()
        assert bool((kept == 7).all()) and not bool((out == 7).any())


@on_a_gpu
def test_steps_in_a_row_with_work_between_them(client):
    """Training steps whose every tensor is made by kernels that have not run when the next call is made."""
    def train(device):
        stack = client.create_stack("twin", **{**CONFIG, "attn_dropout_ratio": 0, "hidden_dropout_ratio": 0})
        module = RemoteStack(stack)
        generator = torch.Generator().manual_seed(8)
        for _ in range(4):
            x = torch.randn(4, 16, 64, generator=generator).to(device, non_blocking=True)
            if device == "cuda":
                spin(5)
            y = module(x * 0.5)
            if device == "cuda":
                spin(5)
            (y * y).sum().mul(1e-3).backward()
            module.step(1e-3, zero_gradients=True)
        weights = module.weights()
        client.delete_stack("twin")
        return weights

    host, device = train("cpu"), train("cuda")
    assert all(torch.allclose(w, device[name], rtol=1e-4, atol=1e-5) for name, w in host.items())


@on_a_gpu
def test_kernels_are_queued_behind_results_that_are_not_there_yet(client):
    """A whole train of calls and kernels between them is enqueued before the first call runs."""
    stack = client.create_stack("s", **{**CONFIG, "max_contexts": 3})
    noise = [torch.randn(4, 16, 64, device="cuda") for _ in range(3)]
    expected = []
    for n in noise:
        y, context = stack.forward(n.cpu().numpy(), training=True)
        expected.append((y, stack.backward(context, np.tanh(y))))
    gradients = stack.gradients()
    stack.zero_gradients()
    client.delete_stack("s")
    stack = client.create_stack("s", **{**CONFIG, "max_contexts": 3})  # with the same dropout again
    xs = [torch.from_dlpack(client.empty((4, 16, 64), device=True)) for _ in noise]
    torch.tanh(noise[0]).clone()  # kernels that are used for the first time are loaded first, which takes long
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream), client.pipeline() as p:
        spin(1000)
        results = []
        for n, x in zip(noise, xs):
            x.copy_(n)
            forward = p.forward(stack, x, training=True)
            y = forward.wait_on_stream()
            backward = p.backward(stack, forward, torch.tanh(y))
            results.append((y.clone(), backward.wait_on_stream().clone()))
            assert not forward.done()
        stream.synchronize()
        for (y, dx), (right_y, right_dx) in zip(results, expected):
            assert np.array_equal(y.cpu().numpy(), right_y)
            assert np.allclose(dx.cpu().numpy(), right_dx, rtol=1e-4, atol=1e-6)  # tanh is each device's own
        p.wait()
    assert all(np.allclose(g, gradients[name], rtol=1e-3, atol=1e-5) for name, g in stack.gradients().items())


@on_a_gpu
def test_a_call_that_fails_lets_waiting_streams_go(client):
    stack = client.create_stack("s", **CONFIG)
    x = torch.from_dlpack(client.empty((4, 16, 64), device=True)).zero_()
    with client.pipeline() as p:
        wrong = p.forward(stack, x, training=False, layers=(2, 9))
        wrong.wait_on_stream()
        torch.cuda.synchronize()
        with pytest.raises(lamina.InvalidArgument, match="layers"):
            wrong.result()
        with pytest.raises(lamina.InvalidArgument, match="layers"):
            wrong.wait_on_stream()
        with pytest.raises(ValueError, match="not in device memory"):
            p.forward(stack, np.zeros((4, 16, 64), np.float32), training=False).wait_on_stream()


@on_a_gpu
def test_a_stream_that_never_comes_holds_up_nobody_else(client, daemon):
    stack = client.create_stack("s", **CONFIG)
    x = torch.from_dlpack(client.empty((4, 16, 64), device=True)).zero_()
    torch.cuda.synchronize()
    with lamina.connect(daemon.target, timeout=1.0) as hanging:
        theirs = hanging.stack("s")
        mine = torch.from_dlpack(hanging.empty((4, 16, 64), device=True)).zero_()
        torch.cuda.synchronize()
        call = theirs._forward_call(mine, None, None, False, None, None, None, None)
        page = hanging.session._create_region(4096)
        call.request.ready.CopyFrom(tpb.Fence(slice=tpb.Slice(region_id=page, size_bytes=8), value=1))
        pending = hanging._stubs.layer.Forward.future(call.request, timeout=1.0)
        for _ in range(20):
            stack.forward(x, training=False)
        with pytest.raises(Exception, match="(?i)deadline"):
            pending.result()
        assert theirs.forward(mine, training=False)[0].is_cuda


# --- DLPack, also where there is no GPU: over host memory ---


def test_a_capsule_is_what_dlpack_says_and_keeps_its_owner():
    from lamina.device import _exported, dlpack_capsule

    class Owner:
        pass

    for dtype, numpy_type in (("fp32", np.float32), ("fp16", np.float16), ("bf16", np.uint16), ("int32", np.int32)):
        values = np.arange(24, dtype=numpy_type).reshape(2, 3, 4)
        owner = Owner()
        owner.values = values
        died = []
        import weakref

        weakref.finalize(owner, died.append, True)
        capsule = dlpack_capsule(owner, values.ctypes.data, values.shape, dtype, (1, 0))
        del owner
        tensor = torch.utils.dlpack.from_dlpack(capsule)
        assert tuple(tensor.shape) == (2, 3, 4) and tensor.data_ptr() == values.ctypes.data and tensor.is_contiguous()
        assert tensor.dtype == {**TORCH, "int32": torch.int32}[dtype]
        del capsule
        gc.collect()
        assert not died
        part = tensor[1, 2]
        del tensor
        gc.collect()
        assert not died
        del part
        gc.collect()
        assert died
    unused = dlpack_capsule(Owner(), 0, (1,), "fp32", (1, 0))
    assert len(_exported) == 1
    del unused
    assert not _exported


def test_fences_number_a_stream_s_work():
    """With a driver that writes down what it is asked for."""
    import mmap

    from lamina.device import StreamFences

    class Fake:
        idle_streams = set()
        written = []
        synchronized = []
        waited = []

        def register(self, address, length):
            return 1 << 40

        def unregister(self, address):
            pass

        def idle(self, stream):
            return stream in self.idle_streams

        def write_value(self, stream, address, value):
            self.written.append((stream, address - (1 << 40), value))

        def wait_value(self, stream, address, value):
            self.waited.append((stream, address - (1 << 40), value))

        def synchronize(self, stream):
            self.synchronized.append(stream)

    fake = Fake()
    fences = StreamFences(fake, mmap.mmap(-1, 32), "page")  # two for us, two for the daemon
    seen = []
    for stream in (100, 0, 100, 0, 200):
        fence = tpb.Fence()
        fences.mark(stream, fence)
        seen.append((fence.slice.offset_bytes, fence.value))
    assert seen == [(0, 1), (8, 1), (0, 2), (8, 2), (0, 0)]
    assert fake.written == [(100, 0, 1), (0, 8, 1), (100, 0, 2), (0, 8, 2)] and fake.synchronized == [200]
    # What calls leave behind: one at a time for each number, whose waiters are let go when it is given back.
    first, second = tpb.Fence(), tpb.Fence()
    done, other = fences.done(first), fences.done(second)
    assert {first.slice.offset_bytes, second.slice.offset_bytes} == {16, 24} and first.value == second.value == 1
    assert fences.done(tpb.Fence()) is None
    done.wait_on(300)
    assert fake.waited == [(300, first.slice.offset_bytes, 1)]
    fences._numbers[second.slice.offset_bytes // 8] = 1  # the daemon's stream
    done.over()
    other.over()
    assert list(fences._numbers)[2:] == [1, 1]
    third = tpb.Fence()
    fences.done(third)
    assert third.value == 2
    fake.idle_streams = {100, 0}
    for stream, value in ((100, 0), (0, 3)):  # the legacy stream's own idleness says too little
        fence = tpb.Fence()
        fences.mark(stream, fence)
        assert fence.value == value
