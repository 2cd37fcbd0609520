"""A client that trains while others die around it, and says what it computed.

    survivor.py TARGET KIND STACK [STEPS]

KIND: memfd (tensors in shared memory), inline (inside messages) or execute (several calls in flight on a Pipeline).
With STEPS it trains so many steps at full speed; else it takes its time and obeys lines of standard input: "pause" is
answered by "paused" once a step has ended, "go" goes on, "stop" ends it. Its last line is JSON: the digest of each
step's results (output, input gradient, gradient norm) and of the weights at the end. An error ends it with a traceback.
"""

import hashlib
import json
import queue
import sys
import threading
import time

import lamina
import numpy as np

SHAPE = (4, 16, 32)
CONFIG = dict(batch_size=SHAPE[0], max_seq_length=SHAPE[1], hidden_size=SHAPE[2], heads=4, num_hidden_layers=2,
              attn_dropout_ratio=0.1, hidden_dropout_ratio=0.1)
SEEDS = {"memfd": 3, "inline": 4, "execute": 5}
STEP_SECONDS = 0.03  # a step and the wait behind it, while others die


class Survivor:
    def __init__(self, client, kind, name):
        self.client, self.kind = client, kind
        self.stack = client.create_stack(name, seed=SEEDS[kind], **CONFIG)
        self.random = np.random.default_rng(SEEDS[kind])
        self.pipeline = client.pipeline() if kind == "execute" else None
        self.inputs = [client.empty(SHAPE, "fp32") for _ in range(2)]
        self.digests = []

    def step(self):
        digest = hashlib.sha256()
        for x in self.inputs:
            x[:] = self.random.standard_normal(SHAPE)
        grad_norm = self._in_flight(digest) if self.pipeline else self._in_turn(digest)
        digest.update(repr(grad_norm).encode())
        self.digests.append(digest.hexdigest()[:16])

    def _in_turn(self, digest):
        for x in self.inputs:
            y, context = self.stack.forward(x, training=True)
            dy = 2 * y / y.size
            dx = self.stack.backward(context, dy)
            digest.update(np.asarray(y).tobytes() + np.asarray(dx).tobytes())
        return self.stack.apply_gradients(lr=1e-3, zero_gradients=True).grad_norm

    def _in_flight(self, digest):
        p = self.pipeline
        forwards = [p.forward(self.stack, x, training=True) for x in self.inputs]
        backwards = []
        for forward in forwards:
            y, _ = forward.result()
            digest.update(np.asarray(y).tobytes())
            backwards.append(p.backward(self.stack, forward, 2 * y / y.size))
        applied = p.apply_gradients(self.stack, lr=1e-3, zero_gradients=True)
        for backward in backwards:
            digest.update(np.asarray(backward.result()).tobytes())
        return applied.result().grad_norm

    def result(self):
        if self.pipeline:
            self.pipeline.close()
        weights = hashlib.sha256()
        for name, values in sorted(self.stack.parameters().items()):
            weights.update(name.encode() + values.tobytes())
        self.client.delete_stack(self.stack.name)
        return {"steps": self.digests, "weights": weights.hexdigest()}


def obey(survivor):
    """Trains until it is told to stop."""
    orders = queue.Queue()

    def read():
        for line in sys.stdin:
            orders.put(line.strip())
        orders.put("stop")  # nobody is there any more

    threading.Thread(target=read, daemon=True).start()
    running = True
    while True:
        began = time.monotonic()
        if running:
            survivor.step()
        try:
            wait = max(0.0, STEP_SECONDS - (time.monotonic() - began))
            order = orders.get(timeout=wait if running else None)
        except queue.Empty:
            continue
        if order == "stop":
            return
        running = order == "go"
        if not running:
            print("paused", flush=True)


def main():
    target, kind, name = sys.argv[1:4]
    with lamina.connect(target, transport="inline" if kind == "inline" else "memfd", client_name="survivor") as client:
        survivor = Survivor(client, kind, name)
        if len(sys.argv) > 4:
            for _ in range(int(sys.argv[4])):
                survivor.step()
        else:
            survivor.step()
            print("ready", flush=True)
            obey(survivor)
        print(json.dumps(survivor.result()), flush=True)


if __name__ == "__main__":
    main()
