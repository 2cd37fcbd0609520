"""Every RPC: that it works, and each status code that its comment in the proto lists."""

import signal
import subprocess
import time

import grpc
import numpy as np
import pytest
from lamina.v1 import config_service_pb2 as cpb
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import session_service_pb2 as spb
from lamina.v1 import tensor_pb2 as tpb
from daemon import ON_CPU, Daemon
from raw import BYTES, CONFIG, SHAPE, Raw, refused


def unchanged(raw, action):
    """Runs an action that must be refused; the stack is as before."""
    before = raw.describe()
    action()
    after = raw.describe()
    assert after == before


# --- ConfigService ---


def test_server_info(raw, daemon):
    info = raw.config.GetServerInfo(cpb.GetServerInfoRequest())
    assert info.version == "0.1.0" and info.backend == daemon.device.split(":")[0]
    assert info.inline_cap_bytes == 16 << 20 and info.replay_window == 64 and info.checkpoints_enabled
    assert 0 < info.device_free_bytes <= info.device_total_bytes
    transports = [tpb.TRANSPORT_INLINE, tpb.TRANSPORT_MEMFD, *([] if ON_CPU else [tpb.TRANSPORT_DEVICE])]
    assert list(info.transports) == transports


def test_create_get_list_update_delete(raw):
    created = raw.stack(attn_dropout_ratio=0.1, hidden_dropout_ratio=0.2)
    assert created.config.intermediate_size == 64 and created.config.layer_norm_eps == 1e-12
    assert created.config.pre_layer_norm and created.config.dtype == tpb.DATA_TYPE_FLOAT32
    assert created.parameter_count == 2 * (4 * 16 * 16 + 2 * 16 * 64 + 9 * 16 + 64)
    assert sum(e.size_bytes for e in created.plan.entries) == created.plan.total_bytes
    got = raw.config.GetStack(cpb.GetStackRequest(name="s"))
    assert got.stack == created and len(got.parameters) == 24
    assert [s.name for s in raw.config.ListStacks(cpb.ListStacksRequest()).stacks] == ["s"]
    updated = raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", attn_dropout_ratio=0.3)).stack
    assert updated.config.attn_dropout_ratio == pytest.approx(0.3) and updated.config.hidden_dropout_ratio == 0.2
    raw.config.DeleteStack(cpb.DeleteStackRequest(name="s"))
    for call, request in ((raw.config.GetStack, cpb.GetStackRequest(name="s")),
                          (raw.config.UpdateStack, cpb.UpdateStackRequest(name="s", training=True)),
                          (raw.config.DeleteStack, cpb.DeleteStackRequest(name="s"))):
        with refused("NOT_FOUND", "s"):
            call(request)


@pytest.mark.parametrize("field, value", [
    ("batch_size", 0), ("batch_size", -1), ("batch_size", 65537), ("max_seq_length", 0), ("max_seq_length", 8193),
    ("hidden_size", 15), ("hidden_size", 0), ("heads", 0), ("heads", 3), ("intermediate_size", 0),
    ("intermediate_size", -2), ("num_hidden_layers", 0), ("num_hidden_layers", 1025), ("attn_dropout_ratio", 1.0),
    ("attn_dropout_ratio", -0.1), ("attn_dropout_ratio", float("nan")), ("hidden_dropout_ratio", 1.5),
    ("hidden_dropout_ratio", float("nan")), ("initializer_range", -1.0), ("initializer_range", float("inf")),
    ("layer_norm_eps", 0.0), ("layer_norm_eps", float("nan")), ("local_rank", 5), ("seed", -2), ("max_contexts", 0),
    ("dtype", tpb.DATA_TYPE_INT32), ("dtype", 99), ("gelu", 9), ("initial_loss_scale", 0.0), ("initial_loss_scale", 3.0),
    ("initial_loss_scale", float("nan")), ("loss_scale_growth_interval", 0), ("loss_scale_growth_factor", 1.0),
    ("loss_scale_backoff_factor", 1.0), ("loss_scale_backoff_factor", 0.0), ("loss_scale_hysteresis", 0),
    ("min_loss_scale", 0.0), ("min_loss_scale", float("nan"))])
