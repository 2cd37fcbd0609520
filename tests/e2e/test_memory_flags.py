"""Memory flags: each created, and turned on live, gives the plain run's gradients and the plan that was told."""

import lamina
import numpy as np
import pytest
from lamina.v1 import config_service_pb2 as cpb
from raw import CONFIG as RAW_CONFIG
from raw import refused

CONFIG = dict(batch_size=3, max_seq_length=13, hidden_size=24, heads=3, num_hidden_layers=2, seed=5,
              attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
FLAGS = ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing"]
# What Backward recomputes with these is bit for bit what Forward computed.
SAME_ARITHMETIC = {"gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing"}
SETS = [[f] for f in FLAGS] + [["stochastic_mode"], FLAGS, [*FLAGS, "stochastic_mode"]]


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()]).astype(np.float64)


def settled(stack):
    """The stack with gammas around 1 and betas that are not zero."""
    generator = np.random.default_rng(3)
    norms = {n: p for n, p in stack.parameters().items() if "norm_" in n or "attn_n" in n}
    stack.set_parameters({n: p + generator.uniform(-0.4, 0.4, p.shape).astype(np.float32) for n, p in norms.items()})
    return stack


def step(stack):
    """(y, dx, gradients) of a training step with fixed data; the gradients are zeroed."""
    generator = np.random.default_rng(4)
    x, dy = (generator.standard_normal((3, 13, 24)).astype(np.float32) for _ in range(2))
    y, context = stack.forward(x)
    dx = stack.backward(context, dy)
    found = [lamina.to_float32(a, stack.dtype).astype(np.float64).ravel() for a in (y, dx)] + [flat(stack.gradients())]
    stack.zero_gradients()
    return found


def check(found, plain, flags, dtype):
    assert np.array_equal(found[0], plain[0])  # no flag changes what Forward gives
    if set(flags) <= SAME_ARITHMETIC:
        assert all(np.array_equal(a, b) for a, b in zip(found, plain))
        return
    # x^ comes from an output that was rounded once, over two layers.
    tolerance = {"fp32": 4e-6, "bf16": 6e-2, "fp16": 8e-3}[dtype]
    for a, b in zip(found[1:], plain[1:]):
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("flags", SETS, ids="+".join)
@pytest.mark.parametrize("dtype, pre_layer_norm", [("fp32", True), ("fp32", False), ("bf16", True), ("fp16", False)])
def test_gradients_are_the_plain_runs(client, flags, dtype, pre_layer_norm):
    how = dict(CONFIG, dtype=dtype, pre_layer_norm=pre_layer_norm)
    plain = settled(client.create_stack("plain", **how))
    created = settled(client.create_stack("created", **how, **{f: True for f in flags}))
    live = settled(client.create_stack("live", **how))
    first = step(plain)
    check(step(created), first, flags, dtype)
    assert all(np.array_equal(a, b) for a, b in zip(step(live), first))
    info = live.update(**{f: True for f in flags})
    assert all(getattr(info.config, f) for f in flags) and info.plan == created.info().plan == client.plan(info.config)
    second = step(plain)
    check(step(live), second, flags, dtype)
    off = live.update(**{f: False for f in flags})
    assert off.plan == plain.info().plan
    assert all(np.array_equal(a, b) for a, b in zip(step(live), step(plain)))


def test_flags_save_what_the_plan_says(client, daemon):
    plain = client.create_stack("t", **CONFIG).info().plan
    for flag in ("normalize_invertible", "gelu_checkpoint", "activation_checkpointing"):
        plan = client.stack("t").update(**{flag: True}).plan
        assert plan.bytes_of("activations") < plain.bytes_of("activations"), flag
        assert daemon.metrics()['lamina_device_memory_bytes{kind="activations"}'] == plan.bytes_of("activations")
        client.stack("t").update(**{flag: False})
    assert client.stack("t").info().plan == plain


