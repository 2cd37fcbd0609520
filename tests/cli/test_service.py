"""info, health, targets, exit codes and what usage errors say."""

import http.server
import json
import signal
import socket
import subprocess
import threading
import time
import urllib.request

import conftest
import numpy as np


def run(*arguments, env=None):
    return subprocess.run([conftest.LAMINA, *arguments], env=conftest.clean_environment() | (env or {}),
                          capture_output=True, text=True, timeout=60)


def test_info(daemon):
    info = daemon.json("info")
    assert info["backend"] == "cpu"
    assert info["device_name"]
    assert 0 < info["device_free_bytes"] <= info["device_total_bytes"]
    assert info["inline_cap_bytes"] >= 1 << 20
    assert {"inline", "memfd"} <= set(info["transports"])
    assert info["checkpoints_enabled"] is True
    assert info["target"] == daemon.target
    text = daemon.cli("info").stdout
    assert f"laminad {info['version']}" in text
    assert "GiB" in text or "MiB" in text


def test_info_over_tcp(daemon):
    assert daemon.json("info", target=daemon.tcp)["target"] == daemon.tcp


def test_the_flag_wins_over_the_environment(daemon):
    done = daemon.cli("--target", daemon.target, "health", target="unix:/nowhere")
    assert (done.returncode, done.stdout) == (0, "SERVING\n")


def test_an_absolute_path_is_a_target(daemon):
    assert daemon.cli("health", "--target", daemon.socket, target="unix:/nowhere").returncode == 0


def test_health(daemon):
    assert daemon.json("health")["status"] == "SERVING"


def test_health_while_draining():
    """A daemon that was told to end says NOT_SERVING, or is gone: never SERVING, never another code."""
    daemon = conftest.Daemon()
    try:
        daemon.process.send_signal(signal.SIGTERM)
        codes = []
        while daemon.process.poll() is None:
            codes.append(daemon.cli("health").returncode)
        assert set(codes[1:]) <= {1, 3}
        assert daemon.process.wait() == 0
        assert daemon.cli("health").returncode == 3
    finally:
        daemon.stop()


def test_status_says_what_the_page_shows(daemon, stack, tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 20, 32), np.float32))
    assert daemon.cli("run", stack, "--input", tmp_path / "x.npy").returncode == 0
    report = daemon.json("status")
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/statusz.json", timeout=30) as answer:
        page = json.load(answer)
    assert report.keys() == page.keys() and report["stacks"] == page["stacks"] and report["state"] == "serving"
    assert report["steps"]["last"][-1]["stack"] == stack
    for how in ([], ["--metrics", f"http://{daemon.metrics_address}/statusz"], ["--metrics", daemon.metrics_address]):
        words = daemon.cli("status", *how, target=None if not how else "unix:/nowhere").stdout
        for expected in ("serving", f"laminad {report['version']}", report["device"]["name"], stack, "forward_eval", "LAST MINUTE", "CLIENT"):
            assert expected in words, expected
    assert daemon.cli("status", target=daemon.tcp).returncode == 0
    assert f"http://{daemon.metrics_address}/metrics" in daemon.cli("info").stdout


def test_status_where_there_is_none(tmp_path):
    assert "must be http://HOST:PORT" in run("status", "--metrics", "nonsense").stderr
    done = run("status", "--metrics", f"127.0.0.1:{conftest.free_port()}")
    assert done.returncode == 3 and "UNAVAILABLE" in done.stderr
    silent = conftest.Daemon("--metrics", "none", metrics=False)
    try:
        error = silent.error("status", code=1)
        assert error["code"] == "FAILED_PRECONDITION" and "--metrics none" in error["message"]
    finally:
        silent.stop()
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            done = run("status", "--metrics", f"127.0.0.1:{other.server_address[1]}")
            assert done.returncode == 1 and "404" in done.stderr
        finally:
            other.shutdown()


def test_no_daemon_says_which_socket_and_how_to_start_one(tmp_path):
    target = f"unix:{tmp_path}/none.sock"
    for command in (["info"], ["health"], ["stack", "list"]):
        done = run("--target", target, *command)
        assert done.returncode == 3
        assert done.stdout == ""
        assert target in done.stderr
        assert "no such socket" in done.stderr
        assert f"laminad --listen {target}" in done.stderr


def test_no_daemon_as_json(tmp_path):
    done = run("--target", f"{tmp_path}/none.sock", "info", "--output", "json")
    assert done.returncode == 3
    error = json.loads(done.stderr)["error"]
    assert error["code"] == "UNREACHABLE"
    assert error["target"] == f"unix:{tmp_path}/none.sock"


def test_default_target_is_in_the_runtime_folder(tmp_path):
    """Root's is in /run; others' in XDG_RUNTIME_DIR."""
    import os

    expected = "/run/lamina/laminad.sock" if os.geteuid() == 0 else f"{tmp_path}/lamina/laminad.sock"
    done = run("info", env={"XDG_RUNTIME_DIR": str(tmp_path)})
    if done.returncode == 3:  # no daemon happens to run there
        assert f"unix:{expected}" in done.stderr


def test_left_over_socket(tmp_path):
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    done = run("--target", f"unix:{path}", "info")
    assert done.returncode == 3
    assert "nobody listens" in done.stderr


def test_a_port_where_nobody_listens():
    done = run("--target", f"127.0.0.1:{conftest.free_port()}", "info")
    assert done.returncode == 3
    assert "cannot reach laminad" in done.stderr


def test_timeout_where_nobody_answers(tmp_path):
    """A listener that says nothing: given up after --timeout, as unreachable."""
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        began = time.monotonic()
        done = run("--target", f"unix:{path}", "--timeout", "0.5", "info")
        assert time.monotonic() - began < 10
    assert done.returncode == 3
    assert "did not answer in time" in done.stderr


def test_usage_errors():
    for arguments, words in {
        (): "subcommand",
        ("frobnicate",): "no command 'frobnicate'",
        ("info", "--frobnicate"): "--frobnicate",
        ("stack",): "subcommand",
        ("stack", "create"): "NAME",
        ("run", "x"): "--input",
        ("info", "--output", "yaml"): "yaml",
        ("info", "--timeout", "-1"): "--timeout",
        ("info", "--timeout", "soon"): "--timeout",
        ("bench", "x", "--seconds", "-1"): "--seconds",
        ("bench", "x", "--batch", "0"): "--batch",
        ("info", "--target", "nonsense"): "nonsense",
        ("info", "--target", "unix:"): "names no socket",
        ("plan",): "--config",
        ("plan", "--heads", "many"): "--heads",
        ("run", "x", "--input", "a", "--mask", "b", "--lengths", "c"): "--lengths",
    }.items():
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done)
        assert words in done.stderr, (arguments, done.stderr)
        assert done.stdout == ""


def test_help_documents_the_exit_codes():
    done = run("--help")
    assert done.returncode == 0
    assert "Exit codes:" in done.stdout
    for command in ("info", "health", "stack", "plan", "run", "checkpoint", "bench", "params", "conformance"):
        assert f"\n  {command} " in done.stdout
        assert run(command, "--help").returncode == 0
    assert run("--version").stdout.startswith("lamina ")