def test_create_stack_names_the_field(raw, field, value):
    config = cpb.StackConfig(**{**CONFIG, field: value})
    with refused("INVALID_ARGUMENT", "hidden_size" if (field, value) == ("heads", 3) else field):
        raw.config.CreateStack(cpb.CreateStackRequest(name="bad", config=config))
    with refused("INVALID_ARGUMENT"):
        raw.config.PlanMemory(cpb.PlanMemoryRequest(config=config))
    assert not raw.config.ListStacks(cpb.ListStacksRequest()).stacks


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a" * 65, "a b", "../x", "a\0b"])
def test_stack_names(raw, name):
    with refused("INVALID_ARGUMENT", "name"):
        raw.config.CreateStack(cpb.CreateStackRequest(name=name, config=cpb.StackConfig(**CONFIG)))


def test_create_stack_twice(raw):
    raw.stack()
    with refused("ALREADY_EXISTS", "s"):
        raw.config.CreateStack(cpb.CreateStackRequest(name="s", config=cpb.StackConfig(**CONFIG)))


def test_what_does_not_fit_is_refused_with_the_plans_numbers(raw):
    huge = cpb.StackConfig(batch_size=4096, max_seq_length=4096, hidden_size=8192, heads=64, num_hidden_layers=500)
    plan = raw.config.PlanMemory(cpb.PlanMemoryRequest(config=huge))
    assert not plan.fits and plan.plan.total_bytes > 1 << 40
    with refused("RESOURCE_EXHAUSTED", str(plan.plan.total_bytes)):
        raw.config.CreateStack(cpb.CreateStackRequest(name="huge", config=huge))
    assert not raw.config.ListStacks(cpb.ListStacksRequest()).stacks


def test_plan_is_what_create_allocates(raw):
    plan = raw.config.PlanMemory(cpb.PlanMemoryRequest(config=cpb.StackConfig(**CONFIG)))
    assert plan.fits and plan.plan == raw.stack().plan


