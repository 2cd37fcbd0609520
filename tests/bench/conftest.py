import importlib.machinery
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def script():
    """script(name): bench/name, which has no suffix, as a module."""
    def load(name):
        loader = importlib.machinery.SourceFileLoader(f"bench_{name}", str(ROOT / "bench" / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        loader.exec_module(module)
        return module
    return load