def test_updates_are_all_or_none(raw):
    raw.stack()
    context = raw.forward().context_id
    before = raw.describe()
    for change in (dict(gelu_checkpoint=True), dict(normalize_invertible=True), dict(activation_checkpointing=True),
                   dict(training=False), dict(hidden_dropout_ratio=0.5, activation_checkpointing=True)):
        with refused("FAILED_PRECONDITION", "context"):
            raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", **change))
        assert raw.describe() == before
    with refused("INVALID_ARGUMENT", "attn_dropout_ratio"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", stochastic_mode=True, attn_dropout_ratio=1.0))
    with refused("INVALID_ARGUMENT", "nothing to change"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="s"))
    with refused("NOT_FOUND", "none"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="none", gelu_checkpoint=True))
    assert raw.describe() == before
    # What lays out no memory anew may change while a context waits.
    raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", hidden_dropout_ratio=0.5, stochastic_mode=True))
    raw.backward(context)
    raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", gelu_checkpoint=True))


def test_an_update_that_does_not_fit(raw):
    """A stack that takes a small part of what is free with activation_checkpointing, and without it more than all."""
    free = raw.config.GetServerInfo(cpb.GetServerInfoRequest()).device_free_bytes
    # A wide feed-forward beside a narrow H: what is dropped is seventy times what is kept.
    shape = dict(max_seq_length=1024, hidden_size=8, heads=1, intermediate_size=256, num_hidden_layers=64,
                 max_contexts=64, activation_checkpointing=True, seed=1)
    plan = lambda **c: raw.config.PlanMemory(cpb.PlanMemoryRequest(config=cpb.StackConfig(**c))).plan.total_bytes
    batch = max(1, (free // 20) // (plan(**shape, batch_size=2) - plan(**shape, batch_size=1)))
    config = dict(shape, batch_size=batch)
    assert plan(**config) < free < plan(**dict(config, activation_checkpointing=False))
    raw.stack(**config)
    before = raw.describe()
    with refused("RESOURCE_EXHAUSTED", "bytes"):
        raw.config.UpdateStack(cpb.UpdateStackRequest(name="s", attn_dropout_ratio=0.5, activation_checkpointing=False))
    assert raw.describe() == before


def test_a_gamma_too_small_to_divide_by(client):
    stack = client.create_stack("t", **CONFIG, normalize_invertible=True)
    gamma = np.ones(24, np.float32)
    gamma[5] = 0
    stack.set_parameters({"layers.1.attn_nw": gamma})
    before = stack.info()
    x = np.ones((2, 5, 24), np.float32)
    with pytest.raises(lamina.FailedPrecondition, match=r"layers\.1\.attn_nw.*5"):
        stack.forward(x)
    assert stack.info() == before
    stack.forward(x, training=False)
    stack.update(normalize_invertible=False)
    y, context = stack.forward(x)
    stack.backward(context, y)


def test_weights_that_changed_between_forward_and_backward(client):
    for flag in ("activation_checkpointing", "normalize_invertible"):
        stack = client.create_stack("t", **CONFIG, **{flag: True})
        y, context = stack.forward(np.ones((2, 5, 24), np.float32))
        stack.set_parameters({"layers.0.norm_b": np.ones(24, np.float32)})
        with pytest.raises(lamina.FailedPrecondition, match="weights of its layers have changed"):
            stack.backward(context, y)
        assert stack.info().outstanding_contexts == 1
        context.release()
        y, context = stack.forward(np.ones((2, 5, 24), np.float32))
        stack.backward(context, y)
        client.delete_stack("t")


@pytest.mark.parametrize("flag", [*FLAGS, "stochastic_mode", "causal", "dynamic_loss_scale"])
def test_nothing_is_unimplemented(raw, flag):
    created = raw.stack(**{flag: True})
    assert getattr(created.config, flag)
    raw.backward(raw.forward().context_id)
    assert raw.apply().applied
    plan = raw.config.PlanMemory(cpb.PlanMemoryRequest(config=cpb.StackConfig(**RAW_CONFIG, **{flag: True}))).plan
    assert plan == created.plan


def test_causal_is_a_triangular_mask(client):
    causal = client.create_stack("causal", **CONFIG, causal=True)
    x = np.random.default_rng(0).standard_normal((2, 7, 24)).astype(np.float32)
    y = causal.forward(x, training=False)[0].copy()
    for n in (1, 3, 6):  # a prefix gives a prefix
        prefix, _ = causal.forward(x[:, :n], training=False)
        assert np.allclose(prefix, y[:, :n], atol=2e-6)
    changed = x.copy()
    changed[:, 4:] += 1
    assert np.array_equal(causal.forward(changed, training=False)[0][:, :4], y[:, :4])