def test_update_stack(raw):
    raw.stack()
    for change in ({"attn_dropout_ratio": 1.0}, {"hidden_dropout_ratio": float("nan")}, {}):
        with refused("INVALID_ARGUMENT"):
            raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", **change))
    context = raw.forward().context_id
    with refused("FAILED_PRECONDITION", "context"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", training=False))
    raw.backward(context)
    raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", training=False))
    for call in (lambda: raw.forward(training=True), raw.apply, raw.gradients,
                 lambda: raw.layer.ZeroGradients(lpb.ZeroGradientsRequest(stack="s", mutation=raw.next()))):
        with refused("FAILED_PRECONDITION", "training"):
            call()
    raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", training=True))
    raw.backward(raw.forward().context_id)


def test_parameters_by_every_way(raw):
    raw.stack()
    names = ["layers.0.attn_qkvw", "layers.1.norm_b", "layers.0.attn_kw", "layers.0.attn_kb"]
    answer = raw.config.GetParameters(cpb.GetParametersRequest(stack="s", names=names))
    inline = [np.frombuffer(t.tensor.inline_data, np.float32).reshape(t.tensor.shape) for t in answer.tensors]
    assert [list(a.shape) for a in inline] == [[48, 16], [16], [16, 16], [16]]
    assert np.array_equal(inline[2], inline[0][16:32])
    # one slice, one after another
    total = sum(a.nbytes for a in inline)
    region = raw.region()
    memory = np.frombuffer(raw.mapped(region), np.float32)
    target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, offset_bytes=128, size_bytes=total))
    sliced = raw.config.GetParameters(
        cpb.GetParametersRequest(stack="s", names=names, session_id=raw.session, target=target))
    assert np.array_equal(memory[32 : 32 + total // 4], np.concatenate([a.ravel() for a in inline]))
    assert sliced.tensors[1].tensor.slice.offset_bytes == 128 + inline[0].nbytes
    # the stream
    streamed = {}
    for chunk in raw.config.StreamParameters(cpb.StreamParametersRequest(stack="s", names=names)):
        streamed[chunk.name] = streamed.get(chunk.name, b"") + chunk.data
    assert [streamed[n] for n in names] == [a.tobytes() for a in inline]
    # and back, the part of a fused one too
    new = np.full((16, 16), 0.5, np.float32)
    raw.config.SetParameters(cpb.SetParametersRequest(
        stack="s", mutation=raw.next(), tensors=[cpb.NamedTensor(name="layers.0.attn_kw", tensor=raw.tensor(new))]))
    raw.took()
    after = raw.parameters()["layers.0.attn_qkvw"].reshape(48, 16)
    assert np.array_equal(after[16:32], new) and np.array_equal(after[:16], inline[0][:16])


def test_parameters_refused(raw):
    raw.stack()
    before = raw.parameters()
    with refused("NOT_FOUND", "layers.9.norm_w"):
        raw.config.GetParameters(cpb.GetParametersRequest(stack="s", names=["layers.9.norm_w"]))
    with refused("NOT_FOUND"):
        raw.config.GetParameters(cpb.GetParametersRequest(stack="none"))
    with refused("NOT_FOUND", "nothing"):
        list(raw.config.StreamParameters(cpb.StreamParametersRequest(stack="s", names=["nothing"])))
    region = raw.region()
    target = tpb.TensorTarget(slice=tpb.Slice(region_id=region.region_id, size_bytes=60))
    with refused("INVALID_ARGUMENT", "target.slice.size_bytes", "64"):
        raw.config.GetParameters(cpb.GetParametersRequest(stack="s", names=["layers.0.norm_w"], session_id=raw.session,
                                                          target=target))
    with refused("INVALID_ARGUMENT", "dtype"):
        raw.config.GetParameters(cpb.GetParametersRequest(stack="s", dtype=tpb.DATA_TYPE_FLOAT16))
    good = cpb.NamedTensor(name="layers.0.norm_w", tensor=raw.tensor(np.full(16, 3, np.float32)))
    for bad in (cpb.NamedTensor(name="layers.0.norm_b", tensor=raw.tensor(np.zeros(15, np.float32))),
                cpb.NamedTensor(name="layers.0.norm_b", tensor=raw.tensor(np.zeros(16, np.float16), tpb.DATA_TYPE_FLOAT16)),
                good):
        with refused("INVALID_ARGUMENT", "tensors[1]"):
            raw.config.SetParameters(cpb.SetParametersRequest(stack="s", mutation=raw.next(), tensors=[good, bad]))
    with refused("NOT_FOUND", "nothing"):
        raw.config.SetParameters(cpb.SetParametersRequest(
            stack="s", mutation=raw.next(), tensors=[good, cpb.NamedTensor(name="nothing", tensor=good.tensor)]))
    after = raw.parameters()
    assert all(np.array_equal(before[n], after[n]) for n in before)  # all or none


def test_inline_cap(raw):
    raw.stack(hidden_size=1024, heads=8, num_hidden_layers=2)
    with refused("INVALID_ARGUMENT", "target", str(16 << 20), "StreamParameters"):
        raw.config.GetParameters(cpb.GetParametersRequest(stack="s"))
    count = sum(len(c.data) for c in raw.config.StreamParameters(cpb.StreamParametersRequest(stack="s")))
    assert count == raw.describe().parameter_count * 4


def test_checkpoints(raw):
    raw.stack()
    raw.backward(raw.forward().context_id)
    raw.apply()
    saved = raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s", name="one"))
    assert saved.path.endswith("one.safetensors") and saved.step == 1 and saved.size_bytes > 0
    before = raw.parameters()
    raw.backward(raw.forward().context_id)
    raw.apply()
    loaded = raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s", name="one")).stack
    assert loaded.step == 1
    assert all(np.array_equal(a, before[n]) for n, a in raw.parameters().items())
    other = raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="t", name="one", create=True)).stack
    raw.stacks.append("t")
    assert other.config == loaded.config and other.step == 1
    with refused("ALREADY_EXISTS"):
        raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="t", name="one", create=True))
    with refused("NOT_FOUND"):
        raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s", name="none"))
    with refused("NOT_FOUND"):
        raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="u", name="one"))
    with refused("NOT_FOUND"):
        raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="u"))
    for name in ("../evil", "a/b", ".x"):
        with refused("INVALID_ARGUMENT", "name"):
            raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s", name=name))
        with refused("INVALID_ARGUMENT", "name"):
            raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s", name=name))
    raw.stack("wide", hidden_size=32)
    with refused("INVALID_ARGUMENT"):
        raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="wide", name="one"))


def test_damaged_checkpoints(raw, daemon):
    raw.stack()
    path = daemon.checkpoints / "damaged.safetensors"
    raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s", name="damaged"))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for content in (whole[:-1], whole[:100], b"", bytes(flipped), b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with refused("DATA_LOSS"):
            raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s", name="damaged"))


# --- LayerService ---


