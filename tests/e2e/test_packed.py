"""Packed batches through the clients and the wire: against each sequence by itself, over every transport, refused."""

import lamina
import lamina.torch
import numpy as np
import pytest
import torch
from lamina import packing
from lamina.torch import RemoteStack
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import tensor_pb2 as tpb
from raw import refused

CONFIG = dict(batch_size=3, max_seq_length=13, hidden_size=24, heads=3, num_hidden_layers=2, seed=5)
LENGTHS = [4, 13, 1, 7, 9]  # more sequences than batch_size, 34 of 39 tokens
# fp32 sums in another order, over two layers: some units of 6e-8.
TOLERANCE = 2e-6


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def flat(gradients):
    return np.concatenate([g.ravel() for g in gradients.values()])


def sequences(generator):
    return [generator.standard_normal((1, n, 24)).astype(np.float32) for n in LENGTHS]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pre_layer_norm", [True, False])
def test_a_packed_step_is_its_sequences_steps(client, causal, pre_layer_norm):
    stack = client.create_stack("t", **CONFIG, causal=causal, pre_layer_norm=pre_layer_norm)
    generator = np.random.default_rng(1)
    x, dy = sequences(generator), sequences(generator)
    ys, dxs = [], []
    for one, its in zip(x, dy):
        y, context = stack.forward(one)
        ys.append(y.copy())
        dxs.append(stack.backward(context, its).copy())
    expected = flat(stack.gradients())
    stack.zero_gradients()
    join = lambda parts: np.concatenate([p[0] for p in parts])
    offsets = packing.offsets_of(LENGTHS)
    y, context = stack.forward(join(x), cumulative_lengths=offsets)
    assert y.shape == (34, 24) and context.shape == (34, 24)
    # A GPU's fused kernel has no fp32; the CPU's one kernel counts as fused.
    assert stack.last_attention_path == ("fused" if client.info().backend == "cpu" else "plain")
    dx = stack.backward(context, join(dy))
    assert dx.shape == (34, 24)
    assert error(y, join(ys)) < TOLERANCE and error(dx, join(dxs)) < TOLERANCE
    assert error(flat(stack.gradients()), expected) < TOLERANCE
    half, _ = stack.forward(join(x), cumulative_lengths=offsets.tolist(), training=False, layers=(0, 1))
    rest, _ = stack.forward(half, cumulative_lengths=offsets.astype(np.int64), training=False, layers=(1, 2))
    assert error(rest, join(ys)) < TOLERANCE


def test_the_module_packed_is_the_module_padded(client):
    """Autograd through pack, the daemon and unpack gives what lengths on the padded batch give."""
    stack = client.create_stack("t", **dict(CONFIG, batch_size=5))
    module = RemoteStack(stack)
    padded = torch.randn(5, 13, 24)
    weight = torch.randn(5, 13, 24) * (torch.arange(13)[None, :] < torch.tensor(LENGTHS)[:, None])[:, :, None]
    results = []
    for packed in (False, True):
        x = padded.clone().requires_grad_()
        if packed:
            tokens, offsets = lamina.torch.pack(x, LENGTHS)
            assert tokens.shape == (34, 24)
            y = lamina.torch.unpack(module(tokens, cumulative_lengths=offsets), offsets, 13)
        else:
            y = module(x, lengths=torch.tensor(LENGTHS))
        (y * weight).sum().backward()
        results.append((x.grad.numpy(), flat(stack.gradients()), (y * weight).detach().numpy()))
        stack.zero_gradients()
    for padded_result, packed_result in zip(*results):
        assert error(packed_result, padded_result) < TOLERANCE
    module.eval()
    evaluated = module(tokens, cumulative_lengths=offsets)
    assert not evaluated.requires_grad
    assert error(evaluated, packing.pack(y.detach().numpy(), LENGTHS)[0]) < TOLERANCE
    with pytest.raises(ValueError):
        module(tokens, cumulative_lengths=offsets, lengths=torch.tensor(LENGTHS))


