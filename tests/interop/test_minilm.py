"""all-MiniLM-L6-v2 through the daemon: its hidden states, its ranking, its fine-tuning, by the examples that show them."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def python():
    """The interpreter with the model and its tokenizer."""
    made = subprocess.run([ROOT / "scripts/interop-environment"], check=True, stdout=subprocess.PIPE, text=True)
    return made.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def place(daemon):
    """What makes an example use the test's daemon."""
    return ["--target", daemon.target]


def example(python, name, *arguments, timeout=540):
    done = subprocess.run([python, ROOT / "examples" / name, *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_hidden_states_and_ranking_are_pytorchs(python, place):
    out = example(python, "minilm_parity.py", *place)
    print(out)
    difference = float(re.search(r"largest absolute difference of a token's hidden state: (\S+)", out).group(1))
    assert 0 < difference <= 1e-4
    assert "ranking of 50 pairs: the same" in out


def test_it_says_so_when_the_weights_are_others(python, place, tmp_path):
    """The example can fail: with one matrix of the daemon's stack disturbed it exits 1."""
    disturbed = tmp_path / "minilm_parity.py"
    source = (ROOT / "examples/minilm_parity.py").read_text()
    load = "remote = lamina.torch.RemoteStack(client.stack(name)).eval()"
    assert load in source
    disturbed.write_text(source.replace(
        load, load + "\n        w = remote.weights()['layers.3.inter_w']\n"
                     "        remote.load_weights({'layers.3.inter_w': w * 1.001})"))
    done = subprocess.run([python, disturbed, *place], stdout=subprocess.PIPE, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}/examples:{ROOT}/client/python"})
    assert done.returncode == 1
    assert float(re.search(r"hidden state: (\S+)", done.stdout).group(1)) > 1e-4


def test_fine_tuning_improves_as_in_pytorch(python, place, tmp_path):
    report = tmp_path / "report.json"
    print(example(python, "finetune_minilm.py", *place, "--train", 640, "--held-out", 400, "--report", report))
    found = json.loads(report.read_text())
    assert len(found["losses"]) == 20
    assert np.max(np.abs(np.array(found["losses"]) / np.array(found["peer_losses"]) - 1)) <= 1e-3
    assert found["after"] >= found["before"] + 0.02
    assert found["after"] == pytest.approx(found["peer_after"], abs=0.005)