def test_steps(raw):
    raw.stack()
    forward = raw.forward()
    assert forward.context_id and list(forward.output.shape) == list(SHAPE)
    assert forward.input_transport == tpb.TRANSPORT_INLINE and forward.timing.compute_seconds > 0
    backward = raw.backward(forward.context_id, input_grad=tpb.TensorTarget(inline=tpb.InlineTarget()))
    assert len(backward.input_grad.inline_data) == BYTES
    assert any(np.any(g != 0) for g in raw.gradients().values())
    applied = raw.apply(max_grad_norm=1.0, weight_decay=0.01)
    assert applied.applied and applied.step == 1 and applied.grad_norm > 0
    raw.layer.ZeroGradients(lpb.ZeroGradientsRequest(stack="s", mutation=raw.next()))
    raw.took()
    assert all(np.all(g == 0) for g in raw.gradients().values())
    released = raw.forward().context_id
    raw.layer.ReleaseContext(lpb.ReleaseContextRequest(stack="s", session_id=raw.session, context_id=released))
    with refused("NOT_FOUND", "context"):
        raw.layer.ReleaseContext(lpb.ReleaseContextRequest(stack="s", session_id=raw.session, context_id=released))
    assert raw.describe().outstanding_contexts == 0


def test_evaluation_needs_no_sequence_and_changes_nothing(raw):
    raw.stack(attn_dropout_ratio=0.5, hidden_dropout_ratio=0.5)
    before = raw.describe()
    first = raw.forward(training=False)
    assert not first.context_id and raw.forward(training=False).output == first.output
    assert raw.describe() == before
    with refused("INVALID_ARGUMENT", "mutation"):
        raw.layer.Forward(raw.forward_request(training=False, mutation=raw.next()))


def test_layer_ranges(raw):
    raw.stack()
    whole = raw.forward(training=False).output.inline_data
    half = raw.forward(training=False, layers=tpb.LayerRange(begin=0, end=1)).output
    rest = raw.forward(training=False, input=half, layers=tpb.LayerRange(begin=1, end=2)).output.inline_data
    assert rest == whole
    for begin, end in ((0, 0), (1, 1), (0, 3), (-1, 1), (2, 1)):
        with refused("INVALID_ARGUMENT", "layers"):
            raw.forward(training=False, layers=tpb.LayerRange(begin=begin, end=end))


@pytest.mark.parametrize("shape", [(3, 8, 16), (2, 9, 16), (2, 8, 15), (16, 16), (2, 8, 4, 4)])
def test_input_shapes(raw, shape):
    raw.stack()
    unchanged(raw, lambda: refused_forward(raw, raw.tensor(np.ones(shape, np.float32))))


def refused_forward(raw, tensor):
    with refused("INVALID_ARGUMENT", "input.shape"):
        raw.forward(input=tensor)


def test_masks(raw):
    raw.stack()
    for bad in (np.zeros((2, 7), np.float32), np.zeros((2, 1, 8), np.float32), np.zeros(8, np.float32)):
        with refused("INVALID_ARGUMENT", "mask"):
            raw.forward(mask=raw.tensor(bad))
    with refused("INVALID_ARGUMENT", "mask"):
        raw.forward(mask=raw.tensor(np.zeros((2, 8), np.float16), tpb.DATA_TYPE_FLOAT16))
    for bad in (np.array([8], np.int32), np.array([[8, 8]], np.int32)):
        with refused("INVALID_ARGUMENT", "lengths"):
            raw.forward(lengths=raw.tensor(bad, tpb.DATA_TYPE_INT32))
    with refused("INVALID_ARGUMENT", "lengths"):
        raw.forward(lengths=raw.tensor(np.array([8, 8], np.float32)))


def test_backward_refused(raw, daemon):
    raw.stack()
    with refused("FAILED_PRECONDITION", "Forward"):
        raw.backward("no-such-context")
    context = raw.forward().context_id
    with refused("NOT_FOUND", "context"):
        raw.backward("no-such-context")
    before = raw.gradients()
    for bad in (raw.tensor(np.ones((1, 8, 16), np.float32)), raw.tensor(np.ones(SHAPE, np.float16), tpb.DATA_TYPE_FLOAT16)):
        with refused("INVALID_ARGUMENT", "output_grad"):
            raw.backward(context, output_grad=bad)
    other = Raw(daemon.target)
    other.forward()
    with refused("NOT_FOUND", "context"):
        other.backward(context)
    other.close()
    assert all(np.array_equal(before[n], g) for n, g in raw.gradients().items())
    raw.backward(context)  # the context is unspent
    with refused("NOT_FOUND", "context"):
        raw.backward(context)


def test_contexts_of_a_deleted_stack(raw):
    raw.stack()
    context = raw.forward().context_id
    raw.config.DeleteStack(cpb.DeleteStackRequest(name="s"))
    with refused("FAILED_PRECONDITION", "deleted"):
        raw.backward(context)


