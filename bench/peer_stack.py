"""The same stack as a PyTorch user has it, to be timed against ours: eager with fused attention, and compiled by
torch.compile and captured in a CUDA graph.

A step is a training forward and its backward from a random gradient; gradients add up in `.grad`, as ours do.
"""

import gc
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def attend(q, k, v, dropout):
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # Before PyTorch 2.
    probabilities = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
    return F.dropout(probabilities, dropout) @ v


class EncoderLayer(nn.Module):
    def __init__(self, row):
        super().__init__()
        hidden, wide = row["hidden"], row["intermediate"]
        self.heads, self.pre_norm, self.dropout = row["heads"], row["pre_layer_norm"], row["dropout"]
        self.qkv, self.attention_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.widen, self.narrow = nn.Linear(hidden, wide), nn.Linear(wide, hidden)
        self.attention_norm, self.output_norm = nn.LayerNorm(hidden, eps=1e-12), nn.LayerNorm(hidden, eps=1e-12)

    def attention(self, x):
        batch, seq, hidden = x.shape
        heads = self.qkv(x).reshape(batch, seq, 3, self.heads, hidden // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        out = attend(q, k, v, self.dropout).transpose(1, 2).reshape(batch, seq, hidden)
        return F.dropout(self.attention_out(out), self.dropout)

    def feed_forward(self, x):
        return F.dropout(self.narrow(F.gelu(self.widen(x))), self.dropout)

    def forward(self, x):
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x))
            return x + self.feed_forward(self.output_norm(x))
        x = self.attention_norm(x + self.attention(x))
        return self.output_norm(x + self.feed_forward(x))


def marks(device, count):
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)] if device.type == "cuda" else [None] * count


def record(mark):
    """The moment at which the device has done all that it was given: an event, or on the CPU the time."""
    if mark is None:
        return time.perf_counter()
    mark.record()
    return mark


def milliseconds(begin, end):
    if isinstance(begin, float):
        return (end - begin) * 1e3
    end.synchronize()
    return begin.elapsed_time(end)


class EagerPeer:
    def __init__(self, row, device):
        torch.manual_seed(0)
        self.device = torch.device(device)
        dtype = DTYPES[row["dtype"]]
        self.base_bytes = self._start_of_peak()
        self.model = nn.Sequential(*[EncoderLayer(row) for _ in range(row["layers"])]).to(self.device, dtype)
        shape = row["batch"], row["seq"], row["hidden"]
        self.x = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
        # Small: fp16 gradients are to stay finite however many steps add up.
        self.dy = torch.randn(shape, device=self.device, dtype=dtype) * 1e-3
        self._prepare()
        self.peak_bytes = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.base_bytes
        self._after_peak()

    def _start_of_peak(self):
        if self.device.type != "cuda":
            return 0
        torch.cuda.set_device(self.device)
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _prepare(self):
        for _ in range(2):
            self._forward_backward()

    def _after_peak(self):
        pass

    def _forward_backward(self):
        self.model(self.x).backward(self.dy)

    def run(self, steps):
        """Milliseconds of forward, and of forward and backward, a value a step."""
        times = {"forward": [], "forward_backward": []}
        for _ in range(steps):
            began, forward_done, done = marks(self.device, 3)
            began = record(began)
            y = self.model(self.x)
            forward_done = record(forward_done)
            y.backward(self.dy)
            done = record(done)
            del y
            times["forward_backward"].append(milliseconds(began, done))
            times["forward"].append(milliseconds(began, forward_done))
        return times


class CompiledGraphPeer(EagerPeer):
    """A graph of forward and backward and one of the forward alone, both replayed at every step."""

    def _prepare(self):
        self.model = torch.compile(self.model, dynamic=False)
        self.step_graph = self._capture(self._forward_backward)

    def _after_peak(self):
        # Like the step's forward it keeps what backward reads.
        self.forward_graph = self._capture(lambda: self.model(self.x))

    def _capture(self, call):
        # Compilation and the libraries' first calls may not happen in a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph

    def run(self, steps):
        times = {"forward": [], "forward_backward": []}
        for _ in range(steps):
            for name, graph in (("forward_backward", self.step_graph), ("forward", self.forward_graph)):
                began, done = marks(self.device, 2)
                began = record(began)
                graph.replay()
                done = record(done)
                times[name].append(milliseconds(began, done))
        return times


PEERS = {"eager": EagerPeer, "compile_graph": CompiledGraphPeer}


def release():
    """Gives back what peers held, once nothing refers to them any more."""
    gc.collect()
    if hasattr(torch, "_dynamo"):
        torch._dynamo.reset()  # or the next shape would be compiled for any shape
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def product_tflops(dtype, device, size=8192):
    """What PyTorch's product reaches, median of 20."""
    device = torch.device(device)
    x, w = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    times = []
    for _ in range(25):
        began, done = marks(device, 2)
        began = record(began)
        F.linear(x, w)
        times.append(milliseconds(began, record(done)))
    return 2 * size**3 / statistics.median(times[5:]) / 1e9
