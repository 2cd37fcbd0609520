"""The commands of docs/security.md, run as written in an empty folder, one after another."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import time

import lamina

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
BIN = pathlib.Path(os.environ.get("LAMINAD", ROOT / "build/release/bin/laminad")).parent


def test_the_commands_work(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LAMINA_") and "proxy" not in k.lower()}
    environment.update(PATH=f"{BIN}:{os.environ['PATH']}", LAMINA_DEVICE="cpu", LAMINA_METRICS="none", OMP_WAIT_POLICY="passive")
    monkeypatch.chdir(tmp_path)
    asked = 0
    with contextlib.ExitStack() as running:
        for language, block in re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
            block = block.replace("7070", port)
            if block.startswith("laminad "):
                running.close()  # the one before
                with open("log", "wb") as log:
                    daemon = subprocess.Popen(block.split(), env=environment, stdout=log, stderr=log)
                running.callback(daemon.wait)
                running.callback(daemon.terminate)
                give_up = time.monotonic() + 60
                while b"event=ready" not in pathlib.Path("log").read_bytes():
                    assert daemon.poll() is None and time.monotonic() < give_up, pathlib.Path("log").read_text()
                    time.sleep(0.02)
            elif language == "python":
                exec(block, {"lamina": lamina})
            else:
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, capture_output=True, text=True,
                                      timeout=60)
                assert done.returncode == 0, (block, done.stdout, done.stderr)
                asked += done.stdout.count("backend")
    assert asked == 2  # lamina info, by a token and by a certificate


def test_the_table_of_roles_is_the_daemons():
    """What the page says of each RPC, by the source of the one table."""
    source = (ROOT / "server/access/roles.cc").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", PAGE, re.MULTILINE))
    for path, needs in re.findall(r'\{"/lamina\.v1\.ConfigService/(\w+)", Needs\((\w+)\)\}', source):
        if needs == "kSomeRole":
            assert path in rows["read-only"], path
        elif needs == "kOperator":
            assert path in rows["operator"] and path not in rows["trainer"] and path not in rows["read-only"], path
        else:
            assert needs == "kWorker" and all("reading parameters and gradients" in rows[r] for r in ("operator", "trainer"))
