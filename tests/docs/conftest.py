import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "e2e"), str(ROOT / "client/python")]

from daemon import Daemon  # noqa: E402


@pytest.fixture(scope="module")
def daemon():
    with Daemon() as d:
        yield d
