"""The Python client and RemoteStack: against PyTorch, over every transport."""

import gc
import time

import encoder
import lamina
import lamina.torch
import numpy as np
import pytest
import torch
from lamina.torch import RemoteStack

CONFIG = dict(batch_size=3, max_seq_length=13, hidden_size=24, heads=3, num_hidden_layers=2, seed=5)


def exact(stack, **how):
    """The stack in PyTorch, fp64, with the stack's own weights: (x, dy) -> (y, dx, gradients)."""
    weights = stack.parameters()
    c = stack.config
    return lambda x, dy: encoder.run(x, dy, weights, c.num_hidden_layers, torch.float64, "cpu", heads=c.heads,
                                     pre_layer_norm=c.pre_layer_norm, gelu=c.gelu, **how)


@pytest.mark.parametrize("pre_layer_norm", [True, False])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("batch, seq", [(3, 13), (1, 1), (2, 7)])
def test_remote_stack_against_pytorch(client, pre_layer_norm, gelu, batch, seq):
    stack = client.create_stack("t", **CONFIG, pre_layer_norm=pre_layer_norm, gelu=gelu)
    generator = np.random.default_rng(batch)
    stack.set_parameters({n: p + generator.standard_normal(p.shape).astype(np.float32) * 0.1
                          for n, p in stack.parameters().items()})
    x = torch.from_numpy(generator.standard_normal((batch, seq, 24)).astype(np.float32)).requires_grad_()
    dy = torch.from_numpy(generator.standard_normal((batch, seq, 24)).astype(np.float32))
    lengths = torch.from_numpy(generator.integers(1, seq + 1, batch))
    mask = torch.where(torch.arange(seq)[None, :] < lengths[:, None], 0.0, -1e30)[:, None, None, :].double()
    y = RemoteStack(stack)(x, lengths=lengths)
    y.backward(dy)
    ref_y, ref_dx, ref_grads = exact(stack, mask=mask)(x.detach().double(), dy.double())
    assert encoder.relative_error(y.detach(), ref_y) < 1e-5
    assert encoder.relative_error(x.grad, ref_dx) < 1e-5
    for name, gradient in stack.gradients().items():
        # A key bias shifts every score of a query alike: its exact gradient is zero, and a query attending to one
        # key alone makes the whole attention's zero. Against the largest gradient, then.
        scale = max(float(g.norm()) for g in ref_grads.values())
        assert float((torch.from_numpy(gradient) - ref_grads[name]).norm()) < 1e-5 * scale, name


def test_attention_mask_lengths_and_additive_mask_agree(client):
    module = RemoteStack(client.create_stack("t", **CONFIG)).eval()
    x = torch.randn(2, 5, 24)
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    by_lengths = module(x, lengths=kept.sum(1))
    assert torch.allclose(module(x, attention_mask=kept), by_lengths, atol=1e-6)
    assert torch.allclose(module(x, mask=(1 - kept) * -1e30), by_lengths, atol=1e-6)
    with pytest.raises(ValueError):
        module(x, lengths=kept.sum(1), attention_mask=kept)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_half_types_are_close_to_fp64(client, dtype, pre_layer_norm):
    stack = client.create_stack("t", **CONFIG, dtype=dtype, pre_layer_norm=pre_layer_norm)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    x = torch.randn(3, 13, 24).to(torch_dtype).requires_grad_()
    dy = torch.randn(3, 13, 24).to(torch_dtype)  # not all equal: a last layer norm's gradient of a sum is zero
    y = RemoteStack(stack)(x)
    assert y.dtype == torch_dtype
    y.backward(dy)
    # Weights as the stack rounds them; unit roundoff times what two layers add up.
    ref_y, ref_dx, _ = exact(stack)(x.detach().double(), dy.double())
    roundoff = {"bf16": 2.0**-8, "fp16": 2.0**-11}[dtype]
    assert encoder.relative_error(y.detach().float(), ref_y) < 8 * roundoff
    assert encoder.relative_error(x.grad.float(), ref_dx) < 16 * roundoff


