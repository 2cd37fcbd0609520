"""The examples that need no model's weights: they run, learn and exit as they say. Their text is Debian's bible-kjv."""

import json
import os
import re
import subprocess
import sys

import lamina
import numpy as np
import pytest
from conftest import ROOT



def run(name, *arguments, target=None):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}/client/python"}
    if target:
        environment["LAMINA_TARGET"] = target
    return subprocess.run([sys.executable, ROOT / "examples" / name, *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=540, env=environment)


FLAGS = ["--attn_dropout_checkpoint", "--normalize_invertible", "--gelu_checkpoint"]


@pytest.mark.parametrize("more", [[], ["--fp16"], FLAGS], ids=["plain", "fp16", "memory flags"])
def test_the_tutorials_code_learns(daemon, more):
    done = run("deepspeed_tutorial.py", "--steps", 60, *more, target=daemon.target)
    assert done.returncode == 0, done.stdout
    first, last = map(float, re.search(r"masked words: (\S+) in the first ten steps, (\S+) in", done.stdout).groups())
    assert last < 0.9 * first
    with lamina.connect(daemon.target) as client:
        assert not client.stacks()  # the layers' stack ended with them


def test_the_tutorials_import_is_the_only_thing_of_ours_in_it():
    source = (ROOT / "examples/deepspeed_tutorial.py").read_text()
    assert re.findall(r"^.*\blamina\b.*import.*$", source, re.MULTILINE) == [
        "from lamina.deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer  # noqa: E402"]
    code = source.split('"""', 2)[2]
    assert "lamina." not in code.replace("from lamina.deepspeed import", "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_pretraining_learns(daemon, tmp_path, dtype):
    report = tmp_path / "report.json"
    done = run("pretrain.py", "--target", daemon.target, "--steps", 60, "--accumulate", 2, "--dtype", dtype, "--below", 1.15,
               "--report", report)
    assert done.returncode == 0, done.stdout
    found = json.loads(report.read_text())
    assert found["dtype"] == dtype and found["skipped"] <= 10
    assert np.mean(found["losses"][-5:]) < 0.8 * found["losses"][0]
    with lamina.connect(daemon.target) as client:
        assert not client.stacks()


def test_pretraining_exits_1_where_nothing_was_learnt(daemon):
    done = run("pretrain.py", "--target", daemon.target, "--steps", 3, "--hidden", 64, "--lr", 0.0)
    assert done.returncode == 1, done.stdout


def test_no_daemon_is_said():
    done = run("deepspeed_tutorial.py", target="unix:/nonexistent/socket")
    assert done.returncode != 0 and "Unavailable" in done.stdout
