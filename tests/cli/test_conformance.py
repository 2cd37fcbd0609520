"""lamina conformance: passes against the real daemon, and sees a daemon that breaks a rule.

The daemons that break rules are the real one behind a proxy that spoils some of its answers.
"""

import concurrent.futures
import json
import re
import signal
import subprocess
import sys
import urllib.request

import conftest
import grpc
import pytest

PROTO = conftest.ROOT / "proto"
LAST_LINE = re.compile(r"(\d+) passed, (\d+) failed(?:, (\d+) skipped)?")


def counts(done):
    """(passed, failed, skipped) of the last line."""
    match = LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    assert match, done.stdout + done.stderr
    return tuple(int(n or 0) for n in match.groups())


def failed(done):
    return re.findall(r"^FAIL +(\S+)", done.stdout, re.MULTILINE)


def skipped(done):
    return dict(re.findall(r"^skip +(\S+) +(.*)$", done.stdout, re.MULTILINE))


def gauge(daemon, name):
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=30) as answer:
        return float(re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE).group(1))


@pytest.fixture(scope="module")
def whole(daemon, tmp_path_factory):
    """All checks against a daemon that somebody else uses too: (what was printed, the JSON file)."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "config.json"
    config.write_text(json.dumps(conftest.CONFIG))
    daemon.json("stack", "create", "somebody-elses", "--config", config)
    before = daemon.json("stack", "list")
    results = folder / "results.json"
    done = daemon.cli("conformance", "--json", results)
    # Nothing of it is left, and nothing of others has changed.
    assert daemon.json("stack", "list") == before
    assert gauge(daemon, "lamina_sessions") == 0
    assert gauge(daemon, "lamina_regions") == 0
    assert list(daemon.checkpoints.iterdir()) == []
    daemon.cli("stack", "delete", "somebody-elses")
    return done, json.loads(results.read_text())


DEVICE_CHECKS = {"handles.device-regions", "handles.device-slices"}  # of a daemon on a GPU


def test_the_daemon_passes(whole):
    done, results = whole
    assert done.returncode == 0, done.stdout + done.stderr
    passed, violated, left_out = counts(done)
    needs_slow = {check["name"] for check in results["checks"] if "--slow" in check.get("detail", "")}
    assert violated == 0 and len(needs_slow) == 5, done.stdout
    assert set(skipped(done)) == needs_slow | {"checkpoints.no-folder", *DEVICE_CHECKS}, done.stdout
    assert all("no device regions" in skipped(done)[name] for name in DEVICE_CHECKS)
    assert (passed, violated, left_out) == (results["passed"], results["failed"], results["skipped"])
    assert results["backend"] == "cpu" and len(results["checks"]) == passed + left_out


@pytest.fixture(scope="module")
def fewer(tmp_path_factory):
    """A daemon that offers neither regions nor checkpoints, with a short lease: what has to do with those."""
    running = conftest.Daemon("--lease", "1", checkpoints=False, broker="none")
    try:
        results = tmp_path_factory.mktemp("fewer") / "results.json"
        done = running.cli("conformance", "--only", "handles,sessions,checkpoints,parameters.slice", "--json", results)
        return done, json.loads(results.read_text())
    finally:
        running.stop()


def test_what_a_daemon_does_not_offer_is_skipped_visibly(fewer):
    done, results = fewer
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = skipped(done)
    assert counts(done)[1:] == (0, len(reasons))
    for name in ("handles.slices", "handles.seals", "handles.session", "parameters.slice"):
        assert "broker" in reasons[name]
    for name in ("checkpoints.round-trip", "checkpoints.damage"):
        assert "no checkpoint folder" in reasons[name]
    passed = {check["name"] for check in results["checks"] if check["outcome"] == "passed"}
    assert {"checkpoints.no-folder", "handles.caps", "handles.create-errors"} <= passed
    # The lease was waited for.
    assert {check["name"] for check in results["checks"] if check["name"].startswith("sessions.")} <= passed


# Codes that the contract promises and that nobody can bring about from outside without harm: of a file system that is
# full or broken, of the caps that all clients share, of what cannot be loaded because it was too large to be made. What
# DeleteStack's comment says is about the calls after it.
OUT_OF_REACH = {
    "ConfigService.SaveCheckpoint": {"RESOURCE_EXHAUSTED", "INTERNAL"},
    "ConfigService.LoadCheckpoint": {"RESOURCE_EXHAUSTED"},
    "ConfigService.DeleteStack": {"FAILED_PRECONDITION"},
    "SessionService.CreateSession": {"RESOURCE_EXHAUSTED"},
}
CODES = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED",
         "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "DATA_LOSS", "INTERNAL"}


def promised():
    """{"Service.Method": codes that the comment before it names} of the three services."""
    methods = {}
    for path in sorted((PROTO / "lamina/v1").glob("*_service.proto")):
        comment, service = "", None
        for line in map(str.strip, path.read_text().splitlines()):
            if line.startswith("//"):
                comment += line
                continue
            if match := re.match(r"service (\w+)", line):
                service = match.group(1)
            elif match := re.match(r"rpc (\w+)", line):
                methods[f"{service}.{match.group(1)}"] = {code for code in CODES if code in comment}
            comment = ""
    return methods


def test_every_call_and_every_code_that_it_promises_is_seen(whole, fewer):
    for method, codes in promised().items():
        seen = set()
        for _, results in (whole, fewer):
            seen |= set(results["calls"].get(f"lamina.v1.{method}", {}))
        assert {"OK"} | codes - OUT_OF_REACH.get(method, set()) <= seen, method


def test_list_needs_no_daemon(whole):
    done = subprocess.run([conftest.LAMINA, "conformance", "--list"], env=conftest.clean_environment(),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    names = re.findall(r"^  (\w+\.\S+)  +\S", done.stdout, re.MULTILINE)
    assert names == [check["name"] for check in whole[1]["checks"]]
    assert done.stdout.splitlines()[-1] == f"{len(names)} checks"


def test_only_selects(daemon):
    done = daemon.cli("conformance", "--only", "service,stacks.plan*", "--only", "*.info")
    assert done.returncode == 0
    names = re.findall(r"^ok +(\S+)", done.stdout, re.MULTILINE)
    assert set(name.split(".")[0] for name in names) == {"service", "stacks"} and "stacks.plan" in names
    assert counts(done) == (len(names), 0, 0)
    nothing = daemon.cli("conformance", "--only", "service", "--only", "nothing.*")
    assert nothing.returncode == 2 and "nothing.*" in nothing.stderr and nothing.stdout == ""


def test_over_tcp_and_as_json(daemon):
    results = daemon.json("conformance", "--only", "steps.evaluate,handles.slices", target=daemon.tcp)
    assert [check["outcome"] for check in results["checks"]] == ["passed", "passed"]
    assert results["target"] == daemon.tcp
    assert results["calls"]["lamina.v1.LayerService.Forward"]["OK"] > 0


def test_no_daemon(tmp_path):
    done = subprocess.run([conftest.LAMINA, "--target", f"unix:{tmp_path}/none.sock", "conformance"],
                          env=conftest.clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "no such socket" in done.stderr


def start(daemon, *arguments):
    """A run in the background, after its first check."""
    process = subprocess.Popen([conftest.LAMINA, "conformance", *arguments], stdout=subprocess.PIPE, text=True,
                               env=conftest.clean_environment() | {"LAMINA_TARGET": daemon.target})
    assert "laminad" in process.stdout.readline()
    assert process.stdout.readline().startswith("ok")
    return process


def test_an_interrupt_lets_the_check_clean_up(daemon):
    process = start(daemon)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in output and LAST_LINE.fullmatch(output.splitlines()[-1])
    assert daemon.json("stack", "list")["stacks"] == []


def test_a_daemon_that_dies_ends_the_run():
    mortal = conftest.Daemon()
    process = start(mortal)
    mortal.process.kill()
    output, _ = process.communicate(timeout=60)
    mortal.stop()
    assert process.returncode == 1
    assert "no longer answers" in output
    passed, violated, left_out = map(int, LAST_LINE.fullmatch(output.splitlines()[-1]).groups())
    assert violated >= 1 and left_out > 50 and passed >= 1


# --- daemons that break a rule ---


@pytest.fixture(scope="module")
def messages():
    """The contract's generated modules."""
    subprocess.run([conftest.ROOT / "scripts/python-stubs"], check=True)
    sys.path.insert(0, str(conftest.ROOT / "client/python"))
    from lamina.v1 import config_service_pb2, layer_service_pb2

    return {"config": config_service_pb2, "layer": layer_service_pb2}


