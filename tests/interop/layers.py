"""Layers of lamina.deepspeed as the tests make and call them."""

import copy

from lamina.deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
from torch import nn


def config_of(**changes):
    settings = dict(batch_size=4, max_seq_length=32, hidden_size=32, heads=4, num_hidden_layers=3, attn_dropout_ratio=0.0,
                    hidden_dropout_ratio=0.0, initializer_range=0.02)
    return DeepSpeedTransformerConfig(**{**settings, **changes})


def layers_of(config):
    """As DeepSpeed's tutorial makes them."""
    return nn.ModuleList([copy.deepcopy(DeepSpeedTransformerLayer(i, config)) for i in range(config.num_hidden_layers)])


def run(layers, x, mask=None):
    for layer in layers:
        x = layer(x, mask)
    return x
