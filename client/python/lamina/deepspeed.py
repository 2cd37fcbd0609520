"""DeepSpeed's transformer layer with its weights in a daemon: the same two classes, the same names.

    from lamina.deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer

docs/deepspeed.md says how to move, what differs and what is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
import threading
import uuid
import weakref
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from torch import nn

from lamina.client import Client, connect
from lamina.config import StackConfig
from lamina.errors import LaminaError
from lamina.stack import Applied, Context, Stack
from lamina.torch import RemoteStack, _as_given, _not_compiled

__all__ = ["DeepSpeedTransformerConfig", "DeepSpeedTransformerLayer", "SharedStack", "load_state_dict", "stack_of", "use"]

_NAMES = ("attn_qkvw", "attn_qkvb", "attn_ow", "attn_ob", "attn_nw", "attn_nb",
          "inter_w", "inter_b", "output_w", "output_b", "norm_w", "norm_b")

# What a layer must be told: DeepSpeed's default for these, -1, means nothing.
_NEEDED = ("batch_size", "hidden_size", "heads", "num_hidden_layers", "attn_dropout_ratio", "hidden_dropout_ratio",
           "initializer_range")

# What can change on a live stack.
_LIVE = ("attn_dropout_ratio", "hidden_dropout_ratio", "normalize_invertible", "gelu_checkpoint",
         "attn_dropout_checkpoint", "activation_checkpointing", "stochastic_mode")

# Without max_seq_length a stack is made for the first call's S, rounded up to this.
_SEQ_STEP = 64

_client: Optional[Client] = None
_placing = threading.RLock()  # guards _client and which layer has which place


def use(client: Optional[Client]) -> None:
    """Lets layers that are called for the first time from now on run in this client's daemon; None: lamina.connect()'s."""
    global _client
    with _placing:
        _client = client


def _default_client() -> Client:
    global _client
    with _placing:
        if _client is None:
            _client = connect(client_name="deepspeed layers")
        return _client


class DeepSpeedTransformerConfig:
    """DeepSpeed's settings under its names, with its defaults, as attributes that may be set later.

    batch_size: the largest B of a call. hidden_size H, heads A, intermediate_size I (not above 0: 4 H),
    num_hidden_layers L. Dropout ratios p, in [0, 1). initializer_range: standard deviation of the initial matrices;
    adjust_init_range divides the two output matrices' by sqrt(2 L). layer_norm_eps: added to the variance. local_rank:
    ordinal of the device that the daemon must have, -1: any. seed: of the dropout masks, -1: the daemon draws one.
    fp16: half-precision weights and activations with fp32 master weights. pre_layer_norm: norm before each sub-layer, or
    after the residual sum. normalize_invertible, gelu_checkpoint, attn_dropout_checkpoint: memory flags. stochastic_mode:
    sums in any order. return_tuple: layers return (output,). training: False begins in eval mode.

    By keyword alone: max_seq_length, the largest S of a call (None: room is made for what comes). Beyond DeepSpeed:
    dtype "fp32", "bf16" or "fp16" (None: as fp16 says); gelu "tanh" (DeepSpeed's) or "erf" (BERT's); causal;
    activation_checkpointing; max_contexts, as in StackConfig; remote_optimizer: weights, gradients and optimizer stay in
    the daemon, see stack_of; stack_name: the stack's name in the daemon (None: one of its own).

    >>> config = DeepSpeedTransformerConfig(batch_size=8, hidden_size=64, heads=4, num_hidden_layers=2,
    ...                                     attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1, initializer_range=0.02)
    >>> config.intermediate_size, config.layer_norm_eps
    (256, 1e-12)
    """

    def __init__(self, batch_size: int = -1, hidden_size: int = -1, intermediate_size: int = -1, heads: int = -1,
                 attn_dropout_ratio: float = -1, hidden_dropout_ratio: float = -1, num_hidden_layers: int = -1,
                 initializer_range: float = -1, layer_norm_eps: float = 1e-12, local_rank: int = -1, seed: int = -1,
                 fp16: bool = False, pre_layer_norm: bool = True, normalize_invertible: bool = False,
                 gelu_checkpoint: bool = False, adjust_init_range: bool = True, attn_dropout_checkpoint: bool = False,
                 stochastic_mode: bool = False, return_tuple: bool = False, training: bool = True, *,
                 max_seq_length: Optional[int] = None, dtype: Optional[str] = None, gelu: str = "tanh",
                 causal: bool = False, activation_checkpointing: bool = False, max_contexts: Optional[int] = None,
                 remote_optimizer: bool = False, stack_name: Optional[str] = None) -> None:
        self.layer_id: Optional[int] = -1
        self.batch_size = batch_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size if intermediate_size > 0 else 4 * hidden_size
        self.heads = heads
        self.attn_dropout_ratio = attn_dropout_ratio
        self.hidden_dropout_ratio = hidden_dropout_ratio
        self.num_hidden_layers = num_hidden_layers
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.local_rank = local_rank
        self.seed = seed
        self.fp16 = fp16
        self.pre_layer_norm = pre_layer_norm
        self.normalize_invertible = normalize_invertible
        self.gelu_checkpoint = gelu_checkpoint
        self.adjust_init_range = adjust_init_range
        self.attn_dropout_checkpoint = attn_dropout_checkpoint
        self.stochastic_mode = stochastic_mode
        self.return_tuple = return_tuple
        self.training = training
        self.max_seq_length = max_seq_length
        self.dtype = dtype
        self.gelu = gelu
        self.causal = causal
        self.activation_checkpointing = activation_checkpointing
        self.max_contexts = max_contexts
        self.remote_optimizer = remote_optimizer
        self.stack_name = stack_name
        self._stacks: List[weakref.ref[SharedStack]] = []  # of its layers; newest last
        self._stacks_made = 0
        self._layers_made = 0

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedTransformerConfig:
        """From a mapping with these names; TypeError names the ones that are none."""
        config = cls()
        known = {name for name in vars(config) if not name.startswith("_")}
        unknown = sorted(set(json_object) - known)
        if unknown:
            raise TypeError(f"DeepSpeedTransformerConfig has no {', '.join(unknown)}")
        vars(config).update(json_object)
        return config

    @classmethod
    def from_json_file(cls, json_file: Union[str, os.PathLike]) -> DeepSpeedTransformerConfig:
        """From a file holding a JSON object with these names, in UTF-8 or (as DeepSpeed wants it) UTF-16."""
        with open(json_file, "rb") as file:
            return cls.from_dict(json.loads(file.read()))

    def __getstate__(self) -> Dict[str, Any]:
        # A copy's layers are none of this one's.
        return {**vars(self), "_stacks": [], "_stacks_made": 0, "_layers_made": 0}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"DeepSpeedTransformerConfig({shown})"

    def _check(self) -> None:
        """ValueError listing each setting that a layer can't be made with; the daemon checks the rest."""
        wrong = [f"{name} is not set" for name in _NEEDED if getattr(self, name) in (-1, None)]
        if not wrong and self.hidden_size % self.heads:
            wrong.append(f"hidden_size: {self.hidden_size} must be divisible by heads, {self.heads}")
        if self.fp16 and self.dtype not in (None, "fp16"):
            wrong.append(f"dtype: {self.dtype!r} and fp16=True contradict each other")
        if self.remote_optimizer and not self.max_seq_length:
            wrong.append("max_seq_length is not set: with remote_optimizer the stack can't be made anew for longer ones")
        if wrong:
            raise ValueError("DeepSpeedTransformerConfig: " + "; ".join(wrong))

    def _intermediate(self) -> int:
        return self.intermediate_size if self.intermediate_size > 0 else 4 * self.hidden_size

    def _shapes(self) -> Dict[str, Tuple[int, ...]]:
        h, i = self.hidden_size, self._intermediate()
        return {"attn_qkvw": (3 * h, h), "attn_qkvb": (3 * h,), "attn_ow": (h, h), "attn_ob": (h,), "attn_nw": (h,),
                "attn_nb": (h,), "inter_w": (i, h), "inter_b": (i,), "output_w": (h, i), "output_b": (h,), "norm_w": (h,),
                "norm_b": (h,)}

    def _stack_config(self, seq: int, training: bool) -> StackConfig:
        settings: Dict[str, Any] = {name: getattr(self, name) for name in (
            "batch_size", "hidden_size", "heads", "num_hidden_layers", "layer_norm_eps", "local_rank", "fp16",
            "pre_layer_norm", "adjust_init_range", "gelu", "initializer_range", "max_contexts")}
        settings.update(max_seq_length=seq, intermediate_size=self._intermediate(), training=training,
                        dtype=self.dtype, **self._live())
        # Stacks after the first draw other masks.
        settings["seed"] = self.seed if self.seed is None or self.seed < 0 else self.seed + self._stacks_made
        if self.causal:
            settings["causal"] = True
        return StackConfig.from_dict(settings)

    def _live(self) -> Dict[str, Any]:
        """What can change on a live stack, off where it is and always was off."""
        values = {name: getattr(self, name) for name in _LIVE}
        known = {f.name for f in dataclasses.fields(StackConfig)}
        return {name: value for name, value in values.items() if value or name in known}


