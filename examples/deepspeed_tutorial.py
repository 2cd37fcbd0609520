#!/usr/bin/env python3
"""BERT as DeepSpeed's transformer-kernel tutorial changes it, with the one import changed; runs on a CPU.

The encoder's layers are DeepSpeedTransformerLayers in a ModuleList, called in turn with the hidden states and the mask, and trained
with autograd and an optimizer of PyTorch's, here to fill in masked words. The daemon is lamina.connect()'s: LAMINA_TARGET, or
the usual socket. Prints the loss; exits 1 if it did not fall.
"""

import argparse
import copy
import pathlib
import sys

import environment

environment.enter("torch", "grpc", "lamina")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

# The tutorial: from deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
from lamina.deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "mlm"))
import data  # noqa: E402


class BertEncoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        config = DeepSpeedTransformerConfig(batch_size=args.batch,
                                            max_seq_length=args.seq,
                                            hidden_size=args.hidden,
                                            heads=args.heads,
                                            attn_dropout_ratio=args.dropout,
                                            hidden_dropout_ratio=args.dropout,
                                            num_hidden_layers=args.layers,
                                            initializer_range=0.02,
                                            local_rank=-1,
                                            seed=args.seed,
                                            fp16=args.fp16,
                                            pre_layer_norm=True,
                                            attn_dropout_checkpoint=args.attn_dropout_checkpoint,
                                            normalize_invertible=args.normalize_invertible,
                                            gelu_checkpoint=args.gelu_checkpoint)
        self.layer = nn.ModuleList([
            copy.deepcopy(DeepSpeedTransformerLayer(i, config)) for i in range(config.num_hidden_layers)
        ])
        self.final_norm = nn.LayerNorm(args.hidden)

    def forward(self, hidden_states, attention_mask):
        for layer_module in self.layer:
            hidden_states = layer_module(hidden_states, attention_mask)
        return self.final_norm(hidden_states)


class BertForMaskedWords(nn.Module):
    def __init__(self, args, vocabulary_size):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, args.hidden)
        self.positions = nn.Embedding(args.seq, args.hidden)
        self.encoder = BertEncoder(args)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, ids, labels):
        hidden_states = self.words(ids) + self.positions.weight[: ids.shape[1]]
        # BERT's extended mask: 0 for tokens, -10000 for padding, [B, 1, 1, S].
        attention_mask = (1.0 - (ids != data.PAD)[:, None, None, :].float()) * -10000.0
        hidden_states = self.encoder(hidden_states, attention_mask)
        masked = labels != data.NOT_MASKED
        return F.cross_entropy(F.linear(hidden_states[masked], self.words.weight, self.bias), labels[masked])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--seq", type=int, default=48)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--fp16", action="store_true")
    p.add_argument("--attn_dropout_checkpoint", action="store_true")
    p.add_argument("--normalize_invertible", action="store_true")
    p.add_argument("--gelu_checkpoint", action="store_true")
    p.add_argument("--text", help="a plain-text file instead of the King James Bible")
    args = p.parse_args()

    torch.manual_seed(args.seed)
    corpus = data.Corpus(data.load_text(args.text), args.seq, vocabulary_size=1000)
    model = BertForMaskedWords(args, len(corpus.words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    generator = np.random.default_rng(args.seed)
    feed = data.batches(corpus.train, args.batch, generator)
    losses = []
    for step in range(args.steps):
        ids, labels = data.mask_tokens(next(feed), generator, len(corpus.words))
        loss = model(torch.from_numpy(ids), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1:4d}  loss {np.mean(losses[-20:]):.4f}", flush=True)
    first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
    print(f"loss of masked words: {first:.4f} in the first ten steps, {last:.4f} in the last ten")
    return 0 if last < 0.9 * first else 1


if __name__ == "__main__":
    sys.exit(main())