class Proxy(grpc.GenericRpcHandler):
    """Hands every call on, as bytes. answer(method, request, response) gives the bytes to answer with; refusal(method,
    request, code, details) the code and details."""

    def __init__(self, target, answer=None, refusal=None):
        self.answer = answer or (lambda method, request, response: response)
        self.refusal = refusal or (lambda method, request, code, details: (code, details))
        size = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(target, options=size)
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(64), options=size)
        self.server.add_generic_rpc_handlers([self])
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def service(self, details):
        method = details.method

        def call(requests, context):
            last = [b""]

            def remembered():
                for last[0] in requests:
                    yield last[0]

            upstream = self.channel.stream_stream(method)(remembered(), timeout=context.time_remaining())
            context.add_callback(upstream.cancel)
            try:
                for response in upstream:
                    yield self.answer(method, last[0], response)
            except grpc.RpcError as error:
                code, text = self.refusal(method, last[0], error.code(), error.details())
                if code != grpc.StatusCode.OK:
                    context.abort(code, text)
                yield b""

        return grpc.stream_stream_rpc_method_handler(call)

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *_):
        self.server.stop(grace=None).wait()
        self.channel.close()


def spoiled(daemon, only, **faults):
    with Proxy(daemon.target, **faults) as proxy:
        return daemon.cli("conformance", "--only", only, target=proxy.target)