@dataclasses.dataclass
class _Sent:
    """What the daemon holds of a parameter: the tensor's version and address then, and its values."""

    version: int
    address: int
    values: Optional[torch.Tensor]  # None: changes are told by version and address alone

    def is_still(self, parameter: torch.Tensor) -> bool:
        """Whether `parameter` is what was sent. Writes through `.data`, as many optimizers make them, leave the version
        as it is: hence the values."""
        if (self.version, self.address) != (parameter._version, parameter.data_ptr()):
            return False
        return self.values is None or (self.values.dtype == parameter.dtype and
                                       torch.equal(self.values, parameter.detach()))


def _delete(client: Client, name: str) -> None:
    try:
        client.delete_stack(name)
    except (LaminaError, ValueError):
        pass  # the daemon or the client is gone


class SharedStack:
    """The daemon's stack that the layers of one config share; each of them is a layer range of it.

    stack: the lamina.Stack. It is deleted with the last layer (or graph) that uses it. Threads: any; calls run one after
    another.
    """

    def __init__(self, client: Client, config: DeepSpeedTransformerConfig, seq: int, training: bool) -> None:
        name = config.stack_name or f"deepspeed-{uuid.uuid4().hex[:16]}"
        self.client = client
        self.stack: Stack = client.create_stack(name, config._stack_config(seq, training))
        weakref.finalize(self, _delete, client, name)
        self._remote = config.remote_optimizer
        self._live = config._live()
        self._training = training
        self._lock = threading.RLock()
        layers = self.stack.config.num_hidden_layers
        self._free: List[int] = list(range(layers))
        self._layers: List[Optional[weakref.ref[DeepSpeedTransformerLayer]]] = [None] * layers
        self._sent: List[Dict[str, _Sent]] = [{} for _ in range(layers)]
        self._generation = [0] * layers  # counts changes of the layer's weights in the daemon
        self._read: Set[int] = set()  # layers whose gradients there were fetched and not zeroed since
        self._newer: Set[int] = set()  # layers whose weights there are newer than here
        self._modules = [RemoteStack(self.stack, (i, i + 1)) for i in range(layers)]

    def __repr__(self) -> str:
        return f"<lamina.deepspeed.SharedStack of {self.stack!r}>"

    # --- what users call ---

    def apply_gradients(self, lr: float, zero_gradients: bool = True, **options: Any) -> Applied:
        """One optimizer step in the daemon, by the gradients of all backwards since the last; options as in
        Stack.apply_gradients. RuntimeError without config.remote_optimizer: the gradients are here then."""
        if not self._remote:
            raise RuntimeError("apply_gradients: config.remote_optimizer is off, so the gradients are the parameters' "
                               ".grad here: step with an optimizer of PyTorch's, or turn it on")
        with self._lock:
            for index, layer in self._placed():
                self._push(index, layer)
            outcome = self.stack.apply_gradients(lr, zero_gradients=zero_gradients, **options)
            if outcome.applied:
                self._newer.update(index for index, _ in self._placed())
                self._generation = [g + 1 for g in self._generation]
            return outcome

    def zero_gradients(self) -> None:
        """Zeroes the daemon's gradients."""
        with self._lock:
            self.stack.zero_gradients()
            self._read.clear()

    def pull(self) -> None:
        """Brings the layers' parameters here up to what the daemon holds. state_dict() does it by itself."""
        with self._lock:
            for index, layer in self._placed():
                self._pull(index, layer)

    # --- what layers call ---

    def _placed(self) -> Iterable[Tuple[int, DeepSpeedTransformerLayer]]:
        for index, reference in enumerate(self._layers):
            layer = reference() if reference is not None else None
            if layer is not None:
                yield index, layer

    def _give_back(self, index: int) -> None:
        with _placing:
            self._layers[index] = None
            self._sent[index].clear()
            self._newer.discard(index)
            self._free.append(index)
            self._free.sort()

    def _settle(self, config: DeepSpeedTransformerConfig, training: bool) -> None:
        """Lets the stack follow what changed in the config; takes the memory for training when it first trains."""
        changes: Dict[str, Any] = {}
        live = config._live()
        if live != self._live:
            changes = {name: value for name, value in live.items() if self._live.get(name, False) != value}
        if training and not self._training:
            changes["training"] = True
        if changes:
            self.stack.update(**changes)
            self._live = live
            self._training = self._training or training

    def _push(self, index: int, layer: DeepSpeedTransformerLayer) -> None:
        """Sends what changed of the layer's parameters since they were sent."""
        sent = self._sent[index]
        changed = {n: p for n, p in layer.named_parameters(recurse=False) if n not in sent or not sent[n].is_still(p)}
        if not changed:
            return
        if index in self._newer:
            raise RuntimeError(f"{', '.join(changed)} of layer {index} changed here while the daemon holds newer weights "
                               "(apply_gradients): call stack_of(model).pull() before changing them")
        values = {}
        for name, parameter in changed.items():
            sent.pop(name, None)  # if the call fails, nobody knows what the daemon holds
            local = parameter.detach().cpu()
            if local.dtype != torch.float16 or self.stack.dtype != "fp16":
                local = local.float()
            values[f"layers.{index}.{name}"] = local.contiguous().numpy()
        self._generation[index] += 1
        self.stack.set_parameters(values)
        for name, parameter in changed.items():
            sent[name] = self._as_sent(parameter)

    def _as_sent(self, parameter: torch.Tensor) -> _Sent:
        values = None if self._remote else parameter.detach().clone()
        return _Sent(parameter._version, parameter.data_ptr(), values)

    def _pull(self, index: int, layer: DeepSpeedTransformerLayer) -> None:
        if index not in self._newer:
            return
        values = self.stack.parameters([f"layers.{index}.{name}" for name in _NAMES])
        with torch.no_grad():
            for name in _NAMES:
                parameter = getattr(layer, name)
                parameter.copy_(torch.from_numpy(values[f"layers.{index}.{name}"]))
                self._sent[index][name] = self._as_sent(parameter)
        self._newer.discard(index)

    def _forward(self, index: int, layer: DeepSpeedTransformerLayer, x: torch.Tensor, training: bool,
                 attention: Dict[str, np.ndarray]) -> Tuple[torch.Tensor, Optional[Context], int]:
        with self._lock:
            self._settle(layer.config, training)
            self._push(index, layer)
            y, context = self._modules[index]._run(x, training=training, **attention)
            return y, context, self._generation[index]

    def _backward(self, index: int, generation: int, context: Context, dy: torch.Tensor, input_grad: bool,
                  names: Sequence[str]) -> Tuple[Optional[torch.Tensor], Dict[str, torch.Tensor]]:
        """(dx, {name: float32 gradient})."""
        with self._lock:
            if generation != self._generation[index]:
                raise RuntimeError(f"backward: the weights of layer {index} were changed after this forward: its gradients "
                                   "would be of other weights")
            if not self._remote:
                if index in self._read:
                    self.stack.zero_gradients()
                    self._read.clear()
                self._read.add(index)
            dx = self.stack.backward(context, self._modules[index]._passed(dy), input_grad=input_grad)
            gradients: Dict[str, np.ndarray] = {}
            if names:
                gradients = self.stack.gradients([f"layers.{index}.{name}" for name in names])
        found = {name: torch.from_numpy(gradients[f"layers.{index}.{name}"]) for name in names}
        return (_as_given(dx, dy) if dx is not None else None), found


