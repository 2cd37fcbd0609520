"""A stack's settings, under the names of DeepSpeed's transformer config."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Dict, Mapping, Optional, Union

from lamina import dtypes
from lamina.v1 import config_service_pb2 as pb

_GELU = {"erf": pb.GELU_ERF, "tanh": pb.GELU_TANH}


@dataclasses.dataclass
class StackConfig:
    """What a stack is. None means the daemon's default; Stack.config shows what that became.

    batch_size, max_seq_length: the largest B and S of a call. hidden_size H is divisible by heads A;
    intermediate_size I defaults to 4 H. Ratios are in [0, 1). seed -1: the daemon draws one. dtype: "fp32",
    "bf16" or "fp16". gelu: "erf" (BERT's) or "tanh" (DeepSpeed's). max_contexts: how many training Forwards at
    full size may wait for their Backward. The daemon checks the values and names the one that is wrong.

    Memory flags keep less for Backward, which computes it again: normalize_invertible (not the norms' inputs; forward
    raises FailedPrecondition once a gamma is too small to divide by), gelu_checkpoint (not the GELU's output),
    attn_dropout_checkpoint (no effect: fused attention keeps nothing of it anyway), activation_checkpointing (nothing
    but each layer's input). stochastic_mode: sums over tokens may be added in any order. causal: token s attends to
    tokens 0..s alone. dynamic_loss_scale: the daemon finds the scale; multiply each loss by Stack.loss_scale. It begins
    at initial_loss_scale, is multiplied by loss_scale_growth_factor after loss_scale_growth_interval clean steps and by
    loss_scale_backoff_factor after loss_scale_hysteresis overflows, and never falls below min_loss_scale.

    >>> bert_base = StackConfig(batch_size=8, max_seq_length=128, hidden_size=768, heads=12, num_hidden_layers=12,
    ...                         attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1, pre_layer_norm=False, dtype="bf16")
    >>> StackConfig.from_dict(bert_base.to_dict()) == bert_base
    True
    """

    batch_size: int = 0
    max_seq_length: int = 0
    hidden_size: int = 0
    heads: int = 0
    num_hidden_layers: int = 0
    intermediate_size: Optional[int] = None
    attn_dropout_ratio: float = 0.0
    hidden_dropout_ratio: float = 0.0
    initializer_range: Optional[float] = None
    layer_norm_eps: Optional[float] = None
    local_rank: Optional[int] = None
    seed: Optional[int] = None
    fp16: bool = False
    pre_layer_norm: Optional[bool] = None
    normalize_invertible: bool = False
    gelu_checkpoint: bool = False
    attn_dropout_checkpoint: bool = False
    stochastic_mode: bool = False
    adjust_init_range: Optional[bool] = None
    training: Optional[bool] = None
    dtype: Optional[str] = None
    gelu: Optional[str] = None
    max_contexts: Optional[int] = None
    activation_checkpointing: bool = False
    causal: bool = False
    dynamic_loss_scale: bool = False
    initial_loss_scale: Optional[float] = None
    loss_scale_growth_interval: Optional[int] = None
    loss_scale_growth_factor: Optional[float] = None
    loss_scale_backoff_factor: Optional[float] = None
    loss_scale_hysteresis: Optional[int] = None
    min_loss_scale: Optional[float] = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StackConfig:
        """From a mapping with these names; TypeError names the ones that are none."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise TypeError(f"StackConfig has no {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: Union[str, os.PathLike]) -> StackConfig:
        """From a file holding a JSON object with these names."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))

    def to_dict(self) -> Dict[str, Any]:
        """All settings by name."""
        return dataclasses.asdict(self)

    def to_proto(self) -> pb.StackConfig:
        """The message; TypeError or ValueError names the setting that it can't hold."""
        message = pb.StackConfig()
        for name, value in self.to_dict().items():
            if value is None:
                continue
            if name == "dtype":
                value = dtypes.to_proto(value)
            elif name == "gelu":
                if value not in _GELU:
                    raise ValueError(f"gelu: {value!r} must be one of {', '.join(_GELU)}")
                value = _GELU[value]
            try:
                setattr(message, name, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {value!r}: {error}") from None
        return message

    @classmethod
    def from_proto(cls, message: pb.StackConfig) -> StackConfig:
        """From the daemon's answer, where every default is filled in."""
        values = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        values["dtype"] = dtypes.from_proto(message.dtype)
        values["gelu"] = {number: name for name, number in _GELU.items()}[message.gelu]
        return cls(**values)
