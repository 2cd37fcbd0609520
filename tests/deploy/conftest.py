import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "e2e"), str(ROOT / "client/python"), str(ROOT / "deploy/checks")]

from daemon import BINARY  # noqa: E402

# Those run with build/deploy-tools' python, which has what they look at.
collect_ignore = [] if importlib.util.find_spec("helm_python") else ["checks"]


@pytest.fixture(scope="session")
def tools():
    """The folder of promtool, kubectl and the others."""
    room = subprocess.run([ROOT / "scripts/deploy-tools"], capture_output=True, text=True, check=True).stdout.strip()
    return pathlib.Path(room) / "bin"


@pytest.fixture(scope="session")
def lamina_cli():
    return pathlib.Path(BINARY).parent / "lamina"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LAMINA_") and name != "LAMINA_PYTHON"]:
        monkeypatch.delenv(name)