def test_contexts_run_out_with_numbers(raw):
    raw.stack(max_contexts=1)
    context = raw.forward().context_id
    before = raw.describe()
    with refused("RESOURCE_EXHAUSTED", "bytes"):
        raw.forward()
    assert raw.describe() == before
    raw.backward(context)
    raw.forward()


@pytest.mark.parametrize("field, value", [
    ("learning_rate", -1.0), ("learning_rate", float("nan")), ("learning_rate", float("inf")), ("beta1", 1.0),
    ("beta1", -0.1), ("beta2", 1.0), ("beta2", float("nan")), ("epsilon", 0.0), ("weight_decay", -0.1),
    ("max_grad_norm", -1.0), ("loss_scale", 0.0), ("loss_scale", -2.0), ("loss_scale", float("nan")), ("optimizer", 9),
    ("min_trust_ratio", 1.0), ("max_trust_ratio", 1.0), ("adapt_biases_and_norms", True)])
def test_apply_gradients_names_the_field(raw, field, value):
    raw.stack()
    raw.backward(raw.forward().context_id)

    def act():
        with refused("INVALID_ARGUMENT", field):
            raw.apply(**{field: value})

    unchanged(raw, act)


def test_a_step_with_gradients_that_are_not_finite_is_skipped(raw):
    raw.stack()
    raw.backward(raw.forward().context_id, output_grad=raw.tensor(np.full(SHAPE, np.inf, np.float32)))
    before = raw.parameters()
    applied = raw.apply(zero_gradients=True)
    assert not applied.applied and applied.step == 0
    assert all(np.array_equal(before[n], p) for n, p in raw.parameters().items())
    assert raw.describe().skipped_steps == 1
    raw.backward(raw.forward().context_id)
    assert raw.apply().applied


def test_loss_scale_is_divided_out(raw):
    raw.stack()
    raw.backward(raw.forward().context_id)
    plain = raw.apply(learning_rate=0.0, zero_gradients=True).grad_norm
    raw.backward(raw.forward().context_id, output_grad=raw.tensor(np.full(SHAPE, 1024, np.float32)))
    assert raw.apply(learning_rate=0.0, loss_scale=1024).grad_norm == pytest.approx(plain, rel=1e-5)


# --- exactly once ---