class _Place:
    """Layer `index` of a SharedStack, held by one layer."""

    def __init__(self, layer: DeepSpeedTransformerLayer, shared: SharedStack, index: int) -> None:
        self.shared = shared
        self.index = index
        shared._free.remove(index)
        shared._layers[index] = weakref.ref(layer)
        self._finalizer = weakref.finalize(layer, shared._give_back, index)
        self._finalizer.atexit = False

    def give_back(self) -> None:
        self._finalizer()


def _place(layer: DeepSpeedTransformerLayer, seq: Optional[int], training: bool) -> _Place:
    """The layer's place in a stack with room for `seq`; makes the stack where there is none. seq None: any."""
    config = layer.config
    with _placing:
        if layer._place is not None:
            held = layer._place.shared.stack.config.max_seq_length
            if seq is None or seq <= held or config.max_seq_length:
                return layer._place  # the daemon refuses what is too long
        config._check()
        if config.max_seq_length:
            room = config.max_seq_length
        elif seq is not None:
            room = -(-seq // _SEQ_STEP) * _SEQ_STEP
        else:
            raise ValueError("stack_of: config.max_seq_length is not set and no layer was called yet: how long a sequence "
                             "is the stack for?")
        client = _default_client()
        live = [shared for shared in (reference() for reference in config._stacks) if shared is not None]
        fit = [s for s in live if s._free and s.client is client and s.stack.config.max_seq_length >= room]
        wanted = layer._wanted_index
        shared = next((s for s in fit if wanted in s._free), fit[0] if fit else None)
        if shared is None:
            shared = SharedStack(client, config, room, training)
            config._stacks_made += 1
            config._stacks = [weakref.ref(s) for s in [*live, shared]]
        if layer._place is not None:
            layer._place.give_back()
        index = wanted if wanted is not None and wanted in shared._free else shared._free[0]
        layer._place = _Place(layer, shared, index)
        return layer._place


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: Optional[torch.Tensor], layer: DeepSpeedTransformerLayer, place: _Place,
                attention: Dict[str, np.ndarray], *parameters: torch.Tensor) -> torch.Tensor:
        y, ctx.context, ctx.generation = place.shared._forward(place.index, layer, x, True, attention)
        ctx.shared, ctx.index = place.shared, place.index
        ctx.kinds = [(p.dtype, p.device) for p in parameters]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if ctx.context is None:
            raise RuntimeError("DeepSpeedTransformerLayer: backward was run a second time; the daemon spent the "
                               "activations in the first")
        context, ctx.context = ctx.context, None
        wanted = [name for name, needed in zip(_NAMES, ctx.needs_input_grad[5:]) if needed]
        dx, found = ctx.shared._backward(ctx.index, ctx.generation, context, dy, ctx.needs_input_grad[0], wanted)
        gradients = [found[name].to(device, dtype) if name in found else None
                     for name, (dtype, device) in zip(_NAMES, ctx.kinds)]
        return (dx, None, None, None, None, *gradients)


