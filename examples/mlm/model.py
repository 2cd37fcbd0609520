"""A small BERT for masked words: embeddings and head in PyTorch, the encoder stack wherever `stack` runs it."""

import torch
from torch import nn
from torch.nn import functional as F


class MaskedLanguageModel(nn.Module):
    """token ids [B, S] -> logits of the masked positions [M, V].

    `stack` maps [B, S, H] to [B, S, H]: a lamina.torch.RemoteStack, or any module for comparison. The output
    matrix is the embedding's, as in BERT.
    """

    def __init__(self, stack, vocabulary_size, seq, hidden):
        super().__init__()
        self.stack = stack
        self.tokens = nn.Embedding(vocabulary_size, hidden)
        self.positions = nn.Parameter(torch.zeros(seq, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, hidden)
        self.head_norm = nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, ids, masked):
        x = self.norm(self.tokens(ids) + self.positions[: ids.shape[1]])
        y = self.stack(x)
        h = self.head_norm(F.gelu(self.head(y[masked])))
        return F.linear(h, self.tokens.weight, self.bias)

    def local_parameters(self):
        """What this process trains; the stack's own parameters live in the daemon."""
        return [p for n, p in self.named_parameters() if not n.startswith("stack.")]
