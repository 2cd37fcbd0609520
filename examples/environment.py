"""What the examples need around them: a Python with their packages, and a daemon.

Standard library alone: `enter` runs before anything else can be imported.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
_ENTERED = "LAMINA_INTEROP_ENTERED"

# For PyTorch, which is imported after this: worker threads that spin between loops slow everything down where the
# machine is busy with other things.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def enter(*modules):
    """Goes on if these modules can be imported; else starts this program anew in build/interop's Python, which
    scripts/interop-environment makes. Exits saying what is missing where they aren't there either."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if not missing:
        return
    if os.environ.get(_ENTERED):
        sys.exit(f"{sys.argv[0]}: no module {', '.join(missing)} in {sys.executable}: run scripts/setup")
    made = subprocess.run([ROOT / "scripts/interop-environment"], stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        sys.exit(f"{sys.argv[0]}: scripts/interop-environment failed")
    python = made.stdout.strip().splitlines()[-1]
    os.environ[_ENTERED] = "1"
    os.execv(python, [python, *sys.argv])


def binary(name):
    """The built program: beside the one that LAMINAD names, else in build/release/bin."""
    folder = pathlib.Path(os.environ.get("LAMINAD", ROOT / "build/release/bin/laminad")).parent
    path = folder / name
    if not os.access(path, os.X_OK):
        sys.exit(f"{sys.argv[0]}: no {path}: run scripts/build release")
    return path


class OwnDaemon:
    """with OwnDaemon() as d: a laminad of this program's own, on a socket in a temporary folder.

    target: where it listens. It ends with the program.
    """

    def __init__(self, device="auto"):
        self._device = device

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="lamina-example-")
        folder = pathlib.Path(self._folder.name)
        self.target = f"unix:{folder}/laminad.sock"
        log = folder / "log"
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [binary("laminad"), "--listen", self.target, "--broker", f"{folder}/broker.sock", "--metrics", "127.0.0.1:0",
                 "--device", self._device], stdout=file, stderr=file)
        until = time.monotonic() + 60
        while not re.search("event=ready", log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > until:
                message = log.read_text(errors="replace")
                self.__exit__()
                sys.exit(f"{sys.argv[0]}: laminad did not start:\n{message}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()
