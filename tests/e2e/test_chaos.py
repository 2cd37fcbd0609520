"""scripts/chaos with few clients: nothing of those that died is left, and those that live noticed nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from daemon import BINARY, ON_CPU, ROOT

CHAOS = [sys.executable, str(ROOT / "tests/chaos/chaos.py")]
VICTIM = pathlib.Path(BINARY).parent / "lamina_victim"
pytestmark = pytest.mark.skipif(not ON_CPU, reason="its daemon and its bits are the CPU's")


@pytest.mark.slow
def test_nothing_is_left_of_clients_that_died(tmp_path):
    # So few clients can't tell a small leak of memory from what the allocator does; the thousand of scripts/chaos can.
    report = tmp_path / "report.json"
    ran = subprocess.run([*CHAOS, "--clients", "40", "--warm-up", "20", "--lease", "3", "--concurrency", "4", "--tolerance", "3", "--quiet",
                          "--json", str(report)], env={**os.environ, "LAMINA_VICTIM": str(VICTIM)}, capture_output=True,
                         text=True, timeout=250)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(report.read_text())
    assert told["wrong"] == [] and sum(told["endings"].values()) == 60
    assert len(told["endings"]) == 6, "every way to end is there"
    assert len(told["last_phase"]) >= 6 and min(told["survivor_steps"].values()) >= 10, told


def test_a_mistake_on_the_command_line_is_told_apart():
    ran = subprocess.run([*CHAOS, "--clients", "0"], capture_output=True, text=True)
    assert ran.returncode == 2 and "0 must be at least 1" in ran.stderr
    ran = subprocess.run([*CHAOS, "--target", "localhost:1"], env={**os.environ, "LAMINA_VICTIM": str(VICTIM)},
                         capture_output=True, text=True)
    assert ran.returncode == 2 and "must be unix:PATH" in ran.stderr