def test_transports_give_the_same_bits(daemon):
    results = []
    for target, transport in ((daemon.target, "memfd"), (daemon.tcp, "inline")):
        with lamina.connect(target, transport=transport) as client:
            stack = client.create_stack("bits", **CONFIG, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
            x = np.random.default_rng(0).standard_normal((34, 24)).astype(np.float32)
            y, context = stack.forward(x, cumulative_lengths=packing.offsets_of(LENGTHS))
            results.append([y.copy(), stack.backward(context, y).copy(), *stack.gradients().values()])
            client.delete_stack("bits")
    assert all(np.array_equal(a, b) for a, b in zip(*results))


def test_the_client_checks_what_it_can(client):
    stack = client.create_stack("t", **CONFIG)
    x = np.zeros((34, 24), np.float32)
    with pytest.raises(ValueError, match="one of"):
        stack.forward(x, lengths=[34], cumulative_lengths=[0, 34])
    with pytest.raises(TypeError, match="cumulative_lengths"):
        stack.forward(x, cumulative_lengths=[0.0, 34.0])
    with pytest.raises(lamina.InvalidArgument, match=r"cumulative_lengths\[1\]: is 34; it must be in 1..13"):
        stack.forward(x, cumulative_lengths=[0, 34])
    stack.forward(x[:13], cumulative_lengths=[0, 13])  # and the sequence is still in step


@pytest.mark.parametrize("lengths, words", [
    ([0, 8, 5, 12], ["cumulative_lengths[2]: is 5", "9..16"]),
    ([0, 8, 8, 12], ["cumulative_lengths[2]: is 8", "9..16"]),
    ([0, 9, 12], ["cumulative_lengths[1]: is 9", "1..8"]),
    ([0, 8, 11], ["cumulative_lengths[2]: is 11", "12"]),
    ([0, 8, 13], ["cumulative_lengths[2]: is 13", "12"]),
    ([1, 8, 12], ["cumulative_lengths[0]: is 1", "0"]),
    ([0, 2**31 - 1, -2**31, 12], ["cumulative_lengths[1]", "1..8"]),
    ([0], ["cumulative_lengths.shape"]), ([0] * 14, ["cumulative_lengths.shape", "1..12"])])
def test_refused_over_the_wire(raw, lengths, words):
    raw.stack()
    before = raw.describe()
    packed = raw.tensor(np.ones((12, 16), np.float32))
    for training in (True, False):
        with refused("INVALID_ARGUMENT", *words):
            raw.forward(training=training, input=packed,
                        cumulative_lengths=raw.tensor(np.array(lengths, np.int32), tpb.DATA_TYPE_INT32))
    assert raw.describe() == before
    answer = raw.forward(input=packed,
                         cumulative_lengths=raw.tensor(np.array([0, 8, 12], np.int32), tpb.DATA_TYPE_INT32))
    assert list(answer.output.shape) == [12, 16] and answer.attention_path != lpb.ATTENTION_PATH_UNSPECIFIED
    with refused("INVALID_ARGUMENT", "output_grad.shape", "[12, 16]"):
        raw.backward(answer.context_id, output_grad=raw.tensor(np.ones((2, 6, 16), np.float32)))
    raw.backward(answer.context_id, output_grad=packed)


@pytest.mark.parametrize("shape", [(1, 12, 16), (17, 16), (12, 8), (12,)])
def test_inputs_that_are_not_packed(raw, shape):
    raw.stack()
    with refused("INVALID_ARGUMENT", "input.shape", "cumulative_lengths", "[T, 16]"):
        raw.forward(input=raw.tensor(np.ones(shape, np.float32)),
                    cumulative_lengths=raw.tensor(np.array([0, 8, 12], np.int32), tpb.DATA_TYPE_INT32))
    with refused("INVALID_ARGUMENT", "cumulative_lengths.dtype"):
        raw.forward(input=raw.tensor(np.ones((12, 16), np.float32)),
                    cumulative_lengths=raw.tensor(np.zeros(3, np.float32)))


def test_lengths_in_shared_memory_are_read_once(raw):
    """What the client writes there afterwards changes nothing: Backward goes by the Forward's copy."""
    raw.stack()
    region = raw.region()
    memory = np.frombuffer(raw.mapped(region), np.int32)
    x = raw.tensor(np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32))
    results = []
    for spoil in (False, True):
        memory[:3] = [0, 8, 12]
        lengths = raw.slice(region, size=12, shape=(3,), dtype=tpb.DATA_TYPE_INT32)
        context = raw.forward(input=x, cumulative_lengths=lengths).context_id
        if spoil:
            memory[:3] = [7, -5, 2**31 - 1]
        answer = raw.backward(context, output_grad=x, input_grad=tpb.TensorTarget(inline=tpb.InlineTarget()))
        results.append(answer.input_grad.inline_data)
    assert results[0] == results[1]


def test_metrics_count_sequences_and_tokens(client, daemon):
    before = daemon.metrics()
    stack = client.create_stack("t", **CONFIG)
    x = np.ones((34, 24), np.float32)
    _, context = stack.forward(x, cumulative_lengths=packing.offsets_of(LENGTHS))
    stack.backward(context, x)
    after = daemon.metrics()

    def grew(name, direction, more=""):
        series = f'{name}{{direction="{direction}"{more}}}'
        return after[series] - before[series]

    flops = 2 * (2 * 34 * (4 * 24**2 + 2 * 24 * 96) + 4 * 24 * sum(n * n for n in LENGTHS))
    for direction, times in (("forward_training", 1), ("backward", 2)):
        assert grew("lamina_samples_total", direction) == 5 and grew("lamina_tokens_total", direction, ',kind="real"') == 34
        assert grew("lamina_tokens_total", direction, ',kind="padding"') == 0
        assert grew("lamina_flops_total", direction) == pytest.approx(times * flops)


def test_packing_helpers_name_the_index():
    x = np.zeros((2, 3, 4))
    for lengths, words in (([3, 0], r"lengths\[1\]: 0"), ([4, 1], r"lengths\[0\]: 4 must be in 1\.\.3"),
                           ([3], "batch of 2")):
        with pytest.raises(ValueError, match=words):
            packing.pack(x, lengths)
    for offsets, words in (([0, 3, 2, 4], r"lengths\[1\]: -1"), ([0, 3], r"cumulative_lengths\[1\]: 3 must be 4"),
                           ([1, 4], "must be 0")):
        with pytest.raises(ValueError, match=words):
            packing.unpack(np.zeros((4, 4)), offsets)
    with pytest.raises(ValueError, match=r"lengths\[0\]: 3 must be in 1\.\.2"):
        packing.unpack(np.zeros((4, 4)), [0, 3, 4], seq=2)