class DeepSpeedTransformerLayer(nn.Module):
    """One BERT layer, as DeepSpeed's: [B, S, H] -> [B, S, H], trained by any optimizer over its parameters.

    Layer(config), Layer(i, config) as the tutorial has it, and either with initial_weights and initial_biases: the lists
    [query, key, value, attention output, attention norm, inner, output, norm] of each, whose values are copied; biases of
    query, key and value may be None. i says which layer of the stack it is to be; without it, layers take theirs in the
    order of their first calls.

    The parameters bear DeepSpeed's names. They are ordinary ones of this process; what changed of them goes to the daemon
    before the next forward, and their gradients come back with each backward. A copy (copy.deepcopy) is a layer of its
    own, of the same config. See stack_of for weights that stay in the daemon.

    >>> config = DeepSpeedTransformerConfig(batch_size=2, max_seq_length=8, hidden_size=16, heads=2, num_hidden_layers=2,
    ...                                     attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1, initializer_range=0.02)
    >>> layers = nn.ModuleList([DeepSpeedTransformerLayer(i, config) for i in range(config.num_hidden_layers)])
    >>> optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    >>> hidden_states, attention_mask = torch.randn(2, 8, 16), torch.zeros(2, 1, 1, 8)
    >>> for layer in layers:
    ...     hidden_states = layer(hidden_states, attention_mask)
    >>> hidden_states.square().mean().backward()
    >>> optimizer.step()
    >>> layers[1].layer_range, layers[1].attn_qkvw.grad.shape
    ((1, 2), torch.Size([48, 16]))
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()
        index, config, weights, biases = _arguments(*arguments, **named)
        config._check()
        if index is not None and not 0 <= index < config.num_hidden_layers:
            raise ValueError(f"layer_id: {index} must be in 0..{config.num_hidden_layers - 1}")
        config.layer_id = config._layers_made if index is None else index
        config._layers_made += 1
        self.config = config
        self._wanted_index = index
        self._place: Optional[_Place] = None
        self._anchor = torch.zeros((), requires_grad=True) if config.remote_optimizer else None
        given = {} if weights is None else _initial(config, weights, biases)
        for name, shape in config._shapes().items():
            value = given.get(name)
            values = torch.empty(shape) if value is None else value.detach().clone()
            self.register_parameter(name, nn.Parameter(values, requires_grad=not config.remote_optimizer))
        if weights is None:
            self.init_transformer_weights(config.adjust_init_range)
        if not config.training:
            self.eval()

    def init_transformer_weights(self, adjust_init_range: bool = False) -> None:
        """Draws all weights anew from PyTorch's generator."""
        deviation = self.config.initializer_range
        output = deviation / math.sqrt(2.0 * self.config.num_hidden_layers) if adjust_init_range else deviation
        with torch.no_grad():
            for name in _NAMES:
                parameter = getattr(self, name)
                if parameter.dim() == 2:
                    parameter.normal_(mean=0.0, std=output if name in ("attn_ow", "output_w") else deviation)
                else:
                    parameter.fill_(1.0 if name in ("attn_nw", "norm_w") else 0.0)

    @property
    def stack(self) -> Optional[Stack]:
        """The daemon's stack that this layer is a part of; None before the first call."""
        return self._place.shared.stack if self._place is not None else None

    @property
    def layer_range(self) -> Optional[Tuple[int, int]]:
        """Which layers [begin, end) of it this one is; None before the first call."""
        return (self._place.index, self._place.index + 1) if self._place is not None else None

    @_not_compiled
    def forward(self, hidden_states: torch.Tensor, attention_mask: Optional[torch.Tensor] = None, head_mask: Any = None,
                layer_head_mask: Any = None, encoder_hidden_states: Any = None, encoder_attention_mask: Any = None,
                past_key_value: Any = None, output_attentions: bool = False,
                grads: Any = None) -> Union[torch.Tensor, Tuple[torch.Tensor]]:
        """hidden_states [B, S, H]; attention_mask, additive and floating, [B, 1, 1, S] or [B, S] (B may be 1), None: all
        keys. The result has the type and device of hidden_states. No gradient goes to the mask. LaminaError;
        ValueError for arguments that DeepSpeed takes and ignores."""
        refused = dict(head_mask=head_mask, layer_head_mask=layer_head_mask, encoder_hidden_states=encoder_hidden_states,
                       encoder_attention_mask=encoder_attention_mask, past_key_value=past_key_value, grads=grads)
        ignored = [name for name, value in refused.items() if value is not None]
        if output_attentions:
            ignored.append("output_attentions")
        if ignored:
            raise ValueError(f"DeepSpeedTransformerLayer: {', '.join(ignored)}: not supported, must be left out")
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.config.hidden_size:
            raise ValueError(f"hidden_states: shape {list(hidden_states.shape)} must be [B, S, {self.config.hidden_size}]")
        batch, seq = hidden_states.shape[:2]
        attention = {} if attention_mask is None else {"mask": _mask(attention_mask, batch, seq)}
        self.config.training = self.training
        place = _place(self, seq, self.training)
        parameters = [getattr(self, name) for name in _NAMES]
        differentiable = torch.is_grad_enabled() and (self._anchor is not None or any(
            t.requires_grad for t in [hidden_states, *parameters]))
        if self.training and differentiable:
            output = _LayerFunction.apply(hidden_states, self._anchor, self, place, attention, *parameters)
        else:
            output, context, _ = place.shared._forward(place.index, self, hidden_states, self.training, attention)
            if context is not None:
                context.release()  # dropout was wanted, a backward is not
        return (output,) if self.config.return_tuple else output

    # --- copies and state ---

    def __deepcopy__(self, memo: Dict[int, Any]) -> DeepSpeedTransformerLayer:
        self._bring_up_to_date()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            twin.__dict__[name] = value if name == "config" else None if name == "_place" else copy.deepcopy(value, memo)
        twin.config._layers_made += 1
        return twin

    def __getstate__(self) -> Dict[str, Any]:
        self._bring_up_to_date()
        return {**self.__dict__, "_place": None}

    def _bring_up_to_date(self) -> None:
        if self._place is not None:
            with self._place.shared._lock:
                self._place.shared._pull(self._place.index, self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._bring_up_to_date()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any],
                              strict: bool, missing_keys: List[str], unexpected_keys: List[str],
                              error_msgs: List[str]) -> None:
        """All layers of one load_state_dict, or none: PyTorch itself copies what fits before it complains of the rest."""
        self._bring_up_to_date()
        model, whole, all_or_none = _running_load() or (None, None, False)
        missing, extra, wrong = self._differences(state_dict, prefix)
        refused = bool(error_msgs or wrong)
        if all_or_none:
            refused = refused or bool(missing_keys or unexpected_keys or missing or extra)
        if not refused and model is not None:
            for name, layer in model.named_modules():
                if isinstance(layer, DeepSpeedTransformerLayer):
                    found = layer._differences(whole, f"{name}." if name else "")
                    refused = refused or any(found if all_or_none else found[2:])
        if not refused:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                          error_msgs)
            return
        if strict:
            missing_keys += missing
            unexpected_keys += extra
        error_msgs += wrong

    def _differences(self, state_dict: Mapping[str, Any], prefix: str) -> Tuple[List[str], List[str], List[str]]:
        return _differences(state_dict, {name: tuple(p.shape) for name, p in self.named_parameters(recurse=False)}, prefix)

    def extra_repr(self) -> str:
        c = self.config
        where = f", layer {self._place.index} of {self.stack!r}" if self._place is not None else ""
        return f"H {c.hidden_size}, A {c.heads}, I {c._intermediate()}{where}"


