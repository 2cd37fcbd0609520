#!/usr/bin/python3
"""Makes a small stack, trains it for a few steps and prints one loss a step: the mean of y squared.

The programs of the other languages do the same sums in the same order and print the same losses to the last bit.
"""

import argparse
import contextlib
import os
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import lamina  # noqa: E402
from lamina.client import default_target  # noqa: E402

SHAPE = BATCH, SEQUENCE, HIDDEN = 4, 16, 32


def train(target, transport, steps):
    with lamina.connect(target, transport, client_name="train-python") as client:
        print(f"transport: {client.transport}", flush=True)
        stack = client.create_stack(
            f"train-python-{os.getpid()}", batch_size=BATCH, max_seq_length=SEQUENCE, hidden_size=HIDDEN, heads=4,
            num_hidden_layers=2, attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1, seed=1)
        try:
            run_steps(client, stack, steps)
        finally:
            # It would outlive this program. An error that brought us here says more than one of this call.
            with contextlib.suppress(lamina.LaminaError):
                client.delete_stack(stack.name)


def run_steps(client, stack, steps):
    x = client.empty(SHAPE)  # in memory that the daemon maps too
    x.ravel()[:] = [(i * 37 % 101 - 50) / 64 for i in range(x.size)]  # exact in fp32
    for step in range(steps):
        y, context = stack.forward(x, training=True)
        total = 0.0
        for v in y.ravel().tolist():  # not sum(), which compensates for rounding since Python 3.12: the others don't
            total += v * v
        print(f"step {step}  loss {total / y.size:.17g}", flush=True)
        stack.backward(context, 2 * y / y.size, input_grad=False)
        stack.apply_gradients(lr=1e-2, zero_gradients=True)


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default=default_target(), help="the daemon: unix:PATH or HOST:PORT (default: %(default)s)")
    parser.add_argument("--transport", choices=["auto", "memfd", "inline"], default="auto")
    parser.add_argument("--steps", type=positive, default=10, help="steps to train, 1 or more (default: 10)")
    options = parser.parse_args()
    try:
        train(options.target, None if options.transport == "auto" else options.transport, options.steps)
    except lamina.LaminaError as error:
        sys.exit(f"train.py: {options.target}: {error}")


if __name__ == "__main__":
    main()