def test_adamw_against_pytorch_over_steps(client):
    stack = client.create_stack("t", **CONFIG)
    start = {n: torch.from_numpy(p).double().requires_grad_() for n, p in stack.parameters().items()}
    matrices = [p for n, p in start.items() if p.dim() == 2]
    vectors = [p for n, p in start.items() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    generator = np.random.default_rng(1)
    x = generator.standard_normal((3, 13, 24)).astype(np.float32)
    target = generator.standard_normal((3, 13, 24)).astype(np.float32)
    ours, theirs = [], []
    for _ in range(10):
        y, context = stack.forward(x, training=True)
        ours.append(float(((y - target) ** 2).mean()))
        stack.backward(context, 2 * (y - target) / y.size, input_grad=False)
        stack.apply_gradients(lr=1e-2, beta2=0.99, weight_decay=0.1, max_grad_norm=0.5, zero_gradients=True)
        z = torch.from_numpy(x).double()
        for i in range(2):
            z = encoder.layer(z, {n: start[f"layers.{i}.{n}"] for n in encoder.NAMES}, 3, True)
        loss = ((z - torch.from_numpy(target).double()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(start.values()), 0.5)
        optimizer.step()
        theirs.append(loss.item())
    assert np.allclose(ours, theirs, rtol=2e-4)
    assert ours[-1] < ours[0]


def test_central_differences_through_rpc(client):
    """The gradient of a random linear functional, along random directions of the input and of every parameter."""
    stack = client.create_stack("t", **CONFIG, attn_dropout_ratio=0.0)
    generator = np.random.default_rng(2)
    x = generator.standard_normal((2, 6, 24)).astype(np.float32)
    weight = generator.standard_normal((2, 6, 24)).astype(np.float32)
    value = lambda v: float((stack.forward(v, training=False)[0].astype(np.float64) * weight).sum())
    _, context = stack.forward(x, training=True)
    dx = stack.backward(context, weight)
    step = 2e-2
    direction = generator.standard_normal(x.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    numeric = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert numeric == pytest.approx(float((dx * direction).sum()), rel=2e-2, abs=2e-2)
    gradients, parameters = stack.gradients(), stack.parameters()
    for name in ("layers.0.attn_qkvw", "layers.1.inter_w", "layers.0.output_b", "layers.1.norm_w"):
        p = parameters[name]
        direction = generator.standard_normal(p.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        values = []
        for sign in (1, -1):
            stack.set_parameters({name: p + sign * step * direction})
            values.append(value(x))
        stack.set_parameters({name: p})
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float((gradients[name] * direction).sum()), rel=2e-2, abs=2e-2), name


def test_transports_give_the_same_bits(daemon):
    results = []
    for target, transport in ((daemon.target, "memfd"), (daemon.target, "inline"), (daemon.tcp, "inline")):
        with lamina.connect(target, transport=transport) as client:
            assert client.transport == transport
            stack = client.create_stack("bits", **CONFIG, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
            x = np.random.default_rng(0).standard_normal((3, 13, 24)).astype(np.float32)
            y, context = stack.forward(x, training=True)
            dx = stack.backward(context, y)
            results.append([y.copy(), dx.copy(), *stack.gradients().values()])
            client.delete_stack("bits")
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other))


def test_layer_ranges_one_after_another_are_the_whole(client):
    """Forward through two halves and Backward through them in reverse: the whole's result, and its gradients."""
    x = np.random.default_rng(0).standard_normal((3, 13, 24)).astype(np.float32)
    lengths = [13, 4, 1]
    whole = client.create_stack("whole", **dict(CONFIG, num_hidden_layers=3))
    y, context = whole.forward(x, lengths=lengths)
    dx = whole.backward(context, y)
    parts = client.create_stack("parts", **dict(CONFIG, num_hidden_layers=3), max_contexts=3)
    a, first = parts.forward(x, lengths=lengths, layers=(0, 2))
    b, second = parts.forward(a, lengths=lengths, layers=(2, 3))
    assert np.array_equal(b, y)
    assert np.array_equal(parts.backward(first, parts.backward(second, b)), dx)
    expected, found = whole.gradients(), parts.gradients()
    assert all(np.array_equal(expected[n], found[n]) for n in expected)
    # Two halves as modules of one PyTorch program, with something of its own in between.
    x = torch.from_numpy(x).requires_grad_()
    parts.zero_gradients()
    lower, upper = RemoteStack(parts, layers=(0, 2)), RemoteStack(parts, layers=(2, 3))
    upper(lower(x, lengths=torch.tensor(lengths)) * 1.0, lengths=torch.tensor(lengths)).backward(torch.from_numpy(y))
    assert np.array_equal(x.grad.numpy(), dx)
    with pytest.raises(lamina.InvalidArgument, match="layers"):
        parts.forward(x.detach(), layers=(2, 4))


def test_backward_through_a_graph_of_several_forwards(client):
    """One stack used twice in a graph: contexts are spent in the order that autograd wants, gradients add up."""
    stack = client.create_stack("t", **CONFIG)
    module = RemoteStack(stack)
    weights = stack.parameters()
    x = torch.randn(2, 5, 24)
    a, b = x.clone().requires_grad_(), (x * 2).requires_grad_()
    (module(a) * module(b)).sum().backward()
    leaves = {n: torch.from_numpy(p).double().requires_grad_() for n, p in weights.items()}

    def run(z):
        for i in range(2):
            z = encoder.layer(z, {n: leaves[f"layers.{i}.{n}"] for n in encoder.NAMES}, 3, True)
        return z

    ra, rb = x.double().requires_grad_(), (x.double() * 2).requires_grad_()
    (run(ra) * run(rb)).sum().backward()
    assert encoder.relative_error(a.grad, ra.grad) < 1e-5 and encoder.relative_error(b.grad, rb.grad) < 1e-5
    scale = max(float(leaf.grad.norm()) for leaf in leaves.values())
    for name, gradient in stack.gradients().items():
        assert float((torch.from_numpy(gradient) - leaves[name].grad).norm()) < 1e-5 * scale, name


def test_module_weights(client):
    source = RemoteStack(client.create_stack("a", **CONFIG))
    target = RemoteStack(client.create_stack("b", **dict(CONFIG, seed=6)))
    x = torch.randn(2, 5, 24)
    source.eval(), target.eval()
    assert not torch.equal(source(x), target(x))
    target.load_weights(source.weights())
    assert torch.equal(source(x), target(x))
    with pytest.raises(lamina.NotFound, match="nothing"):
        target.load_weights({"nothing": torch.zeros(1)})


def test_tensors_from_empty_cross_in_place(client, daemon):
    """A module's input that lies in shared memory is not copied: the daemon reads what is written after `empty`."""
    module = RemoteStack(client.create_stack("t", **CONFIG, dtype="bf16"))
    x = module.empty(2, 5)
    assert x.dtype == torch.bfloat16 and x.shape == (2, 5, 24)
    assert client.session.pool.find(lamina.torch.as_array(x)) is not None
    x.copy_(torch.randn(2, 5, 24))
    y = module(x)
    assert y.dtype == torch.bfloat16 and client.session.pool.find(lamina.torch.as_array(y.detach())) is not None
    strided = torch.randn(5, 2, 24, dtype=torch.float64).transpose(0, 1)
    assert torch.equal(module.eval()(strided), module(strided.float().bfloat16().contiguous()).double())


def test_arrays_from_empty_are_passed_in_place(client, daemon):
    stack = client.create_stack("t", **CONFIG)
    big = client.empty((4, 13, 24))
    big[:] = 1
    y, _ = stack.forward(big[1:3], training=False)  # a contiguous part of it
    assert np.array_equal(y[0], y[1])
    out = client.empty((2, 13, 24))
    y, _ = stack.forward(big[1:3], training=False, out=out)
    assert y is out
    # Results are the caller's while they are referenced, and reused afterwards.
    held = [stack.forward(big[1:3] * i, training=False)[0] for i in range(4)]
    copies = [h.copy() for h in held]
    for _ in range(20):
        stack.forward(big[1:3], training=False)
    assert all(np.array_equal(h, c) for h, c in zip(held, copies))
    regions = daemon.metrics()["lamina_regions"]
    for _ in range(200):
        stack.forward(big[1:3], training=False)
    assert daemon.metrics()["lamina_regions"] == regions


def test_contexts_without_a_backward_are_released(client):
    stack = client.create_stack("t", **CONFIG, max_contexts=2)
    module = RemoteStack(stack)
    for _ in range(10):
        module(torch.randn(3, 13, 24, requires_grad=True)).sum()
        gc.collect()
    with torch.no_grad():
        module(torch.randn(3, 13, 24))
    deadline = time.monotonic() + 20
    while stack.info().outstanding_contexts > 0 and time.monotonic() < deadline:
        stack.forward(np.ones((1, 1, 24), np.float32), training=False)
    assert stack.info().outstanding_contexts == 0


def test_two_backwards_say_what_is_wrong(client):
    module = RemoteStack(client.create_stack("t", **CONFIG))
    x = torch.randn(1, 2, 24, requires_grad=True)
    y = module(x).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="this PyTorch has no torch.compiler")
def test_inside_a_compiled_module(client):
    stack = client.create_stack("t", **CONFIG)
    module = torch.nn.Sequential(torch.nn.Linear(24, 24), RemoteStack(stack), torch.nn.Linear(24, 1))
    x = torch.randn(2, 5, 24)
    gradients = []
    for run in (module, torch.compile(module, backend="aot_eager")):
        module.zero_grad()
        run(x).sum().backward()
        gradients.append(module[0].weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6) and gradients[0].abs().max() > 0
    assert stack.info().outstanding_contexts == 0


def test_ml_dtypes_arrays(client):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stack = client.create_stack("t", **CONFIG, dtype="bf16")
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(ml_dtypes.bfloat16)
    y, context = stack.forward(x)
    dx = stack.backward(context, y)
    assert y.dtype == dx.dtype == x.dtype
    bits, _ = stack.forward(x.view(np.uint16), training=False)
    assert bits.dtype == np.uint16 and np.array_equal(bits, y.view(np.uint16))
    stack.set_parameters({"layers.0.norm_b": np.ones(24, ml_dtypes.bfloat16)})
    assert np.all(stack.parameters(["layers.0.norm_b"])["layers.0.norm_b"] == 1)


def test_train_and_eval(client):
    module = RemoteStack(client.create_stack("t", **CONFIG, hidden_dropout_ratio=0.5, attn_dropout_ratio=0.5))
    x = torch.randn(2, 4, 24)
    first, second = module(x), module(x)
    assert not torch.equal(first, second) and first.requires_grad  # although x does not
    module.eval()
    assert torch.equal(module(x), module(x)) and not module(x).requires_grad
    assert list(module.parameters()) == []


def test_errors_are_typed(client):
    with pytest.raises(lamina.NotFound):
        client.stack("none")
    with pytest.raises(lamina.InvalidArgument, match="heads"):
        client.create_stack("bad", **dict(CONFIG, heads=5))
    with pytest.raises(lamina.InvalidArgument, match="loss_scale_hysteresis"):
        client.create_stack("bad", **CONFIG, loss_scale_hysteresis=0)
    stack = client.create_stack("t", **CONFIG)
    with pytest.raises(lamina.AlreadyExists):
        client.create_stack("t", **CONFIG)
    with pytest.raises(lamina.ResourceExhausted):
        client.create_stack("huge", **dict(CONFIG, hidden_size=24576, num_hidden_layers=1000))
    with pytest.raises(lamina.InvalidArgument, match="input.shape"):
        stack.forward(np.zeros((4, 13, 24), np.float32))
    with pytest.raises(TypeError):
        stack.forward(np.zeros((1, 1, 24), np.int64))
    with pytest.raises(TypeError, match="no_such"):
        client.create_stack("x", no_such=1)
    with pytest.raises(ValueError):
        client.create_stack("x", **CONFIG, dtype="fp8")
    stack.forward(np.zeros((1, 1, 24), np.float32))  # and the sequence is still in step
    with pytest.raises(lamina.Unavailable, match="."):
        lamina.connect("unix:/nonexistent/socket").info()
    with pytest.raises(lamina.LaminaError) as caught:
        client.stack("none")
    assert caught.value.code.name == "NOT_FOUND" and "none" in caught.value.message


def test_plan_and_update(client):
    plan = client.plan(**CONFIG)
    stack = client.create_stack("t", **CONFIG)
    info = stack.info()
    assert info.plan == plan and plan.total_bytes == sum(e.size_bytes for e in plan.entries)
    assert plan.bytes_of("weights") > 0 and plan.bytes_of("master_weights") == 0
    assert stack.update(hidden_dropout_ratio=0.25).config.hidden_dropout_ratio == 0.25
    assert [s.name for s in client.stacks()] == ["t"]


def test_config_from_json(tmp_path):
    (tmp_path / "c.json").write_text('{"batch_size": 2, "hidden_size": 8, "heads": 2, "dtype": "bf16"}')
    config = lamina.StackConfig.from_json_file(tmp_path / "c.json")
    assert config.dtype == "bf16" and lamina.StackConfig.from_dict(config.to_dict()) == config


def test_bfloat16_rounding():
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, np.nan, 3.3895314e38, 1e-40], np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(lamina.to_float32(lamina.from_float32(values, "bf16")), expected, equal_nan=True)


