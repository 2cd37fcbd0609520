import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(ROOT / "client/python")]

import lamina  # noqa: E402
from daemon import Daemon  # noqa: E402
from raw import Raw  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out under sanitizers")


@pytest.fixture(scope="module")
def daemon():
    with Daemon() as d:
        yield d


@pytest.fixture
def client(daemon):
    with lamina.connect(daemon.target) as c:
        yield c
        for stack in c.stacks():
            c.delete_stack(stack.name)


@pytest.fixture
def raw(daemon):
    """Stubs without the client's help, for what a client of ours would never send."""
    r = Raw(daemon.target)
    yield r
    r.close()
