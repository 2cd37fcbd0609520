#!/usr/bin/env python3
"""Trains a small BERT to fill in masked words; its encoder stack runs in laminad.

Embeddings and output head are PyTorch modules of this process; the stack's Forward, Backward and AdamW
happen in the daemon, and tensors cross through shared regions when it is on this host. Prints the held-out
loss and masked-word accuracy before and after, the speed, a few filled-in sentences, and draws the loss
curve. Exits 1 if the held-out loss did not fall clearly below the text's unigram entropy.
"""

import argparse
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from model import MaskedLanguageModel

CLEARLY = 0.90  # of the unigram entropy: what the held-out loss must be below


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", help="the daemon, unix:PATH or HOST:PORT (default: LAMINA_TARGET or the usual socket)")
    p.add_argument("--metrics", help="where the daemon's metrics are, to name at the end")
    p.add_argument("--out", default=".", type=pathlib.Path, help="folder for the curve and the report")
    p.add_argument("--text", help="a plain-text file instead of the King James Bible")
    p.add_argument("--steps", type=int, default=2500)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seq", type=int, default=32)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--vocabulary", type=int, default=3000)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    p.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--stack", default="quickstart", help="the stack's name in the daemon")
    p.add_argument("--losses-only", type=pathlib.Path, metavar="FILE",
                   help="write the training losses as JSON and stop without evaluating")
    return p.parse_args()


def learning_rate(step, steps, peak):
    """Linear warm-up over the first 4 %, then linear decay to 2 % of the peak."""
    return peak * max(0.02, min((step + 1) / (0.04 * steps), 1.0 - step / steps))


def evaluate(model, corpus, batch, seed=99):
    """(loss, accuracy) over the masked words of the held-out text; the same masks every time."""
    generator = np.random.default_rng(seed)
    model.eval()
    loss = right = count = 0
    with torch.no_grad():
        for start in range(0, min(len(corpus.held_out), 24 * batch), batch):
            ids, labels = data.mask_tokens(corpus.held_out[start : start + batch], generator, len(corpus.words))
            masked = torch.from_numpy(labels != data.NOT_MASKED)
            target = torch.from_numpy(labels)[masked]
            logits = model(torch.from_numpy(ids), masked)
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            right += (logits.argmax(1) == target).sum().item()
            count += len(target)
    model.train()
    return loss / count, right / count


def fill_in(model, corpus, count=5):
    """Held-out passages with a few words hidden and the model's guesses in their place."""
    generator = np.random.default_rng(7)
    lines = []
    model.eval()
    for row in generator.choice(len(corpus.held_out), count, replace=False):
        tokens = corpus.held_out[row : row + 1]
        ids, labels = data.mask_tokens(tokens, generator, len(corpus.words), ratio=0.12)
        hidden = labels != data.NOT_MASKED
        ids = np.where(hidden, data.MASK, tokens)
        with torch.no_grad():
            guesses = model(torch.from_numpy(ids), torch.from_numpy(hidden)).argmax(1).tolist()
        words = []
        for position in range(1, min(29, tokens.shape[1])):
            word = corpus.words[tokens[0, position]]
            if hidden[0, position]:
                guess = corpus.words[guesses[int(hidden[0, :position].sum())]]
                words.append(f"[{guess}]" if guess == word else f"[{guess}/{word}]")
            else:
                words.append(word)
        lines.append(" ".join(words))
    model.train()
    return lines