def test_large_parameters(client):
    stack = client.create_stack("t", **dict(CONFIG, hidden_size=768, heads=12, num_hidden_layers=1))
    values = stack.parameters()
    doubled = {n: p * 2 for n, p in values.items()}
    stack.set_parameters(doubled)
    assert all(np.array_equal(doubled[n], p) for n, p in stack.parameters().items())


def test_metrics_tell_what_was_done(client, daemon):
    before = daemon.metrics()
    stack = client.create_stack("t", **CONFIG)
    for _ in range(3):
        y, context = stack.forward(np.ones((2, 5, 24), np.float32), training=True)
        stack.backward(context, y)
    stack.apply_gradients(lr=0.1)
    after = daemon.metrics()

    def grew(start, *parts):
        names = [n for n in after if n.startswith(start) and all(p in n for p in parts)]
        assert names, (start, parts)
        return sum(after[n] - before.get(n, 0) for n in names)

    assert grew("lamina_steps_total", "forward_training") == 3 and grew("lamina_steps_total", "apply") == 1
    assert grew("lamina_tokens_total", "backward") == 30 and grew("lamina_samples_total", "backward") == 6
    assert grew("lamina_tensor_bytes_total", "memfd") == 12 * 2 * 5 * 24 * 4
    assert grew("grpc_server_handled_total", '"Forward"', '"OK"') == 3
    assert grew("lamina_step_duration_seconds_count", "backward", "queue") == 3
    assert grew("lamina_step_duration_seconds_count", "backward", "compute") == 3
    assert grew("lamina_flops_total", "backward") > 0
    plan = stack.info().plan
    for kind in ("weights", "gradients", "optimizer", "activations", "workspace"):
        assert after[f'lamina_device_memory_bytes{{kind="{kind}"}}'] == plan.bytes_of(kind)
    assert after["lamina_region_bytes"] > 0 and after["lamina_sessions"] >= 1
