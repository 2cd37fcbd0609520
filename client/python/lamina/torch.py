"""A remote stack as a PyTorch module.

Tensors on the daemon's own device stay there where client and daemon share it (lamina.device). CPU tensors cross through
memory shared with the daemon when it is on this host; all others are copied into it and back. RemoteStack.transport says
which.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np
import torch

from lamina import packing
from lamina.stack import Applied, Context, Stack

# torch.compile is to run what is around the module, not trace the calls to the daemon; PyTorch 1 has no such thing.
_not_compiled: Any = getattr(getattr(torch, "compiler", None), "disable", lambda function: function)

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A CPU tensor over the array's memory; uint16 is bf16 bits. The array's memory lives as long as the tensor."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array over a CPU tensor's memory; bf16 as uint16 bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def pack(x: torch.Tensor, lengths: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """lamina.packing.pack for tensors, with autograd: x [B, S, ...] and lengths [B], each 1..S, as ([T, ...], int32
    [B + 1]), for RemoteStack's cumulative_lengths.

    >>> packed, cumulative_lengths = pack(torch.tensor([[1., 2.], [3., 0.]]), [2, 1])
    >>> packed, cumulative_lengths
    (tensor([1., 2., 3.]), tensor([0, 2, 3], dtype=torch.int32))
    """
    offsets = packing.offsets_of(torch.as_tensor(lengths).cpu().numpy())
    kept = packing.kept(packing.lengths_of(offsets), x.shape[0], x.shape[1])
    return x[torch.from_numpy(kept).to(x.device)], torch.from_numpy(offsets)


def unpack(packed: torch.Tensor, cumulative_lengths: Any, seq: Optional[int] = None) -> torch.Tensor:
    """lamina.packing.unpack for tensors, with autograd: [T, ...] as [B, seq, ...] with zeros for padding; seq None: the
    longest sequence's length.

    >>> unpack(torch.tensor([1., 2., 3.]), [0, 2, 3])
    tensor([[1., 2.],
            [3., 0.]])
    """
    lengths = packing.lengths_of(torch.as_tensor(cumulative_lengths).cpu().numpy(), packed.shape[0])
    seq = int(lengths.max()) if seq is None else seq
    kept = torch.from_numpy(packing.kept(lengths, len(lengths), seq)).to(packed.device)
    padded = packed.new_zeros((len(lengths), seq, *packed.shape[1:]))
    return padded.index_put(kept.nonzero(as_tuple=True), packed)


def _as_given(result: Any, given: torch.Tensor) -> torch.Tensor:
    """A call's result, of the type and on the device of what was given."""
    tensor = result if isinstance(result, torch.Tensor) else as_tensor(result)
    return tensor.to(given.device, given.dtype)


class _RemoteForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, module: RemoteStack,
                attention: Dict[str, np.ndarray]) -> torch.Tensor:
        y, ctx.context = module._run(x, training=True, **attention)
        ctx.module = module
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Tuple[Optional[torch.Tensor], None, None, None]:
        if ctx.context is None:
            raise RuntimeError("RemoteStack: backward was run a second time; the daemon spent the activations in the first")
        wanted = ctx.needs_input_grad[0]
        dx = ctx.module.stack.backward(ctx.context, ctx.module._passed(dy), input_grad=wanted)
        ctx.context = None
        return (_as_given(dx, dy) if wanted else None), None, None, None


