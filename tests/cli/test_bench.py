"""bench: one client and many, closed and open loop, unary calls and pipelines, and what becomes of refused calls."""

import threading
import time
import urllib.request

import pytest

ORDER = ["min_ms", "median_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"]


def check_call(call, seconds, whole_step=False):
    latencies = [call[name] for name in ORDER]
    assert latencies == sorted(latencies) and latencies[0] > 0
    assert call["per_second"] == pytest.approx(call["count"] / seconds)
    if not whole_step:
        assert 0 < call["compute_median_ms"] < call["median_ms"]
        assert call["queue_median_ms"] >= 0 and call["copy_median_ms"] >= 0 and call["overhead_median_ms"] > 0


def check_entry(entry, training=True):
    """That an entry's figures agree with one another; without errors."""
    seconds, steps = entry["seconds"], entry["steps"]
    assert entry["steps_per_second"] == pytest.approx(steps / seconds)
    assert entry["calls_per_second"] == pytest.approx((2 if training else 1) * steps / seconds)
    assert entry["samples_per_second"] == pytest.approx(entry["batch"] * steps / seconds)
    assert entry["tokens_per_second"] == pytest.approx(entry["batch"] * entry["seq"] * steps / seconds)
    for name in ("forward", "backward", "step") if training else ("forward",):
        assert entry[name]["count"] == steps > 0 and entry[name]["errors"] == {}
        check_call(entry[name], seconds, whole_step=name == "step")
    if training:
        assert entry["step"]["min_ms"] >= entry["forward"]["min_ms"]
    else:
        assert "backward" not in entry and "step" not in entry


def test_one_client(daemon, stack):
    before = daemon.json("stack", "show", stack)
    result = daemon.json("bench", stack, "--seconds", "0.3", "--batch", "2", "--seq", "9")
    assert (result["training"], result["concurrency"], result["calls"], result["loop"]) == (True, 1, "unary", "closed")
    assert [(e["transport"], e["batch"], e["seq"]) for e in result["results"]] == [("regions", 2, 9), ("inline", 2, 9)]
    for entry in result["results"]:
        assert entry["seconds"] >= 0.3
        check_entry(entry)
    after = daemon.json("stack", "show", stack)
    steps = sum(entry["steps"] + 3 for entry in result["results"])  # three each to warm up
    assert after["forward_count"] == before["forward_count"] + steps
    assert after["step"] == before["step"]
    assert after["outstanding_contexts"] == 0


@pytest.mark.parametrize("calls", [(), ("--calls", "pipeline", "--depth", "6")])
def test_several_clients(daemon, config_file, calls):
    daemon.json("stack", "create", "several", "--config", config_file(), "--max-contexts", "4")
    try:
        result = daemon.json("bench", "several", "--seconds", "0.3", "--concurrency", "3", "--warmup", "2",
                             "--transport", "regions", *calls)
        (entry,) = result["results"]
        check_entry(entry)
        assert result["concurrency"] == 3 and result["calls"] == ("pipeline" if calls else "unary")
        assert result.get("depth") == (6 if calls else None)
        after = daemon.json("stack", "show", "several")
        assert after["forward_count"] == entry["steps"] + 3 * 2
        assert after["outstanding_contexts"] == 0
    finally:
        daemon.cli("stack", "delete", "several")


def test_each_client_has_a_session_and_they_end(daemon, stack):
    def sessions():
        with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=30) as answer:
            (line,) = [line for line in answer.read().decode().splitlines() if line.startswith("lamina_sessions ")]
        return float(line.split()[1])

    before, most = sessions(), 0
    ended = threading.Event()

    def load():
        daemon.json("bench", stack, "--seconds", "0.5", "--concurrency", "5", "--forward-only", "--transport", "inline")
        ended.set()

    thread = threading.Thread(target=load)
    thread.start()
    while not ended.is_set() and thread.is_alive():
        most = max(most, sessions())
        time.sleep(0.02)
    thread.join()
    assert ended.is_set()
    assert most == before + 5
    give_up = time.monotonic() + 10
    while sessions() > before:
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_an_open_loop_keeps_its_rate(daemon, stack):
    arguments = ["bench", stack, "--seconds", "1", "--rate", "50", "--forward-only", "--transport", "regions", "--concurrency", "4"]
    result = daemon.json(*arguments, "--seed", "5")
    assert (result["loop"], result["rate"], result["seed"]) == ("open", 50, 5)
    (entry,) = result["results"]
    check_entry(entry, training=False)
    # The arrivals are the seed's: all were begun, or counted as not begun.
    arrived = entry["steps"] + entry["not_started"]
    assert 15 < arrived < 85  # 50 and five deviations
    (again,) = daemon.json(*arguments, "--seed", "5")["results"]
    assert again["steps"] + again["not_started"] == arrived


