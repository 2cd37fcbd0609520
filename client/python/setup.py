"""Generates the message classes before packaging; everything else is in pyproject.toml."""

import pathlib
import shutil
import subprocess

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """Runs scripts/python-stubs of the source tree; an unpacked source archive carries them already."""

    def run(self):
        script = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "python-stubs"
        if script.exists() and shutil.which("bash"):
            subprocess.run([str(script)], check=True)
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
