import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "e2e"), str(HERE.parent / "support"), str(ROOT / "client/python")]

from daemon import Daemon  # noqa: E402
from programs import ready  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def environment():
    """No variable points a client at another daemon or transport than the test's."""
    names = ("LAMINA_TARGET", "LAMINA_TRANSPORT", "LAMINA_TLS", "LAMINA_TOKEN", "LAMINA_CLIENT")
    for name in [n for n in os.environ if n.startswith(names) or "proxy" in n.lower()]:
        del os.environ[name]


@pytest.fixture(scope="module")
def daemon():
    with Daemon() as d:
        yield d


@pytest.fixture(params=["python", "cpp", "go", "ruby"])
def program(request):
    """Each language's program in turn; skips where its toolchain is not installed."""
    return ready(request.param)


@pytest.fixture(params=["go", "ruby"])
def example(request):
    """The programs over the small libraries, for what tests/e2e tests of Python's client and tests/cpp_consumer of C++'s."""
    return ready(request.param)
