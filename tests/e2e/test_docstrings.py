"""The examples in the Python client's docstrings, run as written against a daemon."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["lamina", "lamina.client", "lamina.config", "lamina.dtypes", "lamina.stack", "lamina.torch"])
def test_examples_run(daemon, monkeypatch, module):
    monkeypatch.setenv("LAMINA_TARGET", daemon.target)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0