def _running_load() -> Optional[Tuple[nn.Module, Mapping[str, Any], bool]]:
    """(model, state dict, strict) of the nn.Module.load_state_dict that is running: PyTorch tells the modules inside only
    their own part and nothing of `strict`. None where something else loads them."""
    code = nn.Module.load_state_dict.__code__
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            local = frame.f_locals
            if all(name in local for name in ("self", "state_dict", "strict")):
                return local["self"], local["state_dict"], bool(local["strict"])
        frame = frame.f_back
    return None


def _differences(state_dict: Mapping[str, Any], shapes: Mapping[str, Tuple[int, ...]],
                 prefix: str = "") -> Tuple[List[str], List[str], List[str]]:
    """(missing keys, extra keys under the prefix, sentences on entries of wrong shape or type)."""
    missing = [prefix + name for name in shapes if prefix + name not in state_dict]
    extra = [key for key in state_dict if key.startswith(prefix) and key[len(prefix):] not in shapes]
    wrong = []
    for name, shape in shapes.items():
        value = state_dict.get(prefix + name)
        if prefix + name not in state_dict:
            continue
        if not isinstance(value, torch.Tensor):
            wrong.append(f"{prefix + name}: a {type(value).__name__}, must be a tensor of shape {list(shape)}")
        elif tuple(value.shape) != shape:
            wrong.append(f"{prefix + name}: shape {list(value.shape)} must be {list(shape)}")
    return missing, extra, wrong


