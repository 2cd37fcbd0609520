"""The Python package as pip installs it, used from outside of the source tree."""

import os
import subprocess
import sys

from daemon import ROOT

PROGRAM = """
import importlib.resources, sys
import lamina, lamina.v1.layer_service_pb2_grpc
assert lamina.__file__.startswith(sys.argv[1]), lamina.__file__
assert (importlib.resources.files(lamina) / "py.typed").is_file()
with lamina.connect(sys.argv[2]) as client:
    print(client.info().version, client.transport)
assert "torch" not in sys.modules  # the core needs numpy alone
"""


def test_installed_package_works_outside_the_tree(daemon, tmp_path):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "--disable-pip-version-check", "--root-user-action", "ignore", "--target", str(site),
                    str(ROOT / "client/python")], check=True, timeout=300)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(site), daemon.target], cwd=tmp_path, text=True,
                          env={**environment, "PYTHONPATH": str(site)}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.1.0 memfd\n"
