import os
import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "e2e"), str(HERE.parent / "support"), str(ROOT / "client/python")]

# As in examples/environment.py, before PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Workers of pytest-xdist divide the cores among them: what a worker starts, a daemon or an example, has as many threads as
# its worker has cores, and none waits for a core that another worker's threads hold.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
CORES = sorted(os.sched_getaffinity(0))
if 1 < WORKERS <= len(CORES):
    os.sched_setaffinity(0, CORES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))::WORKERS])

import lamina  # noqa: E402
import lamina.deepspeed  # noqa: E402
from daemon import Daemon  # noqa: E402

ON_GPU = os.environ.get("LAMINA_TEST_DEVICE", "cpu").startswith("cuda")


def pytest_collection_modifyitems(items):
    """The longest files first, for --dist loadfile: what is short comes where one worker has nothing left to do."""
    longest = ["test_minilm.py", "test_deepspeed.py", "test_examples.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


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
