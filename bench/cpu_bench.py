#!/usr/bin/env python3
"""Forward+backward of a 4-layer H 256, S 128, B 8 fp32 stack with dropout 0.1: laminad on the CPU, driven
through RPC with regions, against PyTorch on the same cores; and what the RPC costs.

The sides alternate, a step each, so that a machine whose speed drifts is fair to both. PyTorch runs with the
thread count at which it is fastest here. Times are medians in milliseconds.

What the RPC costs is the round trip of an evaluation Forward (B 1, S 8) by regions over the Unix socket without the
compute time that its answer tells: rpc_forward_overhead_ms with a bare client in C++ (round_trip), and
rpc_forward_overhead_python_ms through Python's client, which adds what its interpreter takes. rpc_empty_ms is gRPC's own
health Check from the C++ client, between the Forwards.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

# Neither side's OpenMP threads may spin while the other side runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests/e2e"), str(ROOT / "client/python")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import lamina  # noqa: E402
from daemon import Daemon  # noqa: E402
from in_process import find_binary, measure_round_trips  # noqa: E402

LAYERS, HIDDEN, HEADS, SEQ, BATCH, DROPOUT = 4, 256, 8, 128, 8, 0.1


class PeerLayer(nn.Module):
    """The same Pre-LN layer, with dropout in the same three places."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, eps=1e-12), nn.LayerNorm(HIDDEN, eps=1e-12)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def attention(self, x):
        q, k, v = self.qkv(x).view(BATCH, SEQ, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
        if hasattr(F, "scaled_dot_product_attention"):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT)
        else:
            p = torch.softmax(q @ k.transpose(-1, -2) * (HIDDEN // HEADS) ** -0.5, -1)
            y = F.dropout(p, DROPOUT) @ v
        return self.out(y.transpose(1, 2).reshape(BATCH, SEQ, HIDDEN))

    def forward(self, x):
        x = x + F.dropout(self.attention(self.norm1(x)), DROPOUT)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), DROPOUT)


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_ms(samples):
    return statistics.median(samples) * 1e3


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    p.add_argument("--steps", type=int, default=60, help="counted steps of each side")
    args = p.parse_args()

    torch.manual_seed(0)
    peer = nn.Sequential(*[PeerLayer() for _ in range(LAYERS)])
    x = torch.randn(BATCH, SEQ, HIDDEN)
    leaf = x.clone().requires_grad_()
    dy = torch.randn(BATCH, SEQ, HIDDEN)

    def peer_step():
        peer(leaf).backward(dy)  # gradients accumulate, as on our side

    cores = len(os.sched_getaffinity(0))
    tried = {}
    for threads in sorted({1, max(1, cores // 2), cores}):
        torch.set_num_threads(threads)
        for _ in range(3):
            peer_step()
        tried[threads] = median_ms([seconds(peer_step) for _ in range(10)])
    threads = min(tried, key=tried.get)
    torch.set_num_threads(threads)

    with Daemon(device="cpu") as daemon, lamina.connect(daemon.target) as client:
        stack = client.create_stack("bench", batch_size=BATCH, max_seq_length=SEQ, hidden_size=HIDDEN, heads=HEADS,
                                    num_hidden_layers=LAYERS, attn_dropout_ratio=DROPOUT,
                                    hidden_dropout_ratio=DROPOUT, seed=1, dtype="fp32")
        ours_x, ours_dy = client.empty(x.shape, "fp32"), client.empty(x.shape, "fp32")
        ours_x[:], ours_dy[:] = x.numpy(), dy.numpy()

        def our_step():
            _, context = stack.forward(ours_x, training=True)
            stack.backward(context, ours_dy)

        for _ in range(5):
            our_step()
            peer_step()
        ours, theirs = [], []
        for _ in range(args.steps):
            ours.append(seconds(our_step))
            theirs.append(seconds(peer_step))

        from_python = []
        for _ in range(200):
            began = time.perf_counter()
            stack.forward(ours_x[:1, :8], training=False)
            from_python.append(time.perf_counter() - began - stack.last_timing.compute_seconds)
        # Of a Forward like Python's.
        round_trips = measure_round_trips(find_binary("round_trip", "cpu"), daemon.target, "--calls", 500,
                                          "--shape", f"1,8,{HIDDEN},{HEADS},{4 * HIDDEN},{LAYERS}")
        transport = str(client.transport)

    result = {
        "ours_ms": median_ms(ours), "torch_ms": median_ms(theirs), "ratio": median_ms(ours) / median_ms(theirs),
        "rpc_empty_ms": round_trips["rpc_empty"]["median"] / 1e3,
        "rpc_forward_overhead_ms": round_trips["region_roundtrip"]["median"] / 1e3,
        "rpc_forward_overhead_python_ms": median_ms(from_python),
        "torch": torch.__version__, "torch_threads": threads, "torch_ms_by_threads": tried, "cores": cores,
        "transport": transport, "steps": args.steps, "date": time.strftime("%Y-%m-%d"),
        "shape": {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "seq": SEQ, "batch": BATCH, "dropout": DROPOUT},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"forward+backward, {LAYERS} layers, H {HIDDEN}, S {SEQ}, B {BATCH}, fp32, dropout {DROPOUT}\n"
          f"  laminad by {transport}        {result['ours_ms']:8.2f} ms\n"
          f"  PyTorch {torch.__version__}, {threads} threads {result['torch_ms']:8.2f} ms\n"
          f"  ratio                    {result['ratio']:8.2f}\n"
          f"empty call               {result['rpc_empty_ms']:8.3f} ms\n"
          f"Forward beyond its compute {result['rpc_forward_overhead_ms']:6.3f} ms, "
          f"from Python {result['rpc_forward_overhead_python_ms']:.3f} ms")


if __name__ == "__main__":
    main()
