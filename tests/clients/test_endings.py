"""Each language's program when things go wrong: wrong flags, no daemon, refusals, and a session that ends under it."""

import re
import signal
import time

import lamina
import pytest
from daemon import Daemon
from programs import ready


def one_line(run, words):
    """It failed, and said why in one line with one of these words."""
    assert run.code == 1, run
    assert run.err.endswith("\n") and len(run.err.splitlines()) == 1, run
    assert re.search(words, run.err), run


def stacks(daemon, run):
    """Names of the program's stacks that are there."""
    with lamina.connect(daemon.target) as client:
        return [stack.name for stack in client.stacks() if stack.name.endswith(f"-{run.process.pid}")]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("flags", [["--nope"], ["--steps", "0"], ["--steps", "x"], ["--transport", "posix"], ["extra"]],
                         ids=" ".join)
def test_wrong_flags(program, flags):
    run = program.run(*flags)
    assert run.code == 2 and run.out == "" and run.err != "", run


def test_help(program):
    run = program.run("--help")
    assert run.code == 0, run
    for flag in ("target", "transport", "steps"):
        assert re.search(rf"-{flag}\b", run.out + run.err), run


def test_no_daemon(program):
    began = time.monotonic()
    run = program.run("--target", "unix:/nowhere/laminad.sock")
    one_line(run, "(?i)unavailable.*(?i:no such file)")
    assert "unix:/nowhere/laminad.sock" in run.err and run.out == "" and time.monotonic() - began < 20


@pytest.fixture(scope="module")
def short_daemon():
    """Its leases are short and its inline cap is small."""
    with Daemon("--lease", "2", "--inline-cap", "4096") as d:
        yield d


def test_a_refusal_is_the_daemons_words(program, short_daemon):
    run = program.run("--target", short_daemon.target, "--transport", "inline")
    one_line(run, "8192 .*4096")
    # The id leads to the daemon's line about the call.
    request = re.search(r"\(request ([0-9a-f]{16})\)$", run.err.rstrip())
    assert request and re.search(rf"event=rpc_failed .*request_id={request[1]} .*8192", short_daemon.log()), run
    assert stacks(short_daemon, run) == []
    assert program.run("--target", short_daemon.target, "--transport", "memfd", "--steps", "1").code == 0


def test_a_daemon_that_dies(example):
    with Daemon() as daemon:
        run = example.train_on("--target", daemon.target)
        daemon.kill()
        one_line(run.finish(60), "session has ended")


def test_a_daemon_that_drains(example):
    with Daemon() as daemon:
        run = example.train_on("--target", daemon.target)
        assert daemon.stop() == 0
        one_line(run.finish(60), "Unavailable")


def test_a_client_that_hangs_loses_its_session_and_nobody_else_does(example, short_daemon):
    sessions = lambda: short_daemon.metrics()["lamina_sessions"]  # noqa: E731
    run = example.train_on("--target", short_daemon.target)
    other = ready("python").train_on("--target", short_daemon.target)
    run.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: sessions() == 1)
    run.process.send_signal(signal.SIGCONT)
    one_line(run.finish(60), "session")
    assert stacks(short_daemon, run) == []  # which outlive a session unless they are deleted
    seen = len(other.losses)
    wait_until(lambda: len(other.losses) > seen)
    other.kill()
    wait_until(lambda: sessions() == 0)


def test_a_client_that_is_killed_leaves_its_stack_alone(example, short_daemon):
    run = example.train_on("--target", short_daemon.target)
    assert short_daemon.metrics()["lamina_regions"] >= 1
    run.kill()
    wait_until(lambda: [short_daemon.metrics()[f"lamina_{name}"] for name in ("sessions", "regions", "contexts")] == [0, 0, 0])
    assert len(stacks(short_daemon, run)) == 1
