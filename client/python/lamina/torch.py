"""A remote stack as a PyTorch module."""

import numpy as np
import torch

from lamina import dtypes

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _shared_empty(client, shape, dtype):
    """A CPU tensor in memory shared with the daemon; it keeps the memory alive."""
    array = client.empty(shape, dtype)
    if dtype == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_array(tensor):
    """A numpy view of a contiguous CPU tensor; bf16 as uint16 bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _as_tensor(array, dtype):
    if dtype == "bf16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class _RemoteForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, module, attention):
        y, ctx.context = module._run(x, training=True, **attention)
        ctx.module = module
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        module, context = ctx.module, ctx.context
        if context is None:
            raise RuntimeError("RemoteStack: backward was run a second time; the daemon spent the activations in the first")
        ctx.context = None
        stack = module.stack
        local = dy.detach().to("cpu", _TORCH[stack.dtype]).contiguous()
        wanted = ctx.needs_input_grad[0]
        dx = stack.backward(context, _as_array(local), input_grad=wanted)
        if not wanted:
            return None, None, None, None
        return _as_tensor(dx, stack.dtype).to(dy.device, dy.dtype), None, None, None


class RemoteStack(torch.nn.Module):
    """Runs a lamina.Stack as a module: [B, S, H] -> [B, S, H], with autograd through the daemon.

    The weights live in the daemon: parameters() is empty here; train them with `step` (or Stack.apply_gradients),
    read them with Stack.parameters. Each backward adds to the daemon's gradients. In eval mode, or without
    gradients enabled, it evaluates: no dropout, nothing kept. A forward whose graph is dropped without a backward
    frees its activations in the daemon. CPU tensors cross through shared memory when the daemon is on this host
    (`Client.empty` and `empty` make tensors that cross without a copy); others are copied to the CPU first.
    """

    def __init__(self, stack):
        super().__init__()
        self.stack = stack
        # Makes autograd call backward although x may need no gradient itself. Not a parameter.
        self._anchor = torch.zeros((), requires_grad=True)

    def empty(self, batch, seq):
        """A CPU tensor [batch, seq, H] of the stack's type in memory shared with the daemon."""
        return _shared_empty(self.stack._client, (batch, seq, self.stack.config.hidden_size), self.stack.dtype)

    def forward(self, x, mask=None, lengths=None, attention_mask=None):
        """x: [B, S, H]. At most one of: mask, additive [B, S] or [B, 1, 1, S]; lengths, [B]; attention_mask, [B, S] with
        1 for tokens and 0 for padding. The result has x's dtype and device."""
        if sum(a is not None for a in (mask, lengths, attention_mask)) > 1:
            raise ValueError("give one of mask, lengths, attention_mask")
        attention = {}
        if attention_mask is not None:
            hidden = torch.zeros(attention_mask.shape, dtype=torch.float32)
            mask = hidden.masked_fill(attention_mask.detach().cpu() == 0, float("-inf"))
        if mask is not None:
            attention["mask"] = mask.detach().to("cpu", torch.float32).contiguous().numpy()
        if lengths is not None:
            attention["lengths"] = torch.as_tensor(lengths).detach().to("cpu", torch.int32).numpy()
        if self.training and torch.is_grad_enabled():
            return _RemoteForward.apply(x, self._anchor, self, attention)
        return self._run(x, training=False, **attention)[0]

    def _run(self, x, training, **attention):
        local = x.detach().to("cpu", _TORCH[self.stack.dtype]).contiguous()
        y, context = self.stack.forward(_as_array(local), training=training, **attention)
        return _as_tensor(y, self.stack.dtype).to(x.device, x.dtype), context

    def step(self, lr, **options):
        """Stack.apply_gradients."""
        return self.stack.apply_gradients(lr, **options)

    def zero_grad(self, set_to_none=True):
        """Zeroes the daemon's gradients."""
        self.stack.zero_gradients()

    def extra_repr(self):
        return repr(self.stack)
