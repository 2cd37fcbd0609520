"""Each language's training program: made ready once, run with flags."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

import pytest
from daemon import BINARY, ROOT


def need(language, *tools):
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {language} toolchain here: {', '.join(missing)} missing (scripts/setup tests installs it)")


def run(*words, **options):
    """What a command that must work printed."""
    done = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


class Run:
    """A program under way, or ended: then code is its exit code. out, err: what it has said so far."""

    def __init__(self, command):
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._out, stderr=self._err)

    @staticmethod
    def _read(file):
        # The program writes at the file's one position: a seek here would move that too.
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()

    @property
    def out(self):
        return self._read(self._out)

    @property
    def err(self):
        return self._read(self._err)

    @property
    def code(self):
        return self.process.poll()

    def __repr__(self):
        return f"exit code {self.code}\n{self.out[-2000:]}{self.err}"

    @property
    def transport(self):
        return re.match(r"transport: (.*)", self.out)[1]

    @property
    def losses(self):
        """A float a step."""
        whole, _, _ = self.out.rpartition("\n")  # the last line may be on its way
        parsed = [re.fullmatch(r"step (\d+)  loss (\S+)", line) for line in whole.splitlines()[1:]]
        assert all(parsed) and [int(p[1]) for p in parsed] == list(range(len(parsed))), self
        return [float(p[2]) for p in parsed]

    def finish(self, seconds=120):
        """Waits for its end; one that goes on for longer is killed and a failure."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: {self}") from None
        return self

    def kill(self):
        self.process.kill()
        self.process.wait()


class Program:
    """A training program, made ready to be run. command: how."""

    def __init__(self, command):
        self._command = command

    def run(self, *flags):
        return Run([*self._command, *flags]).finish()

    def train_on(self, *flags):
        """One that trains on and on, and has made its first step."""
        running = Run([*self._command, "--steps", "1000000", *flags])
        deadline = time.monotonic() + 60
        while "step 1 " not in running.out:
            assert running.code is None and time.monotonic() < deadline, running
            time.sleep(0.02)
        return running


@functools.lru_cache(None)
def ready(language):
    """The Program of "python", "cpp", "go" or "ruby". Skips the test where the language's toolchain is not installed."""
    if language == "python":
        run("scripts/python-stubs")
        return Program(["/usr/bin/python3", "client/python/examples/train.py"])
    if language == "cpp":  # built beside the daemon
        return Program([str(pathlib.Path(BINARY).parent / "lamina_example_losses")])
    if language == "go":
        need("Go", "go", "protoc-gen-go", "protoc-gen-go-grpc")
        run("scripts/go-client")
        return Program(["build/go/bin/train"])
    need("Ruby", "ruby", "grpc_tools_ruby_protoc")
    run("scripts/ruby-stubs")
    return Program(["ruby", "client/ruby/train.rb"])
