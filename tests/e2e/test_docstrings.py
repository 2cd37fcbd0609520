"""The examples in the Python client's docstrings and README, run as written against a daemon."""

import doctest
import importlib
import re

import lamina
import pytest
import torch
from daemon import ROOT


@pytest.mark.parametrize("module", ["lamina", "lamina.async_pipeline", "lamina.client", "lamina.config", "lamina.dtypes", "lamina.packing", "lamina.pipeline", "lamina.stack", "lamina.torch"])
def test_docstrings(daemon, monkeypatch, module):
    monkeypatch.setenv("LAMINA_TARGET", daemon.target)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


def test_the_clients_readme(daemon, client):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "client/python/README.md").read_text(), re.DOTALL)
    names = {}
    exec(first.replace("unix:/run/lamina/laminad.sock", daemon.target), names)
    assert names["dx"].shape == (8, 128, 256) and client.stack("demo").info().step == 1
    # The second goes on inside the first's `with`.
    names = {"stack": client.stack("demo"), "embeddings": torch.randn(2, 6, 256, requires_grad=True),
             "mask": torch.ones(2, 6), "head": lambda y: y.square().mean()}
    exec(second, names)
    assert names["embeddings"].grad.abs().max() > 0 and client.stack("demo").info().step == 2


def test_names_that_the_package_promises():
    assert all(getattr(lamina, name) for name in lamina.__all__)
