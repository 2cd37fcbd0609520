#!/usr/bin/python3
"""Makes the golden tensors: encoder layers by PyTorch in fp64, with all gradients.

Run it by hand, with any PyTorch >= 1.12 and numpy; the .safetensors files beside it are committed.
Each case is checked against torch.nn.TransformerEncoderLayer before it is written, so the formulas
below are PyTorch's own and not only ours.

A case's file holds
  input, output_grad  [B, S, H]   mask [B, S] or lengths [B]   output, input_grad [B, S, H]
  grad.layers.<i>.<name>          the gradient of every parameter
and its metadata the config and how far PyTorch in each precision is from fp64:
"error.<dtype>.<tensor>" is the largest absolute difference. fp32 and bf16 are PyTorch's own; on a CPU
it has no fp16 products, so for fp16 every op computes in fp32 and its result (and gradient) is rounded.
Weights are shared: weights-<set>.safetensors. All values are stored as fp32; inputs and weights are
multiples of 2^-10 with 8 significant bits at most, so they are the same number in every dtype.
"""

import json
import os
import struct

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = ["attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob", "attn_nw", "attn_nb",
         "inter_w", "inter_b", "output_w", "output_b", "norm_w", "norm_b"]
EPS = 1e-12


def exact(x):
    """Rounds to multiples of 2^-10 with 8 significant bits: the same in fp32, bf16 and fp16."""
    x = (torch.round(x * 1024) / 1024).to(torch.bfloat16).double()
    assert torch.equal(x, x.half().double())
    return x


def make_weights(gen, layers, hidden, inter):
    def normal(*shape, std=1.0, mean=0.0):
        return exact(torch.randn(*shape, generator=gen, dtype=torch.float64) * std + mean)

    result = {}
    for i in range(layers):
        h, f = hidden, inter
        w = {
            "attn_qkvw": normal(3 * h, h, std=h ** -0.5 * 1.2), "attn_qkvb": normal(3 * h, std=0.1),
            "attn_ow": normal(h, h, std=h ** -0.5), "attn_ob": normal(h, std=0.1),
            "attn_nw": normal(h, std=0.2, mean=1.0), "attn_nb": normal(h, std=0.2),
            "inter_w": normal(f, h, std=h ** -0.5), "inter_b": normal(f, std=0.1),
            "output_w": normal(h, f, std=f ** -0.5), "output_b": normal(h, std=0.1),
            "norm_w": normal(h, std=0.2, mean=1.0), "norm_b": normal(h, std=0.2),
        }
        result.update({f"layers.{i}.{k}": v for k, v in w.items()})
    return result


