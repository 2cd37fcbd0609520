"""Generates the message classes before packaging; everything else is in pyproject.toml."""

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "scripts" / "python-stubs"

# The package that the classes go into must exist before setuptools looks for it.
(HERE / "lamina/v1").mkdir(exist_ok=True)
(HERE / "lamina/v1/__init__.py").touch()


class BuildWithStubs(build_py):
    """Runs scripts/python-stubs of the source tree; a folder without that tree must carry the classes already."""

    def run(self):
        if SCRIPT.exists():
            subprocess.run(["bash", str(SCRIPT)], check=True, env={**os.environ, "LAMINA_PYTHON": sys.executable})
        elif not (HERE / "lamina/v1/tensor_pb2.py").exists():
            raise SystemExit("lamina/v1 is empty and scripts/python-stubs is not there: install from a whole source tree")
        super().run()


def generator():
    """What the build needs besides: nothing where protoc and its plugin are installed. What older generators write runs
    on newer grpcio and protobuf, not the other way round."""
    if shutil.which("protoc") and shutil.which("grpc_python_plugin"):
        return []
    return ["grpcio-tools==1.62.3; python_version < '3.13'", "grpcio-tools; python_version >= '3.13'"]


setup(license="Apache-2.0", cmdclass={"build_py": BuildWithStubs}, setup_requires=generator())