class RemoteStack(torch.nn.Module):
    """Runs a lamina.Stack as a module: [B, S, H] -> [B, S, H], or packed [T, H] -> [T, H], with autograd through the
    daemon.

    The weights live in the daemon: parameters() and state_dict() are empty here. Train them with `step` (or
    Stack.apply_gradients); read and write them with `weights` and `load_weights`, keep them with Stack.save. Each
    backward adds to the daemon's gradients, as PyTorch's do. In eval mode, or where gradients are off, it evaluates: no
    dropout, nothing kept. A forward whose graph is dropped without a backward frees its activations in the daemon. A
    second backward through the same graph and double differentiation are RuntimeErrors.

    stack: dtype and sizes are its own; a tensor of another dtype is converted and the result converted back. layers:
    (begin, end) to run a part of it, None for all.

    >>> import lamina, torch
    >>> with lamina.connect() as client:
    ...     stack = client.create_stack("torch-example", batch_size=2, max_seq_length=8, hidden_size=16, heads=2,
    ...                                 num_hidden_layers=2, hidden_dropout_ratio=0.1)
    ...     encoder = RemoteStack(stack)
    ...     x = torch.randn(2, 8, 16, requires_grad=True)
    ...     loss = encoder(x, attention_mask=torch.ones(2, 8)).square().mean()
    ...     loss.backward()
    ...     outcome = encoder.step(lr=1e-3, zero_gradients=True)
    ...     client.delete_stack("torch-example")
    >>> x.grad.shape, outcome.applied
    (torch.Size([2, 8, 16]), True)
    """

    def __init__(self, stack: Stack, layers: Optional[Tuple[int, int]] = None) -> None:
        super().__init__()
        self.stack = stack
        self.layers = layers
        # Makes autograd call backward although x may need no gradient itself. Not a parameter.
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def transport(self) -> str:
        """How the last call's tensor crossed, or, before the first, how a tensor on the daemon's device would: "device"
        (device memory that both map), "memfd" (host memory that both map) or "inline" (inside messages)."""
        client = self.stack._client
        return self.stack.last_transport or ("device" if client.shares_device else client.transport)

    def empty(self, batch: int, seq: int, device: bool = False) -> torch.Tensor:
        """An uninitialised tensor [batch, seq, H] of the stack's type: passing it costs no copy. On the CPU, in memory
        shared with the daemon where there is any; device: on the daemon's device (Unavailable where that isn't shared)."""
        shape = (batch, seq, self.stack.config.hidden_size)
        if device:
            return torch.from_dlpack(self.stack._client.empty(shape, self.stack.dtype, device=True))
        return as_tensor(self.stack._client.empty(shape, self.stack.dtype))

    @_not_compiled
    def forward(self, x: torch.Tensor, mask: Optional[torch.Tensor] = None, lengths: Optional[torch.Tensor] = None,
                attention_mask: Optional[torch.Tensor] = None,
                cumulative_lengths: Optional[torch.Tensor] = None) -> torch.Tensor:
        """x: [B, S, H]. At most one of: mask, additive [B, S] or [B, 1, 1, S]; lengths, [B], 1..S; attention_mask, [B, S]
        with 1 (True) for tokens and 0 for padding; cumulative_lengths, [n + 1], of a packed x [T, H] (see pack). The
        result has x's shape, dtype and device. LaminaError."""
        if sum(a is not None for a in (mask, lengths, attention_mask, cumulative_lengths)) > 1:
            raise ValueError("give one of mask, lengths, attention_mask, cumulative_lengths")
        attention: Dict[str, np.ndarray] = {}
        if attention_mask is not None:
            hidden = torch.zeros(attention_mask.shape, dtype=torch.float32)
            mask = hidden.masked_fill(attention_mask.detach().cpu() == 0, float("-inf"))
        if mask is not None:
            attention["mask"] = mask.detach().to("cpu", torch.float32).contiguous().numpy()
        if lengths is not None:
            attention["lengths"] = torch.as_tensor(lengths).detach().cpu().numpy()
        if cumulative_lengths is not None:
            attention["cumulative_lengths"] = torch.as_tensor(cumulative_lengths).detach().cpu().numpy()
        if self.training and torch.is_grad_enabled():
            return _RemoteForward.apply(x, self._anchor, self, attention)
        return self._run(x, training=False, **attention)[0]

    def _passed(self, tensor: torch.Tensor) -> Any:
        """What Stack's methods take for it: a contiguous tensor of the stack's type on the daemon's device if `tensor` is
        on that, else an array; `tensor` itself where it will do, else a copy in memory that the daemon maps."""
        tensor = tensor.detach()
        wanted = _TORCH[self.stack.dtype]
        client = self.stack._client
        if tensor.is_cuda and client.shares_device and tensor.device.index == client.session.device_pool().device.ordinal:
            if tensor.dtype == wanted and tensor.is_contiguous():
                return tensor
            return torch.from_dlpack(client.empty(tuple(tensor.shape), self.stack.dtype, device=True)).copy_(tensor)
        if tensor.device.type == "cpu" and tensor.dtype == wanted and tensor.is_contiguous():
            return as_array(tensor)
        copy = as_tensor(client.empty(tuple(tensor.shape), self.stack.dtype))
        return as_array(copy.copy_(tensor))

    def _run(self, x: torch.Tensor, training: bool, **attention: np.ndarray) -> Tuple[torch.Tensor, Optional[Context]]:
        y, context = self.stack.forward(self._passed(x), training=training, layers=self.layers, **attention)
        return _as_given(y, x), context

    def step(self, lr: float, **options: Any) -> Applied:
        """One optimizer step in the daemon: Stack.apply_gradients with its options."""
        return self.stack.apply_gradients(lr, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the daemon's gradients."""
        self.stack.zero_gradients()

    def weights(self) -> Dict[str, torch.Tensor]:
        """{name: float32 CPU tensor}, a copy of the daemon's master weights; names as in Stack.parameters."""
        return {name: torch.from_numpy(value) for name, value in self.stack.parameters().items()}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes {name: tensor}; names as in Stack.parameters. NotFound, InvalidArgument."""
        self.stack.set_parameters({name: value.detach().float().cpu().numpy()
                                   for name, value in weights.items()})

    def extra_repr(self) -> str:
        return repr(self.stack) + (f", layers {self.layers[0]}..{self.layers[1] - 1}" if self.layers else "")
