"""A daemon that can't start says why in one line and ends with the exit code that docs/operations.md has for it, before
anything listens."""

import contextlib
import datetime
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile

import pytest
from certificates import Authority, replace
from daemon import BINARY, ON_CPU, ROOT, Daemon

TOKEN = "0123456789abcdef"


def start(*flags, env=None, user=None, **options):
    """(exit code, its one line) of a daemon that must not start."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LAMINA_")}
    clean.update({"LAMINA_METRICS": "none", "LAMINA_DEVICE": "cpu", **(env or {})})
    done = subprocess.run([BINARY, *map(str, flags)], env=clean, capture_output=True, text=True,
                          timeout=60, user=user, **options)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done
    assert "event=ready" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def usual(tmp_path):
    """Flags of a daemon that would start."""
    return ["--listen", f"unix:{tmp_path}/d.sock"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def nothing_listened(folder):
    return not list(pathlib.Path(folder).glob("*.sock"))


@pytest.mark.parametrize("flags, words", [
    (["--no-such-flag"], "--no-such-flag"), (["--queue-capacity", "0"], "queue-capacity"), (["--listen", "nonsense"], "HOST:PORT"),
    (["--listen", "127.0.0.1:99999"], "0 to 65535"), (["--metrics", "9464"], "HOST:PORT"), (["--metrics", "127.0.0.1,+:1"], "HOST:PORT"), (["--listen", "::1:0"], "HOST:PORT"), (["--device", "tpu"], "cuda:N"),
    (["--device", "cuda:x"], "cuda:N"), (["--tls-cert", "x"], "needs --tls-key"), (["--tls-key", "x"], "needs --tls-cert"),
    (["--tls-client-ca", "x"], "needs --tls-cert"), (["--final-checkpoint"], "needs --checkpoints"), (["--metrics-token"], "needs --tokens"),
    (["--listen", "0.0.0.0:0"], "--insecure"), (["--listen", "[::]:0"], "--insecure"),
    (["--listen", "127.0.0.1.example.org:0"], "--insecure"), (["--allow-uid", "4294967295"], "no user"),
    (["--allow-uid", "nobody"], "allow-uid"), (["--log-format", "xml"], "log-format")])
def test_wrong_flags(usual, tmp_path, flags, words):
    code, line = start(*usual, *flags)
    assert code == 2 and words in line and line.startswith("laminad: ") and nothing_listened(tmp_path)


def test_wrong_flags_from_the_environment(usual):
    code, line = start(*usual, env={"LAMINA_QUEUE_CAPACITY": "many"})
    assert code == 2 and "queue-capacity" in line.lower().replace("_", "-")


def test_addresses_that_are_taken(usual, tmp_path):
    with Daemon() as d:
        path = d.target.split(":", 1)[1]
        for flags in (["--listen", d.tcp], ["--listen", d.target], ["--metrics", d.metrics_address], ["--metrics", d.tcp],
                      ["--broker", d.broker], ["--broker", path]):
            code, line = start(*usual, *flags)
            assert code == 3 and "in use" in line and flags[1].split(":")[-1] in line, (flags, line)
            assert nothing_listened(tmp_path)
    with socket.socket() as other:  # not ours, and for all of the machine's addresses
        other.bind(("0.0.0.0", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        assert start(*usual, "--listen", address)[0] == 3


@pytest.mark.parametrize("flags, words", [
    (["--listen", "192.0.2.1:0", "--insecure"], "not an address of this machine"),
    (["--listen", "no-such-host.invalid:0", "--insecure"], "no-such-host"), (["--listen", "unix:/proc/x/d.sock"], "/proc/x"),
    (["--listen", "unix:/etc/passwd"], "no socket"), (["--listen", "unix:/tmp/" + 120 * "x"], "characters"),
    (["--listen", "127.0.0.1:{port}", "--metrics", "127.0.0.1:{port}"], "given twice"),
    (["--listen", "0.0.0.0:{port}", "--insecure", "--metrics", "127.0.0.1:{port}"], "also given")])
def test_addresses_that_are_none(usual, tmp_path, flags, words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, line = start(*usual, *(flag.format(port=port) for flag in flags))
    assert code == 3 and words in line and nothing_listened(tmp_path)


def test_certificates_and_keys(usual, tmp_path, authority):
    certificate, key = authority.issue_for_daemon()
    hour = datetime.timedelta(hours=1)
    late = authority.issue_for_daemon("late", ends=-hour)
    early = authority.issue_for_daemon("early", begins=hour)
    other = authority.issue_for_daemon("other")
    empty = replace(tmp_path / "empty", "")
    open_key = shutil.copy(key, tmp_path / "open.key")
    os.chmod(open_key, 0o644)
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:x", "-out", locked], check=True)
    os.chmod(locked, 0o600)
    missing = tmp_path / "missing"
    for flags, words in [
            ([missing, key], "--tls-cert"), ([empty, key], "no certificate"), ([tmp_path, key], "not a regular file"),
            ([key, key], "no certificate"), ([certificate, missing], "--tls-key"), ([certificate, certificate], "private key"),
            ([certificate, open_key], "mode 0644"), ([certificate, locked], "encrypted"), ([certificate, other[1]], "not the key"),
            ([*late], "expired at 20"), ([*early], "not valid before 20"),
            ([certificate, key, "--tls-client-ca", missing], "--tls-client-ca"),
            ([certificate, key, "--tls-client-ca", key], "no certificate")]:
        code, line = start(*usual, "--tls-cert", flags[0], "--tls-key", *flags[1:])
        assert code == 4 and words in line and "exit_code=4" in line, (flags, line)
        assert nothing_listened(tmp_path)


@pytest.mark.parametrize("content, words", [
    (f"alice {TOKEN} x", ":1: has 3 words"), ("short", ":1: the token must be 16"), (f"\n\nal,ice {TOKEN}", ":3: the name"),
    (f"alice {TOKEN}\nbob {TOKEN}", ":2: the token is that of line 1 too"), (f"{TOKEN}é", "the token must")], ids=range(5))
def test_tokens(usual, tmp_path, content, words):
    code, line = start(*usual, "--tokens", replace(tmp_path / "tokens", content))
    assert code == 4 and words in line and TOKEN not in line and nothing_listened(tmp_path)


def test_files_of_tokens(usual, tmp_path):
    tokens = replace(tmp_path / "tokens", TOKEN)
    for mode in (0o604, 0o644, 0o620, 0o602, 0o601):
        tokens.chmod(mode)
        code, line = start(*usual, "--tokens", tokens)
        assert code == 4 and f"mode {mode:04o}" in line and "chmod" in line
    tokens.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(tokens, 12345, -1)
        code, line = start(*usual, "--tokens", tokens)
        assert code == 4 and "belongs to UID 12345" in line
    assert "No such file" in start(*usual, "--tokens", tmp_path / "none")[1]
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in start(*usual, "--tokens", tmp_path / "pipe")[1]
    assert "larger" in start(*usual, "--tokens", replace(tmp_path / "big", "# " * (1 << 20)))[1]


@pytest.mark.parametrize("content, words", [
    ("token:alice", ":1: has 1 words"), ("alice all", "'alice' must be token:NAME"), ("uid:x all", "'uid:x'"),
    ("# one\ndns: all", ":2: 'dns:'"), ("cn:x admin", "'admin' must be read-only"), ("cn:x trainer,", "must be read-only")])
def test_roles(usual, tmp_path, content, words):
    code, line = start(*usual, "--roles", replace(tmp_path / "roles", content))
    assert code == 4 and words in line and nothing_listened(tmp_path)


def test_checkpoint_folders(usual, tmp_path):
    code, line = start(*usual, "--checkpoints", tmp_path / "missing")
    assert code == 5 and "--checkpoints" in line and "No such file" in line and nothing_listened(tmp_path)
    code, line = start(*usual, "--checkpoints", replace(tmp_path / "file", "x"))
    assert code == 5 and "not a folder" in line
    code, line = start(*usual, "--profile", tmp_path / "missing" / "trace.json")
    assert code == 5 and f"there is no folder {tmp_path}/missing: No such file" in line and nothing_listened(tmp_path)
    if os.geteuid() == 0:
        with tempfile.TemporaryDirectory() as closed:
            os.chmod(closed, 0o755)
            code, line = start(*usual, "--checkpoints", closed, user=54321)
            assert code == 5 and "can't be written: Permission denied" in line, line


@contextlib.contextmanager
def full_disk(folder):
    """A file system of 32 KiB in the folder."""
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder],
                                           capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(usual, tmp_path):
    with full_disk(tmp_path / "disk") as disk:
        (disk / "data").write_bytes(bytes(32768 - 4096))
        code, line = start(*usual, "--checkpoints", disk)
        assert code == 5 and "No space left on device" in line and nothing_listened(tmp_path)
        code, line = start(*usual, "--profile", disk)
        assert code == 5 and "--profile" in line and "No space left on device" in line and nothing_listened(tmp_path)
        assert [f.name for f in disk.iterdir()] == ["data"]


@pytest.mark.skipif(not ON_CPU, reason="there is a GPU")
def test_a_gpu_that_is_not_there(usual, tmp_path):
    code, line = start(*usual, "--device", "cuda:0")
    assert code == 6 and "--device cuda:0: " in line and nothing_listened(tmp_path)


def test_the_line_is_there_without_a_log_too(usual, tmp_path):
    code, line = start(*usual, "--log-level", "off", "--checkpoints", tmp_path / "missing")
    assert code == 5 and line.startswith("laminad: --checkpoints")
    code, line = start(*usual, "--log-format", "json", "--checkpoints", tmp_path / "missing")
    assert code == 5 and line.startswith("{") and '"exit_code":5' in line


def test_the_exit_codes_are_documented():
    if not (ROOT / "server/flags.h").exists():
        pytest.skip("the tests were brought along without the sources")
    page = (ROOT / "docs/operations.md").read_text()
    table = {int(code) for code in re.findall(r"^\| (\d) \|", page, re.MULTILINE)}
    source = (ROOT / "server/flags.h").read_text()
    assert table == {int(code) for code in re.findall(r"^  k\w+ = (\d),", source, re.MULTILINE)} == set(range(7))
    shown = subprocess.run([BINARY, "--help"], capture_output=True, text=True).stdout
    for code in table:
        assert re.search(rf"^  {code}  ", shown, re.MULTILINE), code