def expect_seen(done, *checks):
    """Exactly these checks failed, and the run says so."""
    assert failed(done) == list(checks), done.stdout + done.stderr
    assert done.returncode == 1
    assert counts(done)[1] == len(checks)
    assert "rule: " in done.stdout and "seen: " in done.stdout


CHECKED = "steps.*-errors,steps.train,once.*,handles.no-ids,execute.ids,execute.errors,numerics.gradient-pre,numerics.packed"


def test_a_proxy_that_spoils_nothing_passes(daemon):
    done = spoiled(daemon, CHECKED)
    assert (done.returncode, counts(done)[1:]) == (0, (0, 0)), done.stdout + done.stderr


def test_a_used_sequence_that_is_taken_again(daemon):
    def refusal(method, request, code, details):
        return (grpc.StatusCode.OK, "") if code == grpc.StatusCode.ALREADY_EXISTS else (code, details)

    expect_seen(spoiled(daemon, "once.*", refusal=refusal), "once.other-body", "once.window")


def test_repeats_that_are_answered_with_other_bytes(daemon):
    answers = iter(range(1, 1 << 14))

    def answer(method, request, response):
        # A field that nobody knows, of another value each time.
        return response + b"\xf8\x7f" + bytes([next(answers) % 127 + 1])

    done = spoiled(daemon, "once.repeat,once.at-once,once.stack-gone", answer=answer)
    expect_seen(done, "once.repeat", "once.at-once", "once.stack-gone")


def test_a_message_that_does_not_name_the_field(daemon):
    def refusal(method, request, code, details):
        return code, "bad request"

    done = spoiled(daemon, "steps.forward-errors,steps.apply-errors,steps.train", refusal=refusal)
    expect_seen(done, "steps.train", "steps.forward-errors", "steps.apply-errors")
    assert "S above the stack's: Forward answers INVALID_ARGUMENT: bad request; the message must name 'input.shape'" in done.stdout


def test_a_message_with_an_id_in_it(daemon):
    def refusal(method, request, code, details):
        ids = re.findall(rb"[0-9a-f]{32}", request)
        return code, details + "".join(f" ({text.decode()})" for text in ids)

    done = spoiled(daemon, "handles.no-ids,stacks.not-found", refusal=refusal)
    expect_seen(done, "handles.no-ids")
    assert "has the id of a session or region in it" in done.stdout


def test_an_error_of_another_code(daemon):
    def refusal(method, request, code, details):
        return (grpc.StatusCode.INTERNAL if code == grpc.StatusCode.NOT_FOUND else code), details

    expect_seen(spoiled(daemon, "stacks.not-found,stacks.create-exists", refusal=refusal), "stacks.not-found")


def scaled(tensor, factor):
    import numpy

    values = numpy.frombuffer(tensor.inline_data, numpy.float32) * numpy.float32(factor)
    tensor.inline_data = values.tobytes()


def test_gradients_that_are_a_hundredth_too_large(daemon, messages):
    def of_the_input(method, request, response):
        if not method.endswith("/Backward"):
            return response
        answered = messages["layer"].BackwardResponse.FromString(response)
        scaled(answered.input_grad, 1.01)
        return answered.SerializeToString()

    done = spoiled(daemon, "numerics.gradient-pre,numerics.gradient-post", answer=of_the_input)
    expect_seen(done, "numerics.gradient-pre", "numerics.gradient-post")
    assert re.search(r"seen: input_grad: input_grad: the gradient says \S+ along a direction", done.stdout)

    def of_one_parameter(method, request, response):
        if not method.endswith("/GetGradients"):
            return response
        answered = messages["config"].GetGradientsResponse.FromString(response)
        for named in answered.tensors:
            if named.name == "layers.1.inter_w":
                scaled(named.tensor, 1.01)
        return answered.SerializeToString()

    done = spoiled(daemon, "numerics.gradient-pre", answer=of_one_parameter)
    expect_seen(done, "numerics.gradient-pre")
    assert "seen: layers.1.inter_w" in done.stdout and "layers.0.inter_w" not in done.stdout


def test_a_stream_that_answers_out_of_order(daemon, messages):
    def answer(method, request, response):
        if not method.endswith("/Execute"):
            return response
        answered = messages["layer"].ExecuteResponse.FromString(response)
        answered.id += 1
        return answered.SerializeToString()

    expect_seen(spoiled(daemon, "execute.order,execute.end", answer=answer), "execute.order", "execute.end")
