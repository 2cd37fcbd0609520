"""On a GPU machine: the daemon on the card against PyTorch on the same card and against the daemon on the CPU.

FlashAttention's rule: our error against fp64 is at most twice (gradients: three times) what PyTorch shows in the
same dtype. Needs laminad (env LAMINAD) and torch with CUDA; skips visibly without a GPU.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent / "e2e")]

import encoder  # noqa: E402
import lamina  # noqa: E402
from daemon import Daemon  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and PyTorch with CUDA")

LAYERS, HIDDEN, HEADS, BATCH, SEQ = 2, 1024, 16, 8, 128


@pytest.fixture(scope="module")
def client():
    with Daemon(device="cuda:0") as daemon, lamina.connect(daemon.target) as c:
        assert c.info().backend == "cuda"
        yield c


@pytest.mark.parametrize("pre_layer_norm", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_error_within_flash_attentions_rule(client, dtype, pre_layer_norm):
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    torch.backends.cuda.matmul.allow_tf32 = False
    name = f"accuracy-{dtype}-{pre_layer_norm}"
    stack = client.create_stack(name, batch_size=BATCH, max_seq_length=SEQ, hidden_size=HIDDEN, heads=HEADS,
                                num_hidden_layers=LAYERS, seed=3, dtype=dtype, pre_layer_norm=pre_layer_norm)
    try:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(BATCH, SEQ, HIDDEN, generator=generator).to(torch_dtype)
        dy = torch.randn(BATCH, SEQ, HIDDEN, generator=generator).to(torch_dtype)
        lengths = np.random.default_rng(6).integers(SEQ // 2, SEQ + 1, BATCH).astype(np.int32)
        mask = torch.where(torch.arange(SEQ)[None, :] < torch.from_numpy(lengths.astype(np.int64))[:, None], 0.0, -1e9)

        from lamina.torch import RemoteStack

        remote = RemoteStack(stack)
        leaf = x.clone().requires_grad_()
        y = remote(leaf, lengths=torch.from_numpy(lengths))
        y.backward(dy)
        gradients = stack.gradients()
        # What both compute with: the weights as the stack rounds them.
        weights = {k: torch.from_numpy(v).to(torch_dtype).double() for k, v in stack.parameters().items()}

        how = dict(heads=HEADS, pre_layer_norm=pre_layer_norm, mask=mask[:, None, None, :].cuda())
        exact = encoder.run(x.double(), dy.double(), weights, LAYERS, torch.float64, "cuda", **how)
        peer = encoder.run(x.double(), dy.double(), weights, LAYERS, torch_dtype, "cuda", **how)

        rows = [("output", y.detach(), exact[0], peer[0], 2.0), ("input gradient", leaf.grad, exact[1], peer[1], 3.0)]
        rows += [(k, gradients[k], exact[2][k], peer[2][k], 3.0) for k in gradients]
        wrong = []
        worst = {}
        for what, ours, reference, theirs, factor in rows:
            error, allowed = encoder.relative_error(ours, reference), encoder.relative_error(theirs, reference)
            kind = what.split(".")[-1]
            worst[kind] = max(worst.get(kind, (0, 0, 0)), (error / allowed, error, allowed))
            # fp32: both are at rounding level, where a factor says nothing below a few 1e-6.
            if not error <= max(factor * allowed, 3e-6 if dtype == "fp32" else 0.0):
                wrong.append(f"{what}: {error:.2e} against PyTorch's {allowed:.2e}")
        print(f"\n{dtype} {'pre' if pre_layer_norm else 'post'}: " +
              ", ".join(f"{k} {v[1]:.1e}/{v[2]:.1e}" for k, v in worst.items()))
        assert not wrong, "\n".join(wrong)
    finally:
        client.delete_stack(name)


def test_first_losses_of_the_demo_agree_with_the_cpu(tmp_path):
    losses = {}
    text = os.environ.get("LAMINA_TEXT")
    for device in ("cpu", "cuda:0"):
        with Daemon(device=device) as daemon:
            out = tmp_path / f"{device}.json"
            command = [sys.executable, str(ROOT / "examples/mlm/train.py"), "--target", daemon.target, "--steps", "20",
                       "--dropout", "0.1", "--losses-only", str(out)] + (["--text", text] if text else [])
            subprocess.run(command, check=True, timeout=300)
            losses[device] = np.array(json.loads(out.read_text())["losses"])
    difference = np.abs(losses["cpu"] / losses["cuda:0"] - 1)
    print(f"\nfirst 20 losses, CPU against GPU: largest relative difference {difference.max():.2e}")
    assert len(difference) == 20 and difference.max() <= 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_are_bit_identical(client, dtype):
    results = []
    for _ in range(2):
        stack = client.create_stack("repeat", batch_size=4, max_seq_length=77, hidden_size=256, heads=4,
                                    num_hidden_layers=3, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1, seed=9,
                                    dtype=dtype)
        generator = np.random.default_rng(1)
        bits = generator.standard_normal((4, 77, 256)).astype(np.float32)
        x = torch.from_numpy(bits).to(torch.bfloat16 if dtype == "bf16" else torch.float32).requires_grad_()
        from lamina.torch import RemoteStack

        y = RemoteStack(stack)(x)
        y.backward(torch.ones_like(y))
        gradients = stack.gradients()
        results.append([y.detach().float().numpy(), x.grad.float().numpy(), *[gradients[k] for k in sorted(gradients)]])
        client.delete_stack("repeat")
    for first, second in zip(*results):
        assert np.array_equal(first, second)