def draw(losses, entropy, held_out, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(losses, color="#c9d6ea", linewidth=0.7, label="training, each step")
    axes.plot(np.arange(len(smooth)) + window - 1, smooth, color="#2b5797", label=f"training, mean of {window}")
    axes.axhline(entropy, color="#b3541e", linestyle="--", label="unigram entropy of the held-out text")
    axes.plot([0, len(losses)], held_out, "o", color="#1e7145", label="held-out, before and after")
    axes.set(xlabel="step", ylabel="loss of masked words (nats)", title="BERT masked words, trained through laminad")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main():
    args = parse_arguments()
    import lamina
    import lamina.torch

    torch.manual_seed(args.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    corpus = data.Corpus(data.load_text(args.text), args.seq, args.vocabulary)

    with lamina.connect(args.target) as client:
        info = client.info()
        if any(s.name == args.stack for s in client.stacks()):
            client.delete_stack(args.stack)
        stack = client.create_stack(
            args.stack, batch_size=args.batch, max_seq_length=args.seq, hidden_size=args.hidden,
            heads=args.heads, num_hidden_layers=args.layers, attn_dropout_ratio=args.dropout,
            hidden_dropout_ratio=args.dropout, seed=args.seed, dtype=args.dtype)
        model = MaskedLanguageModel(lamina.torch.RemoteStack(stack), len(corpus.words), args.seq, args.hidden)
        optimizer = torch.optim.AdamW(model.local_parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        print(f"laminad {info.version} on {info.device_name}; tensors go by {client.transport}")
        print(f"text: {len(corpus.train) + len(corpus.held_out)} sequences of {args.seq}, {len(corpus.words)} words, "
              f"{corpus.unknown_share:.1%} unknown; unigram entropy {corpus.unigram_entropy:.3f} nats")

        before = (float("nan"), float("nan")) if args.losses_only else evaluate(model, corpus, args.batch)
        generator = np.random.default_rng(args.seed)
        feed = data.batches(corpus.train, args.batch, generator)
        losses = []
        began = time.monotonic()
        progress = tqdm(range(args.steps), unit="step", mininterval=1.0, disable=bool(args.losses_only))
        for step in progress:
            ids, labels = data.mask_tokens(next(feed), generator, len(corpus.words))
            masked = torch.from_numpy(labels != data.NOT_MASKED)
            loss = F.cross_entropy(model(torch.from_numpy(ids), masked), torch.from_numpy(labels)[masked])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.local_parameters(), 1.0)
            rate = learning_rate(step, args.steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            stack.apply_gradients(lr=rate, beta2=0.98, weight_decay=0.01, max_grad_norm=1.0, zero_gradients=True)
            losses.append(loss.item())
            if step % 20 == 0:
                progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        seconds = time.monotonic() - began
        tokens_per_second = args.steps * args.batch * args.seq / seconds

        args.out.mkdir(parents=True, exist_ok=True)
        if args.losses_only:
            args.losses_only.write_text(json.dumps({"device": info.device_name, "losses": losses}))
            client.delete_stack(args.stack)
            return 0

        after = evaluate(model, corpus, args.batch)
        curve = args.out / "loss.png"
        draw(losses, corpus.unigram_entropy, [before[0], after[0]], curve)
        report = {"device": info.device_name, "transport": str(client.transport), "steps": args.steps,
                  "unigram_entropy": corpus.unigram_entropy, "held_out_loss": {"before": before[0], "after": after[0]},
                  "masked_accuracy": {"before": before[1], "after": after[1]},
                  "tokens_per_second": tokens_per_second, "seconds": seconds}
        (args.out / "report.json").write_text(json.dumps(report, indent=2))

        print("\nfilled in, as [guess] where right and [guess/word] where not:")
        for line in fill_in(model, corpus):
            print("  " + line)
        print(f"\n                    before     after\n"
              f"held-out loss      {before[0]:7.3f}   {after[0]:7.3f}   (unigram entropy {corpus.unigram_entropy:.3f})\n"
              f"masked accuracy    {before[1]:7.1%}   {after[1]:7.1%}\n"
              f"{tokens_per_second:,.0f} tokens/s over {seconds:.0f} s\n"
              f"loss curve: {curve}")
        if args.metrics:
            print(f"metrics: {args.metrics}")
        client.delete_stack(args.stack)

    if not after[0] < CLEARLY * corpus.unigram_entropy:
        print(f"FAILED: the held-out loss {after[0]:.3f} is not below {CLEARLY:.0%} of the unigram entropy", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
