"""The drop-in for DeepSpeed's layer at the shapes of its unit tests, with tolerances ten times tighter; what it does
besides computing is in test_deepspeed_layer.py.

Tolerances. DeepSpeed allows 3e-2 in each output and, in each gradient, 5 to 20 % of the tensor's mean magnitude; a tenth of
both is the rule here, for fp32 without exception. In fp16 an output between 4 and 8 is stored to within 2e-3, twice a layer, so a
tenth of 3e-2 lies below what the format can hold. There FlashAttention's rule says what is allowed above it: an error
of twice (gradients: three times) what PyTorch's own formula shows when each of its results is rounded to fp16; and the
root mean square error is to be a tenth of DeepSpeed's bound all the same.
"""

import math

import pytest
import torch
from conftest import ON_GPU
from torch.nn import functional as F

import encoder
from layers import config_of, layers_of, run

FORWARD_TOLERANCE = 3e-2 / 10
DEVICE = "cuda" if ON_GPU and torch.cuda.is_available() else "cpu"
# What two cores do in seconds.
CPU_TOKENS, CPU_PARAMETERS, CPU_SCORES = 512, 15_000_000, 1 << 26

torch.backends.cuda.matmul.allow_tf32 = False


class _Half(torch.autograd.Function):
    """Rounds to fp16 what passes, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, dy):
        return dy.half().float()


def layer_in_half(x, p, heads, pre_layer_norm, mask, eps=1e-12):
    """encoder.layer with each operation's result rounded to fp16, as PyTorch computes it on a GPU: its CPU has no fp16."""
    r = _Half.apply
    batch, seq, hidden = x.shape
    norm = lambda v, name: r(F.layer_norm(v, (hidden,), p[f"{name}w"], p[f"{name}b"], eps))

    def attention(n):
        q, k, v = r(F.linear(n, p["attn_qkvw"], p["attn_qkvb"])).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = r(r(r(q @ k.transpose(-1, -2)) / math.sqrt(hidden // heads)) + mask)
        context = r(r(torch.softmax(scores, -1)) @ v)
        return r(F.linear(context.transpose(1, 2).reshape(batch, seq, hidden), p["attn_ow"], p["attn_ob"]))

    def feed_forward(n):
        inner = r(F.gelu(r(F.linear(n, p["inter_w"], p["inter_b"])), approximate="tanh"))
        return r(F.linear(inner, p["output_w"], p["output_b"]))

    if pre_layer_norm:
        a = r(x + attention(norm(x, "norm_")))
        return r(a + feed_forward(norm(a, "attn_n")))
    a = norm(r(x + attention(x)), "attn_n")
    return norm(r(a + feed_forward(a)), "norm_")


def scaled(batch, hidden, seq, heads, layers, intermediate):
    """(batch, layers) of a case: whole on a GPU, on the CPU what it does in seconds; skips where nothing is."""
    parameters = hidden * (4 * hidden + 2 * intermediate)
    if ON_GPU:
        return batch, layers
    if parameters > 4 * CPU_PARAMETERS:
        pytest.skip(f"H {hidden}: a layer of {parameters / 1e6:.0f} M weights, on a GPU only (LAMINA_TEST_DEVICE=cuda:0)")
    batch = max(1, min(batch, CPU_TOKENS // seq))
    return batch, max(1, min(layers, CPU_PARAMETERS // parameters, CPU_SCORES // (batch * heads * seq * seq)))


def compare(batch, hidden, seq, heads, layers, pre_layer_norm, fp16, intermediate=None, configured=None, gradients=None):
    """Runs DeepSpeed's unit test of that shape; gradients: the share of a gradient's mean magnitude that it allows."""
    torch.manual_seed(123)
    config = config_of(batch_size=configured or batch, max_seq_length=None, hidden_size=hidden, heads=heads,
                       num_hidden_layers=layers, intermediate_size=intermediate or -1, pre_layer_norm=pre_layer_norm, fp16=fp16)
    assert config.intermediate_size == intermediate or config.intermediate_size == 4 * hidden
    ours = layers_of(config)
    dtype = torch.float16 if fp16 else torch.float32
    if fp16:
        ours.half()
    x, target = torch.randn(batch, seq, hidden).to(dtype), torch.randn(batch, seq, hidden).to(dtype)
    mask = torch.randn(batch, 1, 1, seq).to(dtype)
    # Pre-LN has no norm at its end: DeepSpeed's test puts one there.
    final = lambda v: F.layer_norm(v, (hidden,), eps=1e-12) if pre_layer_norm else v

    def outcome(forward, leaves, x):
        x = x.clone().requires_grad_()
        y = final(forward(x).float())
        if gradients is None:
            return {"output": y.detach().cpu()}
        ((target.to(y.device).float() - y).square().sum() / 64).backward()
        return {"output": y.detach().cpu(), "input": x.grad.float().cpu(),
                **{f"{i}.{n}": p.grad.float().cpu() for i, leaf in enumerate(leaves) for n, p in leaf.items()}}

    def reference(layer):
        leaves = [{n: p.detach().float().to(DEVICE).requires_grad_() for n, p in l.named_parameters()} for l in ours]

        def forward(v):
            for p in leaves:
                v = layer(v, p, heads, pre_layer_norm, mask=mask.float().to(DEVICE))
            return v

        return outcome(forward, leaves, x.float().to(DEVICE))

    # Without gradients nothing of training is needed: evaluation is what runs then.
    ours.train(gradients is not None)
    found = outcome(lambda v: run(ours, v, mask), [dict(l.named_parameters()) for l in ours], x)
    exact = reference(lambda *a, **k: encoder.layer(*a, gelu="tanh", **k))
    peer = reference(layer_in_half) if fp16 else {}

    wrong = []
    for name, wanted in exact.items():
        tenth = FORWARD_TOLERANCE if name == "output" else gradients / 10 * float(wanted.abs().mean())
        difference = found[name] - wanted
        allowed = tenth
        if fp16:
            allowed = max(tenth, (2 if name == "output" else 3) * float((peer[name] - wanted).abs().max()))
            if float(difference.square().mean().sqrt()) > tenth:
                wrong.append(f"{name}: root mean square {float(difference.square().mean().sqrt()):.2e} above {tenth:.2e}")
        if not float(difference.abs().max()) <= allowed:
            wrong.append(f"{name}: {float(difference.abs().max()):.2e} above {allowed:.2e}, a tenth is {tenth:.2e}")
    assert not wrong, "\n".join(wrong)


FORWARD = [
    (64, 160, 128, 2, 24, False, True), (8, 160, 128, 2, 3, True, True), (8, 160, 128, 2, 3, False, True),
    (8, 1600, 128, 2, 3, True, True), (8, 1600, 128, 25, 3, True, True), (8, 1600, 128, 25, 3, False, True),
    (8, 256, 52, 4, 3, True, True), (3, 1024, 51, 16, 3, True, False), (3, 1024, 54, 16, 3, True, True),
    (8, 1024, 381, 16, 3, True, False), (8, 1024, 384, 16, 3, True, True), (8, 1024, 119, 16, 3, True, False),
    (8, 1024, 120, 16, 3, True, True), (8, 1024, 509, 16, 3, True, False), (8, 1024, 512, 16, 3, True, True),
    (64, 1024, 56, 16, 3, False, False), (64, 1024, 53, 16, 3, False, True), (64, 1024, 24, 16, 3, False, False),
    (64, 1024, 21, 16, 3, False, True), (8, 1024, 384, 16, 3, False, False), (8, 1024, 384, 16, 3, False, True),
    (8, 1024, 512, 16, 3, False, False), (8, 1024, 511, 16, 3, False, True), (8, 1536, 128, 24, 3, False, False),
    (8, 1536, 128, 24, 3, False, True), (8, 2048, 128, 32, 3, False, False), (8, 2048, 128, 32, 3, False, True),
    (8, 2560, 128, 40, 3, False, False), (8, 2560, 128, 40, 3, False, True), (8, 128, 128, 2, 3, True, False),
    (8, 128, 128, 2, 3, True, True), (8, 4096, 128, 64, 3, True, True), (8, 8192, 128, 64, 3, False, True),
    (1, 256, 2048, 32, 3, True, True),
]


def name_of(case):
    batch, hidden, seq, heads, layers, pre, fp16 = case[:7]
    return f"B{batch}-H{hidden}-S{seq}-A{heads}-L{layers}-{'pre' if pre else 'post'}-{'fp16' if fp16 else 'fp32'}"


pytestmark = pytest.mark.usefixtures("client")


@pytest.mark.parametrize("case", FORWARD, ids=name_of)
def test_forward_shapes(case):
    batch, hidden, seq, heads, layers, pre, fp16 = case
    batch, layers = scaled(batch, hidden, seq, heads, layers, 4 * hidden)
    compare(batch, hidden, seq, heads, layers, pre, fp16)


@pytest.mark.parametrize("small, pre, fp16", [(3, True, False), (7, True, True), (3, False, False), (7, False, True)])
def test_forward_of_fewer_than_configured(small, pre, fp16):
    # Whole on a GPU; on the CPU S is shorter, so that both batches are as they were.
    compare(small, 1024, 512 if ON_GPU else 32, 16, 3 if ON_GPU else 1, pre, fp16, configured=8)


BACKWARD = [
    (64, 160, 128, 2, 24, False, True, 0.2), (64, 1600, 128, 2, 4, False, True, 0.2), (8, 1600, 128, 25, 3, True, True, 0.05),
    (8, 160, 128, 2, 3, True, True, 0.1), (8, 1600, 128, 2, 3, True, True, 0.05), (3, 1024, 119, 16, 24, True, False, 0.05),
    (3, 1024, 115, 16, 24, True, True, 0.05), (1024, 128, 10, 2, 2, False, False, 0.1),
    (3, 1024, 52, 16, 24, False, True, 0.2), (3, 128, 51, 2, 24, False, False, 0.1), (3, 128, 54, 2, 24, False, True, 0.2),
]


@pytest.mark.parametrize("case", BACKWARD, ids=name_of)
def test_backward_shapes(case):
    batch, hidden, seq, heads, layers, pre, fp16, tolerance = case
    batch, layers = scaled(batch, hidden, seq, heads, layers, hidden)
    compare(batch, hidden, seq, heads, layers, pre, fp16, intermediate=hidden, gradients=tolerance)