def test_a_repeated_mutation_answers_the_same_and_runs_once(raw):
    raw.stack(attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
    request = raw.forward_request()
    first = raw.layer.Forward(request)
    assert raw.layer.Forward(request) == first
    raw.took()
    assert raw.describe().forward_count == 1 and raw.describe().outstanding_contexts == 1
    request = raw.backward_request(first.context_id, input_grad=tpb.TensorTarget(inline=tpb.InlineTarget()))
    answer = raw.layer.Backward(request)
    once = raw.gradients()
    assert raw.layer.Backward(request) == answer
    raw.took()
    assert all(np.array_equal(once[n], g) for n, g in raw.gradients().items())
    request = lpb.ApplyGradientsRequest(stack="s", mutation=raw.next(), learning_rate=0.1)
    answer = raw.layer.ApplyGradients(request)
    weights = raw.parameters()
    assert raw.layer.ApplyGradients(request) == answer and answer.step == 1
    assert raw.describe().step == 1
    assert all(np.array_equal(weights[n], p) for n, p in raw.parameters().items())


def test_another_body_a_gap_and_a_missing_sequence(raw):
    raw.stack()
    first = raw.forward_request()
    raw.layer.Forward(first)
    raw.took()
    before = raw.describe()
    other = raw.forward_request(input=raw.tensor(np.zeros(SHAPE, np.float32)))
    other.mutation.sequence = 1
    with refused("ALREADY_EXISTS", "1"):
        raw.layer.Forward(other)
    with refused("ALREADY_EXISTS"):  # the same number for another method
        raw.layer.ZeroGradients(lpb.ZeroGradientsRequest(stack="s", mutation=first.mutation))
    gap = raw.forward_request()
    gap.mutation.sequence = 5
    with refused("FAILED_PRECONDITION", "2"):
        raw.layer.Forward(gap)
    none = raw.forward_request()
    none.mutation.sequence = 0
    with refused("INVALID_ARGUMENT", "sequence"):
        raw.layer.Forward(none)
    none.ClearField("mutation")
    with refused("INVALID_ARGUMENT", "mutation"):
        raw.layer.Forward(none)
    with refused("INVALID_ARGUMENT", "mutation"):
        raw.layer.ZeroGradients(lpb.ZeroGradientsRequest(stack="s"))
    mixed = raw.forward_request()
    mixed.mutation.session_id = "0" * 32
    with refused("INVALID_ARGUMENT", "session_id"):
        raw.layer.Forward(mixed)
    assert raw.describe() == before


def test_a_failed_mutation_does_not_use_its_sequence_up(raw):
    raw.stack()
    with refused("INVALID_ARGUMENT"):
        raw.forward(input=raw.tensor(np.ones((9, 8, 16), np.float32)))
    assert raw.next().sequence == 1
    raw.forward()


def test_answers_are_kept_for_the_window_only(raw):
    raw.stack()
    requests = []
    for _ in range(66):
        requests.append(lpb.ZeroGradientsRequest(stack="s", mutation=raw.next()))
        raw.layer.ZeroGradients(requests[-1])
        raw.took()
    raw.layer.ZeroGradients(requests[2])  # 64 kept
    with refused("ALREADY_EXISTS"):
        raw.layer.ZeroGradients(requests[1])


def test_sequences_of_two_sessions_are_their_own(raw, daemon):
    raw.stack()
    other = Raw(daemon.target)
    a, b = raw.forward().context_id, other.forward().context_id
    with refused("NOT_FOUND", "context"):
        raw.backward(b)
    other.backward(b)
    raw.backward(a)
    other.close()
    assert raw.describe().outstanding_contexts == 0


def mutations(raw):
    """{RPC: (call, request without its mutation filled in)} of every mutation, each of which would succeed."""
    context = raw.forward().context_id
    value = cpb.NamedTensor(name="layers.0.norm_w", tensor=raw.tensor(np.ones(16, np.float32)))
    return {
        "Forward": (raw.layer.Forward, raw.forward_request()),
        "Backward": (raw.layer.Backward, raw.backward_request(context)),
        "ApplyGradients": (raw.layer.ApplyGradients, lpb.ApplyGradientsRequest(stack="s", learning_rate=0.1)),
        "ZeroGradients": (raw.layer.ZeroGradients, lpb.ZeroGradientsRequest(stack="s")),
        "SetParameters": (raw.config.SetParameters, cpb.SetParametersRequest(stack="s", tensors=[value])),
    }


@pytest.mark.parametrize("name", ["Forward", "Backward", "ApplyGradients", "ZeroGradients", "SetParameters"])
def test_every_mutation_is_counted(raw, daemon, name):
    raw.stack()
    raw.backward(raw.forward().context_id)  # gradients that a wrong step would change or apply
    call, request = mutations(raw)[name]
    before, weights, gradients = raw.describe(), raw.parameters(), raw.gradients()
    request.mutation.CopyFrom(tpb.Mutation(session_id=raw.session, sequence=raw.sequence - 1))  # a Backward's
    with refused("ALREADY_EXISTS", str(raw.sequence - 1)):
        call(request)
    request.mutation.sequence = raw.sequence + 2
    with refused("FAILED_PRECONDITION", "gap", str(raw.sequence + 1)):
        call(request)
    request.mutation.sequence = 2**64 - 1
    with refused("FAILED_PRECONDITION", "gap"):
        call(request)
    request.mutation.sequence = 0
    with refused("INVALID_ARGUMENT", "mutation.sequence"):
        call(request)
    request.mutation.sequence = raw.sequence + 1
    elsewhere = type(request)()
    elsewhere.CopyFrom(request)
    elsewhere.stack = "none"
    with refused("NOT_FOUND"):
        call(elsewhere)
    stranger = type(request)()
    stranger.CopyFrom(request)
    stranger.mutation.session_id = "0" * 32
    if name == "Forward":
        stranger.session_id = "0" * 32
    with refused("NOT_FOUND", "session"):
        call(stranger)
    assert raw.describe() == before
    for were, are in ((weights, raw.parameters()), (gradients, raw.gradients())):
        assert all(np.array_equal(were[n], are[n]) for n in were)
    first = call(request)  # and so it would have run
    assert call(request) == first
    raw.took()


def test_without_a_checkpoint_folder():
    with Daemon(checkpoints=False) as daemon:
        raw = Raw(daemon.target)
        raw.stack()
        assert not raw.config.GetServerInfo(cpb.GetServerInfoRequest()).checkpoints_enabled
        with refused("FAILED_PRECONDITION", "checkpoint"):
            raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s"))
        with refused("FAILED_PRECONDITION", "checkpoint"):
            raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s"))
        raw.close()


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one():
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        raw.stack()
        raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s"))
        path = daemon.checkpoints / "s.safetensors"
        old = path.read_bytes()
        before = raw.describe()
        # No space: a file system of 64 KiB in the folder's place.
        daemon.checkpoints.rename(daemon.folder / "aside")
        daemon.checkpoints.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(daemon.checkpoints)],
                                 capture_output=True)
        if mounted.returncode == 0:  # needs root
            try:
                with refused("RESOURCE_EXHAUSTED"):
                    raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s"))
                assert not list(daemon.checkpoints.iterdir())
            finally:
                subprocess.run(["umount", str(daemon.checkpoints)], check=True)
        daemon.checkpoints.rmdir()
        (daemon.folder / "aside").rename(daemon.checkpoints)
        assert path.read_bytes() == old and list(daemon.checkpoints.iterdir()) == [path]
        # A file in the way of the temporary one's folder.
        daemon.checkpoints.rename(daemon.folder / "aside")
        daemon.checkpoints.write_text("not a folder")
        with refused("INTERNAL"):
            raw.config.SaveCheckpoint(cpb.SaveCheckpointRequest(stack="s"))
        daemon.checkpoints.unlink()
        (daemon.folder / "aside").rename(daemon.checkpoints)
        assert raw.describe() == before
        raw.config.LoadCheckpoint(cpb.LoadCheckpointRequest(stack="s"))
        raw.close()