class RoundBoth(torch.autograd.Function):
    """Rounds to fp16 on the way forward, and the gradient on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, g):
        return g.half().float()


def layer(x, w, heads, pre, gelu, bias, rounded):
    """One encoder layer. `bias` is added to the scores [B, 1, 1, S]; `rounded` follows every op."""
    r = rounded
    b, s, h = x.shape
    d = h // heads

    def norm(v, name):
        return r(F.layer_norm(v, (h,), w[name + "_w" if name == "norm" else name + "w"],
                              w[name + "_b" if name == "norm" else name + "b"], EPS))

    n = norm(x, "norm") if pre else x
    qkv = r(F.linear(n, w["attn_qkvw"], w["attn_qkvb"]))
    q, k, v = (t.view(b, s, heads, d).transpose(1, 2) for t in qkv.split(h, dim=-1))
    scores = r(r(q @ k.transpose(-1, -2)) * d ** -0.5)
    if bias is not None:
        scores = r(scores + bias)
    probs = r(torch.softmax(scores, dim=-1))
    mixed = r(probs @ v).transpose(1, 2).reshape(b, s, h)
    a = r(x + r(F.linear(mixed, w["attn_ow"], w["attn_ob"])))
    f = norm(a, "attn_n")
    inter = r(F.gelu(r(F.linear(f, w["inter_w"], w["inter_b"])),
                     approximate="tanh" if gelu == "tanh" else "none"))
    out = r(F.linear(inter, w["output_w"], w["output_b"]))
    return r(a + out) if pre else norm(r(f + out), "norm")


def run(case, weights, x, dout, bias, dtype, rounded=lambda t: t):
    leaves = {k: v.to(dtype).clone().requires_grad_() for k, v in weights.items()}
    x = x.to(dtype).clone().requires_grad_()
    y = x
    for i in range(case["layers"]):
        w = {n: leaves[f"layers.{i}.{n}"] for n in NAMES}
        y = layer(y, w, case["heads"], case["pre"], case["gelu"],
                  None if bias is None else bias.to(dtype), rounded)
    y.backward(dout.to(dtype))
    result = {"output": y.detach(), "input_grad": x.grad}
    result.update({"grad." + k: v.grad for k, v in leaves.items()})
    return {k: v.double() for k, v in result.items()}


def run_torch_module(case, weights, x, dout, bias):
    """The same by torch.nn.TransformerEncoderLayer in fp64."""
    x = x.clone().requires_grad_()
    y, modules = x, []
    for i in range(case["layers"]):
        w = {n: weights[f"layers.{i}.{n}"] for n in NAMES}
        m = torch.nn.TransformerEncoderLayer(
            case["hidden"], case["heads"], case["inter"], dropout=0.0,
            activation=lambda t: F.gelu(t, approximate="tanh" if case["gelu"] == "tanh" else "none"),
            layer_norm_eps=EPS, batch_first=True, norm_first=case["pre"], dtype=torch.float64)
        first, second = ("norm_", "attn_n") if case["pre"] else ("attn_n", "norm_")
        m.load_state_dict({
            "self_attn.in_proj_weight": w["attn_qkvw"], "self_attn.in_proj_bias": w["attn_qkvb"],
            "self_attn.out_proj.weight": w["attn_ow"], "self_attn.out_proj.bias": w["attn_ob"],
            "linear1.weight": w["inter_w"], "linear1.bias": w["inter_b"],
            "linear2.weight": w["output_w"], "linear2.bias": w["output_b"],
            "norm1.weight": w[first + "w"], "norm1.bias": w[first + "b"],
            "norm2.weight": w[second + "w"], "norm2.bias": w[second + "b"]})
        m.train()
        modules.append(m)
        mask = None
        if bias is not None:
            s = x.shape[1]
            mask = bias.expand(-1, case["heads"], s, -1).reshape(-1, s, s)
        y = m(y, src_mask=mask)
    y.backward(dout)
    result = {"output": y.detach(), "input_grad": x.grad}
    for i, m in enumerate(modules):
        result[f"grad.layers.{i}.attn_qkvw"] = m.self_attn.in_proj_weight.grad
        result[f"grad.layers.{i}.output_b"] = m.linear2.bias.grad
        norm = m.norm1 if case["pre"] else m.norm2
        result[f"grad.layers.{i}.norm_w"] = norm.weight.grad
    return result


def save(name, tensors, metadata):
    header, offset, blobs = {"__metadata__": metadata}, 0, []
    for key, t in tensors.items():
        kind, array = (("I32", t.numpy().astype("<i4")) if t.dtype == torch.int32
                       else ("F32", t.double().numpy().astype("<f4")))
        blob = array.tobytes()
        header[key] = {"dtype": kind, "shape": list(array.shape),
                       "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(HERE, name + ".safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def main():
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(20)
    small = dict(batch=3, seq=7, hidden=24, heads=3, inter=40)
    wide = dict(batch=2, seq=33, hidden=64, heads=2, inter=192)
    sets = {"small": (small, 2, make_weights(gen, 2, small["hidden"], small["inter"])),
            "wide": (wide, 1, make_weights(gen, 1, wide["hidden"], wide["inter"]))}
    for name, (dims, layers, weights) in sets.items():
        save("weights-" + name, weights, {"layers": str(layers)})

    cases = []
    for pre in (True, False):
        for gelu in ("erf", "tanh"):
            cases.append(dict(small, set="small", layers=1, pre=pre, gelu=gelu, pad="mask"))
        cases.append(dict(small, set="small", layers=2, pre=pre, gelu="erf", pad="lengths"))
        cases.append(dict(small, set="small", layers=2, pre=pre, gelu="tanh", pad="none"))
        cases.append(dict(wide, set="wide", layers=1, pre=pre, gelu="erf", pad="lengths"))

    for case in cases:
        b, s, h = case["batch"], case["seq"], case["hidden"]
        x = exact(torch.randn(b, s, h, generator=gen, dtype=torch.float64))
        dout = exact(torch.randn(b, s, h, generator=gen, dtype=torch.float64))
        weights = {k: v for k, v in sets[case["set"]][2].items()
                   if int(k.split(".")[1]) < case["layers"]}
        tensors = {"input": x, "output_grad": dout}
        bias = None
        if case["pad"] == "mask":
            # Plain numbers, the customary -10000 and true infinities; no row is all masked.
            bias = exact(torch.randn(b, s, generator=gen, dtype=torch.float64))
            bias[:, s // 2] = -9984.0  # -10000 as bf16 has it
            bias[:, s - 1] = -float("inf")
            tensors["mask"] = bias
            bias = bias.view(b, 1, 1, s)
        elif case["pad"] == "lengths":
            lengths = torch.tensor(([s, 1, (s + 1) // 2])[:b], dtype=torch.int32)
            tensors["lengths"] = lengths
            keys = torch.arange(s).view(1, s) >= lengths.view(b, 1)
            bias = torch.zeros(b, s, dtype=torch.float64).masked_fill(keys, -float("inf"))
            bias = bias.view(b, 1, 1, s)

        truth = run(case, weights, x, dout, bias, torch.float64)
        for key, value in run_torch_module(case, weights, x, dout, bias).items():
            gap = (truth[key] - value).abs().max().item()
            assert gap < 1e-11, (case, key, gap)
        tensors.update(truth)
        metadata = {k: json.dumps(v) if isinstance(v, bool) else str(v) for k, v in case.items()}
        for dtype, values in (
                ("fp32", run(case, weights, x, dout, bias, torch.float32)),
                ("bf16", run(case, weights, x, dout, bias, torch.bfloat16)),
                ("fp16", run(case, weights, x, dout, bias, torch.float32, RoundBoth.apply))):
            for key, value in values.items():
                metadata[f"error.{dtype}.{key}"] = repr((value - truth[key]).abs().max().item())
        name = f"{case['set']}-{case['layers']}-{'pre' if case['pre'] else 'post'}-" \
               f"{case['gelu']}-{case['pad']}"
        save(name, tensors, metadata)
        print(name, "bf16 output error", metadata["error.bf16.output"],
              "fp32", metadata["error.fp32.output"], "fp16", metadata["error.fp16.output"])


if __name__ == "__main__":
    main()
