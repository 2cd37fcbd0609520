"""A real laminad for a test: started on a socket of its own, stopped with the test."""

import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = os.environ.get("LAMINAD", str(ROOT / "build/release/bin/laminad"))
ON_CPU = os.environ.get("LAMINA_TEST_DEVICE", "cpu") == "cpu"
START_SECONDS = 60  # a sanitizer's build on a busy machine


def wait_until(condition, seconds=30):
    """Returns once condition() holds; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Daemon:
    """with Daemon(device="cpu") as d: lamina.connect(d.target). More arguments go to laminad as they are.

    target: its Unix socket; tcp: its TCP address; folder: sockets, log and checkpoints (checkpoints=False: none are
    kept). broker: the path of its broker socket, or "none". The log is kept in `log()` after the end.
    """

    def __init__(self, *arguments, device=None, checkpoints=None, broker=None):
        self.device = device or os.environ.get("LAMINA_TEST_DEVICE", "cpu")
        self.arguments = list(arguments)
        self._folder = tempfile.TemporaryDirectory(prefix="lamina-e2e-")
        self.folder = pathlib.Path(self._folder.name)
        self.broker = broker or f"{self.folder}/broker.sock"
        if checkpoints is not False:
            self.checkpoints = pathlib.Path(checkpoints or self.folder / "checkpoints")
            self.checkpoints.mkdir(exist_ok=True)
            self.arguments += ["--checkpoints", str(self.checkpoints)]
        self.target = f"unix:{self.folder}/laminad.sock"
        self.process = None

    def start(self):
        self._log_file = open(self.folder / "log", "ab")
        self._log_start = self._log_file.tell()
        self.process = subprocess.Popen(
            [BINARY, "--listen", self.target, "--listen", "127.0.0.1:0", "--broker", self.broker,
             "--metrics", "127.0.0.1:0", "--device", self.device, *self.arguments],
            # Worker threads that spin between loops slow everything down where the machine is busy with other things.
            env={"OMP_WAIT_POLICY": "passive", **os.environ}, stderr=self._log_file, stdout=self._log_file)
        deadline = time.monotonic() + START_SECONDS
        while "event=ready" not in self.log():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"laminad did not start:\n{self.log()}")
            time.sleep(0.02)
        ready = re.findall(r"event=ready .*", self.log())[-1]
        self.tcp = re.search(r"listen=\S*,(127\.0\.0\.1:\d+)", ready).group(1)
        self.metrics_address = re.search(r'metrics=([^\s"]+)', ready).group(1)
        return self

    def log(self):
        return (self.folder / "log").read_text(errors="replace")[self._log_start :]

    def metrics(self):
        """{series as written: value} of /metrics."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line and line[0] != "#"}

    def stop(self, timeout=60):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        try:
            if self.process.poll() is None:
                code = self.stop()
                if kind is None and code != 0:
                    raise AssertionError(f"laminad exited with {code}:\n{self.log()}")
            # A sanitizer's finding fails the test that met it.
            if kind is None and ("Sanitizer" in self.log() or "runtime error:" in self.log()):
                raise AssertionError(f"laminad's sanitizer complained:\n{self.log()[-6000:]}")
        finally:
            self.kill()
            self._log_file.close()
            self._folder.cleanup()