@pytest.mark.parametrize("calls", ["unary", "pipeline"])
def test_the_queue_of_an_open_loop_counts(daemon, stack, calls):
    """Far more than the daemon can do: a client that took what it could and timed that alone would hide the wait."""
    (entry,) = daemon.json("bench", stack, "--seconds", "0.4", "--rate", "100000", "--forward-only", "--transport", "regions",
                           "--calls", calls)["results"]
    check_entry(entry, training=False)
    assert entry["not_started"] > 10 * entry["steps"]
    assert entry["forward"]["max_ms"] > 200
    assert entry["forward"]["overhead_median_ms"] > 50


@pytest.mark.parametrize("calls", ["unary", "pipeline"])
def test_refused_calls_are_counted(daemon, config_file, calls):
    """There is room for one context at the stack's own shape: of eight clients' forwards some are refused."""
    daemon.json("stack", "create", "narrow", "--config", config_file(), "--max-contexts", "1")
    try:
        (entry,) = daemon.json("bench", "narrow", "--seconds", "0.5", "--concurrency", "8", "--transport", "regions",
                               "--calls", calls)["results"]
        assert entry["steps"] > 0
        assert entry["forward"]["errors"]["RESOURCE_EXHAUSTED"] > 0
        assert entry["step"]["count"] == entry["backward"]["count"] == entry["steps"] <= entry["forward"]["count"]
        others = set(entry["forward"]["errors"]) | set(entry["backward"]["errors"])
        assert others <= ({"RESOURCE_EXHAUSTED"} if calls == "unary" else {"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"})
        assert daemon.json("stack", "show", "narrow")["outstanding_contexts"] == 0
        text = daemon.cli("bench", "narrow", "--seconds", "0.5", "--concurrency", "8", "--transport", "regions", "--calls",
                          calls).stdout
        assert "RESOURCE_EXHAUSTED" in text
    finally:
        daemon.cli("stack", "delete", "narrow")


def test_several_shapes(daemon, stack):
    result = daemon.json("bench", stack, "--seconds", "0.1", "--shape", "1x4", "--shape", "3x20", "--transport", "inline")
    assert [(e["batch"], e["seq"]) for e in result["results"]] == [(1, 4), (3, 20)]
    for entry in result["results"]:
        check_entry(entry)


def test_as_text(daemon, stack):
    text = daemon.cli("bench", stack, "--seconds", "0.1", "--transport", "inline", "--forward-only").stdout
    assert "inline" in text and "forward" in text and "tokens/s" in text and "P99.9" in text
    assert "regions" not in text and "backward" not in text
    assert "open loop of 40 steps/s" in daemon.cli("bench", stack, "--seconds", "0.1", "--rate", "40").stdout


def test_what_is_wrong_ends_it(daemon, stack):
    assert daemon.error("bench", "nobody", code=1)["code"] == "NOT_FOUND"
    for calls in ("unary", "pipeline"):
        error = daemon.error("bench", stack, "--seq", "21", "--calls", calls, "--concurrency", "2", code=1)
        assert error["code"] == "INVALID_ARGUMENT"
    assert daemon.error("bench", stack, "--depth", "3", code=2)["message"].startswith("--depth")
    assert daemon.error("bench", stack, "--seed", "3", code=2)["message"].startswith("--seed")
    for flag, value in {"--rate": "0", "--concurrency": "0", "--calls": "some", "--shape": "8", "--warmup": "-1"}.items():
        assert flag in daemon.error("bench", stack, flag, value, code=2)["message"]
    assert "--shape" in daemon.error("bench", stack, "--shape", "1x4", "--seq", "4", code=2)["message"]


def test_a_stack_that_goes_away_ends_it(daemon, config_file):
    daemon.json("stack", "create", "gone", "--config", config_file())
    outcome = []
    bench = threading.Thread(target=lambda: outcome.append(
        daemon.cli("--output", "json", "bench", "gone", "--seconds", "20", "--concurrency", "2", timeout=60)))
    bench.start()
    give_up = time.monotonic() + 20
    while daemon.json("stack", "show", "gone")["forward_count"] < 10:
        assert time.monotonic() < give_up
    began = time.monotonic()
    daemon.json("stack", "delete", "gone")
    bench.join()
    assert time.monotonic() - began < 15
    assert outcome[0].returncode == 1 and outcome[0].stdout == ""
    assert "NOT_FOUND" in outcome[0].stderr or "FAILED_PRECONDITION" in outcome[0].stderr


def test_a_stack_without_training(daemon, config_file):
    daemon.json("stack", "create", "eval", "--config", config_file(), "--no-training")
    try:
        result = daemon.json("bench", "eval", "--seconds", "0.1", "--transport", "regions")
        assert result["training"] is False
        assert "backward" not in result["results"][0]
    finally:
        daemon.cli("stack", "delete", "eval")
