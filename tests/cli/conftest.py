"""A real laminad and the real lamina for every test here.

LAMINAD and LAMINA_CLI name the binaries; build/release/bin's by default.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAMINAD = os.environ.get("LAMINAD", str(ROOT / "build/release/bin/laminad"))
LAMINA = os.environ.get("LAMINA_CLI", str(ROOT / "build/release/bin/lamina"))

# A small stack: every dimension differs, so that a swapped one shows.
CONFIG = {
    "batch_size": 3,
    "max_seq_length": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "heads": 4,
    "num_hidden_layers": 2,
    "seed": 7,
}


def clean_environment():
    """The environment without what would point commands at another daemon."""
    return {k: v for k, v in os.environ.items() if not k.startswith("LAMINA_") and "proxy" not in k.lower()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Daemon:
    """A laminad in a folder of its own (a short path: Unix sockets allow 107 bytes)."""

    def __init__(self, *flags, checkpoints=True, broker=None, metrics=True):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="lam-"))
        self.socket = self.folder / "d.sock"
        self.target = f"unix:{self.socket}"
        self.tcp = f"127.0.0.1:{free_port()}"
        self.metrics_address = f"127.0.0.1:{free_port()}"
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir()
        self.log_path = self.folder / "log"
        command = [LAMINAD, "--listen", self.target, "--listen", self.tcp, "--device", "cpu",
                   "--broker", broker or str(self.folder / "b.sock"), *flags]
        if metrics:
            command += ["--metrics", self.metrics_address]
        if checkpoints:
            command += ["--checkpoints", str(self.checkpoints)]
        with open(self.log_path, "wb") as log:
            # Worker threads that spin between loops slow everything down where the machine is busy with other things.
            self.process = subprocess.Popen(command, stdout=log, stderr=log,
                                            env={"OMP_WAIT_POLICY": "passive"} | clean_environment())
        self.wait_until_serving()

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_until_serving(self, seconds=30):
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise RuntimeError(f"laminad ended with {self.process.returncode}:\n{self.log()}")
            if self.cli("health").returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError(f"laminad did not serve within {seconds} s:\n{self.log()}")

    def cli(self, *arguments, target=None, env=None, timeout=120):
        environment = clean_environment() | {"LAMINA_TARGET": target or self.target} | (env or {})
        return subprocess.run([LAMINA, *map(str, arguments)], env=environment, capture_output=True, text=True,
                              timeout=timeout)

    def json(self, *arguments, **options):
        """What a command that must work printed as JSON."""
        done = self.cli("--output", "json", *arguments, **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(done.stdout)

    def error(self, *arguments, code, **options):
        """The JSON error of a command that must fail with that exit code."""
        done = self.cli("--output", "json", *arguments, **options)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert done.stdout == ""
        error = json.loads(done.stderr)["error"]
        assert error["exit_code"] == code
        return error

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def daemon():
    running = Daemon()
    yield running
    running.stop()
    assert running.process.returncode == 0


@pytest.fixture
def config_file(tmp_path):
    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(CONFIG | changes))
        return path

    return write


@pytest.fixture
def stack(daemon, config_file):
    """A fresh stack's name."""
    name = f"s{time.monotonic_ns()}"
    daemon.json("stack", "create", name, "--config", config_file())
    yield name
    daemon.cli("stack", "delete", name)
