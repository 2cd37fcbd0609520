"""Our side without a daemon (stack_bench, a stack in a process of its own), round trips to one, and what a benchmark notes of
its run."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE_NAMES = ["batch", "seq", "hidden", "heads", "intermediate", "layers"]
FLAGS = ["normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint", "activation_checkpointing", "stochastic_mode"]


def shape(text, names=SHAPE_NAMES):
    """A stack's shape of text such as "64,128,1024,16,4096,24", or another's; ValueError."""
    values = [int(v) for v in text.split(",")]
    if len(values) != len(names):
        raise ValueError(text)
    return dict(zip(names, values))


def shapes(text, names=SHAPE_NAMES):
    """Several, with semicolons between them."""
    return [shape(one, names) for one in text.split(";") if one]


def list_of(*allowed):
    """An argument's type: words with commas between them, "none" for none."""
    def parse(text):
        values = [] if text == "none" else text.split(",")
        if allowed and set(values) - set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(allowed)}")
        return values
    return parse


def find_binary(name, device):
    """In a bundle, or in the build that has this device."""
    presets = ["release", "cuda-release"] if device == "cpu" else ["cuda-release", "release"]
    places = [ROOT / "bin" / name, *(ROOT / f"build/{preset}/bin/{name}" for preset in presets)]
    found = [place for place in places if place.exists()]
    if not found:
        sys.exit(f"no {name}; build it with scripts/build, or name it")
    return found[0]


def measure_round_trips(binary, target, *arguments):
    """What a round_trip says of a daemon."""
    done = subprocess.run([binary, "--target", target, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout)


class Ours:
    """A stack_bench and its commands. `environment`: variables that it has besides."""

    def __init__(self, binary, device, environment=None):
        self.arguments = [binary, "--device", device]
        self.environment = {**os.environ, **(environment or {})}
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=self.environment)
        self.hello = self._answer()

    def restart(self):
        self.process.kill()
        self.process.wait()
        self.start()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"stack_bench ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def command(self, *words):
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def create(self, row):
        self.command("create", json.dumps({
            "batch_size": row["batch"], "max_seq_length": row["seq"], "hidden_size": row["hidden"], "heads": row["heads"],
            "intermediate_size": row["intermediate"], "num_hidden_layers": row["layers"], "dtype": row["dtype"],
            "pre_layer_norm": row["pre_layer_norm"], "attn_dropout_ratio": row["dropout"],
            "hidden_dropout_ratio": row["dropout"], "seed": 1, "max_contexts": 1, **{flag: True for flag in row["flags"]}}))
        self.peak_bytes = self.command("plan")["bytes"]
        return self

    def run(self, steps, *lengths):
        """`lengths`: none, or "padded", "packed" or "filled", the shortest, the longest and a seed."""
        return self.command("run", str(steps), *map(str, lengths))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def driver(uuid):
    if not uuid:
        return None
    query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit():
    noted = ROOT / "commit"  # a bundle's
    if noted.exists():
        return noted.read_text().strip()
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or None