def load_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """model.load_state_dict(state_dict), all or nothing for every module of the model, also those that are no layers.

    RuntimeError listing every missing, extra and wrong-shaped tensor; nothing was loaded then.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    missing, extra, wrong = _differences(state_dict, shapes)
    complaints = [f"missing: {', '.join(missing)}"] if missing else []
    complaints += [f"extra: {', '.join(extra)}"] if extra else []
    if complaints or wrong:
        raise RuntimeError("load_state_dict: nothing was loaded:\n\t" + "\n\t".join(complaints + wrong))
    model.load_state_dict(state_dict)


def stack_of(model: nn.Module) -> SharedStack:
    """The stack that the model's layers share, made where no layer was called yet.

    With config.remote_optimizer=True it trains them without their weights and gradients leaving the daemon:

        loss.backward()
        stack_of(model).apply_gradients(lr=1e-4, weight_decay=0.01)   # and an optimizer for what is not in the daemon

    ValueError: the model has no layer, or its layers are parts of several stacks.
    """
    layers = [m for m in model.modules() if isinstance(m, DeepSpeedTransformerLayer)]
    if not layers:
        raise ValueError("stack_of: the model has no DeepSpeedTransformerLayer")
    stacks = {id(shared): shared for shared in (_place(layer, None, layer.training).shared for layer in layers)}
    if len(stacks) > 1:
        raise ValueError(f"stack_of: the model's layers are parts of {len(stacks)} stacks, because they were made from "
                         "several configs or are more than num_hidden_layers: ask for a part of the model")
    return next(iter(stacks.values()))


def _arguments(*arguments: Any, **named: Any) -> Tuple[Optional[int], DeepSpeedTransformerConfig, Any, Any]:
    """(layer id, config, weights, biases) of both forms."""
    index = named.pop("layer_id", None)
    if arguments and isinstance(arguments[0], int):
        index, *arguments = arguments

    def of(config: Any, initial_weights: Any = None, initial_biases: Any = None) -> Tuple[Any, Any, Any]:
        return config, initial_weights, initial_biases

    config, weights, biases = of(*arguments, **named)
    if not isinstance(config, DeepSpeedTransformerConfig):
        raise TypeError(f"config: a {type(config).__name__}, must be a DeepSpeedTransformerConfig")
    if (weights is None) != (biases is None):
        raise ValueError("give initial_weights and initial_biases, or neither")
    return index, config, weights, biases


def _initial(config: DeepSpeedTransformerConfig, weights: Sequence[Any], biases: Sequence[Any]) -> Dict[str, torch.Tensor]:
    """Parameters by name from DeepSpeed's two lists; ValueError listing what does not fit."""
    if len(weights) != 8 or len(biases) != 8:
        raise ValueError(f"initial_weights and initial_biases: {len(weights)} and {len(biases)} tensors, must be 8 and 8")
    h = config.hidden_size
    parts: List[Any] = [torch.zeros(h) if bias is None else bias for bias in biases[:3]]
    shapes = config._shapes()
    wrong = [f"initial_weights[{i}]: shape {list(w.shape)} must be {[h, h]}" for i, w in enumerate(weights[:3])
             if tuple(w.shape) != (h, h)]
    wrong += [f"initial_biases[{i}]: shape {list(b.shape)} must be {[h]}" for i, b in enumerate(parts)
              if tuple(b.shape) != (h,)]
    values = {}
    for i, names in enumerate((("attn_ow", "attn_ob"), ("attn_nw", "attn_nb"), ("inter_w", "inter_b"),
                               ("output_w", "output_b"), ("norm_w", "norm_b")), start=3):
        for which, name, given in (("weights", names[0], weights[i]), ("biases", names[1], biases[i])):
            values[name] = given
            if tuple(given.shape) != shapes[name]:
                wrong.append(f"initial_{which}[{i}]: shape {list(given.shape)} must be {list(shapes[name])}")
    if wrong:
        raise ValueError("; ".join(wrong))
    values["attn_qkvw"] = torch.cat([w.detach() for w in weights[:3]])
    values["attn_qkvb"] = torch.cat([b.detach() for b in parts])
    return values


def _mask(mask: torch.Tensor, batch: int, seq: int) -> np.ndarray:
    """DeepSpeed's mask as float32 [B, S]."""
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask: of {mask.dtype}, must be floating: it is added to the scores, 0 to keep a key "
                        "and -10000 to hide it")
    if tuple(mask.shape) not in ((batch, 1, 1, seq), (1, 1, 1, seq), (batch, seq), (1, seq)):
        raise ValueError(f"attention_mask: shape {list(mask.shape)} must be [{batch}, 1, 1, {seq}] or [{batch}, {seq}]")
    flat = mask.detach().to("cpu", torch.float32).reshape(-1, seq)
    return flat.expand(batch, seq).contiguous().numpy()
