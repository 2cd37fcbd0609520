#!/usr/bin/env python3
"""Pre-trains a BERT on masked words through laminad: gradient accumulation, LAMB, warm-up.

Each step adds the gradients of --accumulate micro-batches, in the daemon for the encoder and here for embeddings and head, and
then takes one step of LAMB (You et al., 2020) on both, with global norm clipping and a learning rate that warms up and decays
linearly. In fp16 the daemon finds the loss scale. Text: as examples/mlm.

Small enough for a CPU as it stands; on a GPU for instance
  --layers 24 --hidden 1024 --heads 16 --batch 64 --seq 128 --accumulate 4 --dtype bf16
Prints loss and speed; exits 1 if the loss did not fall below --below times the text's unigram entropy.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import environment

environment.enter("torch", "grpc", "lamina")

import lamina  # noqa: E402
import lamina.torch  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "mlm"))
import data  # noqa: E402
from model import MaskedLanguageModel  # noqa: E402

BETAS, EPSILON, DECAY = (0.9, 0.999), 1e-6, 0.01


class Lamb(torch.optim.Optimizer):
    """LAMB for what this process holds, by the same rule as the daemon's: AdamW's direction with bias correction, scaled for
    each matrix by ||w|| / ||update||; biases and norms neither decay nor are scaled."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
                state["step"] += 1
                first, second, n = state["first"], state["second"], state["step"]
                first.lerp_(p.grad, 1 - BETAS[0])
                second.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
                update = first / (1 - BETAS[0] ** n) / ((second / (1 - BETAS[1] ** n)).sqrt() + EPSILON)
                trust = 1.0
                if p.dim() > 1:
                    update += DECAY * p
                    weight_norm, update_norm = float(p.norm()), float(update.norm())
                    trust = weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0
                p.sub_(update, alpha=group["lr"] * trust)


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", help="a running daemon, unix:PATH or HOST:PORT (default: one of its own)")
    p.add_argument("--device", default="auto", help="for a daemon of its own")
    p.add_argument("--text", help="a plain-text file instead of the King James Bible")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--accumulate", type=int, default=4, help="micro-batches a step")
    p.add_argument("--warm-up", type=float, default=0.1, help="share of the steps")
    p.add_argument("--batch", type=int, default=16, help="sequences of a micro-batch")
    p.add_argument("--seq", type=int, default=64)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--vocabulary", type=int, default=3000)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    p.add_argument("--lr", type=float, default=2e-2, help="peak learning rate")
    p.add_argument("--max-grad-norm", type=float, default=1.0)
    p.add_argument("--below", type=float, default=0.98, help="of the unigram entropy: what the last losses must be below")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--report", type=pathlib.Path, help="write losses and speed there, as JSON")
    return p.parse_args()


def learning_rate(step, args):
    """Linear warm-up, then linear decay to nothing."""
    warm = max(1, round(args.warm_up * args.steps))
    return args.lr * min((step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))


def pretrain(client, args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    corpus = data.Corpus(data.load_text(args.text), args.seq, args.vocabulary)
    # Mixed precision as the daemon has it: fp16 there needs a loss scale, which it finds.
    scaling = {"dynamic_loss_scale": True} if args.dtype == "fp16" else {}
    name = "pretrain"
    if any(s.name == name for s in client.stacks()):
        client.delete_stack(name)
    stack = client.create_stack(
        name, batch_size=args.batch, max_seq_length=args.seq, hidden_size=args.hidden, heads=args.heads,
        num_hidden_layers=args.layers, attn_dropout_ratio=args.dropout, hidden_dropout_ratio=args.dropout, seed=args.seed,
        dtype=args.dtype, **scaling)
    model = MaskedLanguageModel(lamina.torch.RemoteStack(stack), len(corpus.words), args.seq, args.hidden)
    local = model.local_parameters()
    optimizer = Lamb(local, args.lr)
    generator = np.random.default_rng(args.seed)
    feed = data.batches(corpus.train, args.batch, generator)
    info = client.info()
    print(f"laminad {info.version} on {info.device_name}; {stack.info().parameter_count:,} weights there, "
          f"{sum(p.numel() for p in local):,} here; unigram entropy {corpus.unigram_entropy:.3f}")

    losses, skipped = [], 0
    began = time.monotonic()
    for step in range(args.steps):
        optimizer.zero_grad()
        scale = stack.loss_scale
        total = 0.0
        for _ in range(args.accumulate):
            ids, labels = data.mask_tokens(next(feed), generator, len(corpus.words))
            masked = torch.from_numpy(labels != data.NOT_MASKED)
            loss = F.cross_entropy(model(torch.from_numpy(ids), masked), torch.from_numpy(labels)[masked]) / args.accumulate
            (loss * scale).backward()
            total += loss.item()
        rate = learning_rate(step, args)
        applied = stack.apply_gradients(
            lr=rate, optimizer="lamb", beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON, weight_decay=DECAY,
            max_grad_norm=args.max_grad_norm, loss_scale=scale if not scaling else None, zero_gradients=True).applied
        if applied:  # where the daemon found an overflow, nothing of this step counts
            for p in local:
                p.grad /= scale
            torch.nn.utils.clip_grad_norm_(local, args.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        skipped += not applied
        losses.append(total)
        if (step + 1) % max(1, args.steps // 10) == 0:
            print(f"step {step + 1:5d}  loss {np.mean(losses[-max(1, args.steps // 10):]):.4f}  rate {rate:.2e}", flush=True)
    seconds = time.monotonic() - began
    client.delete_stack(name)

    last = float(np.mean(losses[-max(1, args.steps // 10):]))
    sequences = args.steps * args.accumulate * args.batch / seconds
    print(f"{args.steps} steps of {args.accumulate} x {args.batch} sequences in {seconds:.0f} s: {sequences:.1f} sequences/s, "
          f"{sequences * args.seq:,.0f} tokens/s; {skipped} steps skipped")
    print(f"loss of masked words {losses[0]:.3f} -> {last:.3f}, unigram entropy {corpus.unigram_entropy:.3f}")
    if args.report:
        args.report.write_text(json.dumps({"losses": losses, "unigram_entropy": corpus.unigram_entropy, "skipped": skipped,
                                           "seconds": seconds, "sequences_per_second": sequences,
                                           "device": info.device_name, "dtype": args.dtype}))
    return 0 if last < args.below * corpus.unigram_entropy else 1


def main():
    args = parse_arguments()
    if args.target:
        with lamina.connect(args.target) as client:
            return pretrain(client, args)
    with environment.OwnDaemon(args.device) as own, lamina.connect(own.target) as client:
        return pretrain(client, args)


if __name__ == "__main__":
    sys.exit(main())