def test_training_that_does_not_fit(raw):
    """A stack that fits for evaluation, and whose contexts would not."""
    tall = dict(batch_size=1024, max_seq_length=512, hidden_size=64, heads=2, num_hidden_layers=40, training=False)
    raw.stack("tall", **tall)
    before = raw.describe("tall")
    with refused("RESOURCE_EXHAUSTED", "bytes"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="tall", training=True))
    assert raw.describe("tall") == before


@pytest.mark.slow
def test_a_call_cancelled_while_it_waits_changes_nothing(raw, daemon):
    raw.stack("busy", batch_size=8, max_seq_length=128, hidden_size=256, heads=4, num_hidden_layers=6 if ON_CPU else 160)
    raw.stack()
    # They keep the device for longer than a client takes to look and to cancel.
    long = [raw.layer.Forward.future(lpb.ForwardRequest(
        stack="busy", session_id=raw.session, training=False, input=raw.tensor(np.ones((8, 128, 256), np.float32)),
        output=tpb.TensorTarget(inline=tpb.InlineTarget()))) for _ in range(1 if ON_CPU else 40)]
    started = lambda: sum(v for n, v in daemon.metrics().items()
                          if n.startswith("grpc_server_started_total") and '"Forward"' in n)
    until(lambda: started() >= len(long))
    count = started()
    waiting = raw.layer.Forward.future(raw.forward_request())
    until(lambda: started() > count)
    waiting.cancel()
    for call in long:
        call.result()
    until(lambda: daemon.metrics()['lamina_admission_rejections_total{reason="cancelled"}'] >= 1)
    assert raw.describe().forward_count == 0 and raw.describe().outstanding_contexts == 0
    raw.forward()  # the sequence was not used up


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def draining(raw):
    try:
        raw.config.ListStacks(cpb.ListStacksRequest())
        return False
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAVAILABLE


def test_everything_is_unavailable_while_draining():
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        raw.stack("wide", hidden_size=768, heads=12)
        raw.stack()
        context = raw.forward().context_id
        stream = raw.config.StreamParameters(cpb.StreamParametersRequest(stack="wide"))
        first = next(stream)  # the rest is not read yet, so this call stays, and the drain waits for it
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: draining(raw))
        session = raw.session
        for call, request in (
            (raw.layer.Forward, raw.forward_request()), (raw.layer.Backward, raw.backward_request(context)),
            (raw.layer.ApplyGradients, lpb.ApplyGradientsRequest(stack="s", mutation=raw.next())),
            (raw.layer.ZeroGradients, lpb.ZeroGradientsRequest(stack="s", mutation=raw.next())),
            (raw.config.CreateStack, cpb.CreateStackRequest(name="new", config=cpb.StackConfig(**CONFIG))),
            (raw.config.UpdateStack, cpb.UpdateStackRequest(name="s", training=True)),
            (raw.config.DeleteStack, cpb.DeleteStackRequest(name="s")),
            (raw.config.SetParameters, cpb.SetParametersRequest(stack="s", mutation=raw.next())),
            (raw.config.GetParameters, cpb.GetParametersRequest(stack="s")),
            (raw.config.GetGradients, cpb.GetGradientsRequest(stack="s")),
            (raw.config.SaveCheckpoint, cpb.SaveCheckpointRequest(stack="s")),
            (raw.config.LoadCheckpoint, cpb.LoadCheckpointRequest(stack="s")),
            (raw.sessions.CreateSession, spb.CreateSessionRequest()),
            (raw.sessions.CreateRegion, spb.CreateRegionRequest(session_id=session, size_bytes=1))):
            with refused("UNAVAILABLE", "draining"):
                call(request, timeout=30)
            assert daemon.process.poll() is None
        # The call that was in goes to its end.
        assert len(first.data) + sum(len(chunk.data) for chunk in stream) == 2 * 4 * (12 * 768 * 768 + 13 * 768)
        assert daemon.process.wait(60) == 0
        raw.channel.close()


