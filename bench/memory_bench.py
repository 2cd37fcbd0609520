#!/usr/bin/env python3
"""What the memory flags cost and what they let in: a training step's time under each flag, and the largest micro-batches
that `lamina plan --memory` promises for this device, each run forward and backward, and one sample more, which must be
refused.

Starts a laminad of its own. Figures are milliseconds of forward+backward on the device (median), bytes of the plan.
Exits 1 if a promised micro-batch did not run or one too many was not refused with RESOURCE_EXHAUSTED (which is not
tried with --memory: then there is more than that).

Needs the release build (scripts/build release); on a GPU machine, `gpu-check --bench` runs it from the bundle.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "client/python")]

import numpy as np  # noqa: E402

import lamina  # noqa: E402
from daemon import Daemon  # noqa: E402

CLI = os.environ.get("LAMINA_CLI", str(ROOT / "build/release/bin/lamina"))
FLAGS = ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing"]
# What is timed against the plain step: each flag alone, DeepSpeed's three, all four, and unordered sums.
SETS = [(), ("gelu_checkpoint",), ("normalize_invertible",), ("attn_dropout_checkpoint",), tuple(FLAGS[:3]),
        ("activation_checkpointing",), tuple(FLAGS), ("stochastic_mode",)]


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    p.add_argument("--device", default="cpu", help="cpu or cuda:N")
    p.add_argument("--shapes", default="64,128;16,512", help="B,S;... of the flags' timing; each S also gets its largest micro-batch")
    p.add_argument("--layers", type=int, default=24)
    p.add_argument("--hidden", type=int, default=1024)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--rounds", type=int, default=10, help="how often each set of flags is timed, in turn")
    p.add_argument("--memory", type=int, help="bytes for the largest micro-batches' stacks (default: what is free on the device)")
    return p.parse_args()


def create(client, batch, seq, args, flags=()):
    """A stack with room for one context of B x S."""
    return client.create_stack(
        "bench", batch_size=batch, max_seq_length=seq, hidden_size=args.hidden, heads=args.heads, dtype=args.dtype,
        num_hidden_layers=args.layers, attn_dropout_ratio=args.dropout, hidden_dropout_ratio=args.dropout, seed=1,
        max_contexts=1, **{flag: True for flag in flags})


def batch_of(client, batch, seq, args):
    """x and dy in shared memory, with the same values at each call."""
    x, dy = (client.empty((batch, seq, args.hidden), args.dtype) for _ in range(2))
    row = np.random.default_rng(0).standard_normal((seq, args.hidden)).astype(np.float32)
    x[:], dy[:] = lamina.dtypes.as_stack_type(row, args.dtype), lamina.dtypes.as_stack_type(row * 1e-3, args.dtype)
    return x, dy


def step(stack, x, dy, y, dx):
    """Forward and backward; seconds on the device."""
    _, context = stack.forward(x, training=True, out=y)
    seconds = stack.last_timing.compute_seconds
    stack.backward(context, dy, out=dx)
    return seconds + stack.last_timing.compute_seconds


def time_flags(client, batch, seq, args):
    """A row a set of flags; the sets take turns on one live stack, so that a drifting clock is fair to all."""
    stack = create(client, batch, seq, args)
    x, dy = batch_of(client, batch, seq, args)
    y, dx = client.empty(x.shape, args.dtype), client.empty(x.shape, args.dtype)
    samples = {flags: [] for flags in SETS}
    plans = {}
    for _ in range(args.rounds):
        for flags in SETS:
            info = stack.update(**{f: f in flags for f in [*FLAGS, "stochastic_mode"]})
            plans[flags] = info.plan
            step(stack, x, dy, y, dx)  # the first at new settings
            samples[flags] += [step(stack, x, dy, y, dx) for _ in range(2)]
    client.delete_stack(stack.name)
    plain = statistics.median(samples[()])
    return [{"batch": batch, "seq": seq, "flags": list(flags), "ms": statistics.median(samples[flags]) * 1e3,
             "min_ms": min(samples[flags]) * 1e3, "max_ms": max(samples[flags]) * 1e3,
             "cost": statistics.median(samples[flags]) / plain - 1,
             "activation_bytes": plans[flags].bytes_of("activations"), "workspace_bytes": plans[flags].bytes_of("workspace")}
            for flags in SETS]


def capacity(client, args, seqs):
    """The rows that `lamina plan --memory` prints for what is free now: a device's first calls load code, which takes some."""
    info = client.info()
    memory, kind = args.memory or info.device_free_bytes, info.backend
    command = [CLI, "plan", "--memory", str(memory), "--device", kind, "--seq", ",".join(map(str, seqs)), "--output", "json",
               "--hidden-size", str(args.hidden), "--heads", str(args.heads), "--num-hidden-layers", str(args.layers),
               "--dtype", args.dtype]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["rows"]
    return [{**row, "memory_bytes": memory} for row in rows]


