"""The encoder layer of a stack in plain PyTorch, from a stack's parameters by name: what ours is compared with.

Dropout is left out: masks are Lamina's own. Formulas: kernels/transformer/include/lamina/transformer/stack.h.
"""

import math

import torch
from torch.nn import functional as F

NAMES = ["attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob", "attn_nw", "attn_nb",
         "inter_w", "inter_b", "output_w", "output_b", "norm_w", "norm_b"]


def layer(x, p, heads, pre_layer_norm, eps=1e-12, gelu="erf", mask=None):
    """x [B, S, H] -> [B, S, H]; p maps NAMES to tensors of x's dtype; mask: additive, [B, 1, 1, S]."""
    batch, seq, hidden = x.shape
    norm = lambda v, name: F.layer_norm(v, (hidden,), p[f"{name}w"], p[f"{name}b"], eps)

    def attention(n):
        q, k, v = F.linear(n, p["attn_qkvw"], p["attn_qkvb"]).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(hidden // heads)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        context = torch.softmax(scores, -1) @ v
        return F.linear(context.transpose(1, 2).reshape(batch, seq, hidden), p["attn_ow"], p["attn_ob"])

    def feed_forward(n):
        inner = F.gelu(F.linear(n, p["inter_w"], p["inter_b"]), approximate="none" if gelu == "erf" else "tanh")
        return F.linear(inner, p["output_w"], p["output_b"])

    if pre_layer_norm:
        a = x + attention(norm(x, "norm_"))
        return a + feed_forward(norm(a, "attn_n"))
    a = norm(x + attention(x), "attn_n")
    return norm(a + feed_forward(a), "norm_")


def run(x, dy, parameters, layers, dtype, device, **how):
    """Forward and backward of the whole stack in `dtype`: (y, dx, {name: gradient}), all float64 on the CPU."""
    as_leaf = lambda a: torch.as_tensor(a).to(device=device, dtype=dtype).requires_grad_()
    leaves = {name: as_leaf(value) for name, value in parameters.items()}
    start = y = as_leaf(x)
    for i in range(layers):
        y = layer(y, {name: leaves[f"layers.{i}.{name}"] for name in NAMES}, **how)
    y.backward(torch.as_tensor(dy).to(device=device, dtype=dtype))
    back = lambda t: t.detach().double().cpu()
    return back(y), back(start.grad), {name: back(leaf.grad) for name, leaf in leaves.items()}


def relative_error(a, reference):
    """||a - reference|| / ||reference||, in double; NaN never passes a comparison with it."""
    a, reference = torch.as_tensor(a).double(), torch.as_tensor(reference).double()
    return float((a - reference).norm() / reference.norm())