# --- SessionService ---


def test_sessions(raw, daemon):
    opened = raw.sessions.CreateSession(spb.CreateSessionRequest(client_name="two"))
    assert len(opened.session_id) == 32 and opened.lease_seconds == 30 and opened.broker_path
    assert opened.region_cap == 256 and opened.region_cap_bytes == 8 << 30
    region = raw.region(session=opened.session_id)
    assert list(raw.sessions.ListRegions(spb.ListRegionsRequest(session_id=opened.session_id)).regions) == [region]
    raw.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=opened.session_id))
    for call, request in (
        (raw.sessions.DeleteSession, spb.DeleteSessionRequest(session_id=opened.session_id)),
        (raw.sessions.ListRegions, spb.ListRegionsRequest(session_id=opened.session_id)),
        (raw.sessions.CreateRegion, spb.CreateRegionRequest(session_id=opened.session_id, size_bytes=1)),
        (raw.sessions.ReleaseRegion, spb.ReleaseRegionRequest(session_id=opened.session_id, region_id=region.region_id)),
        (raw.layer.Forward, lpb.ForwardRequest(stack="s", session_id=opened.session_id))):
        with refused("NOT_FOUND", "session") as caught:
            call(request)
        assert opened.session_id not in caught.value.details()
    for bad in ("x" * 65, "new\nline"):
        with refused("INVALID_ARGUMENT", "client_name"):
            raw.sessions.CreateSession(spb.CreateSessionRequest(client_name=bad))
    assert opened.session_id not in daemon.log() and region.region_id not in daemon.log()


def test_keep_alive(raw):
    raw.stack()
    session = raw.sessions.CreateSession(spb.CreateSessionRequest()).session_id
    one = [spb.KeepAliveRequest(session_id=session)]
    stream = raw.sessions.KeepAlive(iter_then_wait(one))
    assert next(stream).applied_sequence == 0
    with refused("ALREADY_EXISTS"):
        list(raw.sessions.KeepAlive(iter(one)))
    stream.cancel()
    gone(raw, session)
    with refused("NOT_FOUND"):
        list(raw.sessions.KeepAlive(iter(one)))
    session = raw.sessions.CreateSession(spb.CreateSessionRequest()).session_id
    with refused("INVALID_ARGUMENT", "session_id"):
        list(raw.sessions.KeepAlive(iter([spb.KeepAliveRequest(session_id=session), spb.KeepAliveRequest(session_id="f" * 32)])))
    gone(raw, session)


def iter_then_wait(messages):
    yield from messages
    time.sleep(5)


def gone(raw, session):
    for _ in range(100):
        try:
            raw.sessions.ListRegions(spb.ListRegionsRequest(session_id=session))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND
            return
        time.sleep(0.05)
    raise AssertionError("the session is still there")


def test_health_and_reflection(raw):
    check = raw.channel.unary_unary("/grpc.health.v1.Health/Check")
    for service in (b"", b"lamina.v1.LayerService", b"lamina.v1.ConfigService", b"lamina.v1.SessionService"):
        request = bytes([10, len(service)]) + service if service else b""
        assert check(request) == b"\x08\x01"  # SERVING
    with refused("NOT_FOUND"):
        check(b"\x0a\x04none")
    reflect = raw.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    listed = next(reflect(iter([b"\x3a\x00"])))  # list_services
    for service in (b"lamina.v1.LayerService", b"lamina.v1.ConfigService", b"lamina.v1.SessionService",
                    b"grpc.health.v1.Health"):
        assert service in listed
        described = next(reflect(iter([bytes([0x22, len(service)]) + service])))  # file_containing_symbol
        assert service.rsplit(b".", 1)[1] in described and b"error" not in described[:64]