def run_largest(client, row, args):
    """Runs forward and backward at a row's largest micro-batch; where that takes no second, again, and times that."""
    batch = row["micro_batch_to"]
    stack = create(client, batch, row["seq"], args, row["flags"])
    as_planned = stack.info().plan.total_bytes == row["bytes"]
    x, dy = batch_of(client, batch, row["seq"], args)
    seconds = step(stack, x, dy, dy, x)  # results take the inputs' places: host memory is scarce at these sizes
    if seconds < 1:
        seconds = step(stack, x, dy, dy, x)
    client.delete_stack(stack.name)
    del x, dy
    client.trim()
    return {**row, "ms": seconds * 1e3, "samples_per_second": batch / seconds, "bytes_as_planned": as_planned}


def one_more(client, row, args):
    """What a stack for one sample more than the row's largest micro-batch is answered."""
    batch = row["micro_batch_to"] + 1
    result = {"seq": row["seq"], "micro_batch": batch, "refused": False, "message": "it was created"}
    try:
        client.delete_stack(create(client, batch, row["seq"], args, row["flags"]).name)
    except lamina.ResourceExhausted as error:
        result.update(refused=True, message=str(error))
    return result


def main():
    args = parse_arguments()
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes.split(";")]
    flags, largest, refusals = [], [], []
    caps = ["--region-cap-bytes", str(48 << 30), "--total-region-cap-bytes", str(48 << 30)]
    with Daemon(*caps, device=args.device) as daemon, lamina.connect(daemon.target) as client:
        info = client.info()
        print(f"{info.device_name}, commit {info.build_commit}, {time.strftime('%Y-%m-%d')}\n"
              f"{args.layers} layers, H {args.hidden}, A {args.heads}, {args.dtype}, dropout {args.dropout}\n\n"
              f"    B     S   fwd+bwd ms     cost   activations     workspace  flags")
        for batch, seq in shapes:
            for row in time_flags(client, batch, seq, args):
                flags.append(row)
                print(f"{batch:5d} {seq:5d} {row['ms']:12.2f} {row['cost']:+8.1%} {row['activation_bytes']:13,d} "
                      f"{row['workspace_bytes']:13,d}  {', '.join(row['flags']) or 'none'}", flush=True)
        first = capacity(client, args, [seq for _, seq in shapes])
        print(f"\nthe largest micro-batches in {first[0]['memory_bytes']:,d} bytes\n"
              f"    S       B          bytes   fwd+bwd ms  samples/s  one more  flags")
        for wanted in first:
            row = next(r for r in capacity(client, args, [wanted["seq"]]) if r["flags"] == wanted["flags"])
            result = run_largest(client, row, args)
            largest.append(result)
            refused = "-"
            if not args.memory:
                refusals.append(one_more(client, row, args))
                refused = "refused" if refusals[-1]["refused"] else "CREATED"
            print(f"{row['seq']:5d} {row['micro_batch_to']:7d} {row['bytes']:14,d} {result['ms']:12.1f} "
                  f"{result['samples_per_second']:10.1f}  {refused:>8s}  {', '.join(row['flags']) or 'none'}", flush=True)
        if refusals:
            print(f"S {refusals[-1]['seq']}, B {refusals[-1]['micro_batch']}: {refusals[-1]['message']}")

    good = all(r["bytes_as_planned"] for r in largest) and all(r["refused"] for r in refusals)
    if args.json:
        args.json.write_text(json.dumps({
            "device": info.device_name, "commit": info.build_commit, "date": time.strftime("%Y-%m-%d"), "layers": args.layers,
            "hidden": args.hidden, "heads": args.heads, "dtype": args.dtype, "dropout": args.dropout, "flags": flags,
            "largest": largest, "refused": refusals}, indent=2) + "\n")
    print("what the plan promises holds" if good else "FAILED: a promise of the plan does not hold")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
