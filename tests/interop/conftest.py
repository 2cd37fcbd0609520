import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "e2e"), str(HERE.parent / "support"), str(ROOT / "client/python")]

# As in examples/environment.py, before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import lamina  # noqa: E402
import lamina.deepspeed  # noqa: E402
from daemon import Daemon  # noqa: E402

ON_GPU = os.environ.get("LAMINA_TEST_DEVICE", "cpu").startswith("cuda")


@pytest.fixture(scope="session")
def daemon():
    with Daemon() as d:
        yield d


@pytest.fixture
def client(daemon):
    """Also the one that layers of lamina.deepspeed use."""
    with lamina.connect(daemon.target) as c:
        lamina.deepspeed.use(c)
        yield c
        lamina.deepspeed.use(None)
        for stack in c.stacks():
            c.delete_stack(stack.name)
