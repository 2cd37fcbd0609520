"""Request ids, trace context, and the log's lines about a call."""

import json
import re

import grpc
import lamina
import numpy as np
import pytest
from daemon import Daemon, wait_until
from lamina.v1 import config_service_pb2 as config_pb
from lamina.v1 import layer_service_pb2 as layer_pb
from raw import Raw

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture(scope="module", params=("text", "json"))
def talkative(request):
    with Daemon("--log-format", request.param, "--log-level", "debug") as daemon:
        daemon.format = request.param
        yield daemon


def lines(daemon, event):
    """The log's lines of an event, as dicts."""
    found = []
    for line in daemon.log().splitlines():
        if daemon.format == "json":
            fields = json.loads(line)
        else:
            fields = {key: quoted.replace("\\'", "'") or plain for key, quoted, plain in re.findall(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|(\S*))', line)}
        if fields.get("event") == event:
            found.append(fields)
    return found


def refused(raw, metadata):
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        raw.config.GetStack(config_pb.GetStackRequest(name="absent"), metadata=metadata)
    return caught.value


def id_of(error):
    (value,) = [value for key, value in error.trailing_metadata() if key == "x-request-id"]
    return value


@pytest.fixture
def raw(talkative):
    r = Raw(talkative.target)
    yield r
    r.close()


def test_an_error_carries_the_clients_request_id_and_the_log_too(talkative, raw):
    error = refused(raw, (("x-request-id", "job-17.step_3"), ("traceparent", PARENT)))
    assert id_of(error) == "job-17.step_3"
    (line,) = [line for line in lines(talkative, "rpc_failed") if line.get("request_id") == "job-17.step_3"]
    assert line["trace_id"] == TRACE and line["span_id"] == SPAN and line["code"] == "NOT_FOUND"
    assert line["method"] == "/lamina.v1.ConfigService/GetStack" and 'no stack' in line["reason"]


def test_without_one_the_daemon_makes_one(talkative, raw):
    seen = {id_of(refused(raw, None)) for _ in range(20)}
    assert len(seen) == 20 and all(re.fullmatch("[0-9a-f]{16}", each) for each in seen)
    logged = {line["request_id"] for line in lines(talkative, "rpc_failed")}
    assert seen <= logged


@pytest.mark.parametrize("bad", ("", "x" * 65, "a b", "a\"b", "a=b", "../x"))
def test_an_id_that_is_unfit_for_a_log_is_replaced(raw, bad):
    assert re.fullmatch("[0-9a-f]{16}", id_of(refused(raw, (("x-request-id", bad),))))


@pytest.mark.parametrize("bad", (
    "", "00", PARENT[:-1], PARENT + "0", PARENT.replace("0af", "0AF"), f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-0x", f"00-{TRACE}+{SPAN}-01", PARENT + "-more"))
def test_a_broken_traceparent_is_as_none(talkative, raw, bad):
    request = id_of(refused(raw, (("traceparent", bad),)))
    (line,) = [line for line in lines(talkative, "rpc_failed") if line.get("request_id") == request]
    assert "trace_id" not in line and "span_id" not in line


def test_a_traceparent_of_a_later_version_counts(talkative, raw):
    request = id_of(refused(raw, (("traceparent", f"01-{TRACE}-{SPAN}-01-more"),)))
    (line,) = [line for line in lines(talkative, "rpc_failed") if line.get("request_id") == request]
    assert line["trace_id"] == TRACE


def test_what_worked_is_logged_too(talkative, raw):
    metadata = (("x-request-id", f"making-{talkative.format}"), ("traceparent", PARENT))
    config = config_pb.StackConfig(batch_size=1, max_seq_length=4, hidden_size=8, heads=1, num_hidden_layers=1)
    raw.config.CreateStack(config_pb.CreateStackRequest(name="traced", config=config), metadata=metadata)
    wait_until(lambda: [line for line in lines(talkative, "rpc_done") if line["request_id"] == metadata[0][1]])
    (made,) = lines(talkative, "stack_created")
    (done,) = [line for line in lines(talkative, "rpc_done") if line["request_id"] == metadata[0][1]]
    assert made["request_id"] == done["request_id"] and made["trace_id"] == done["trace_id"] == TRACE
    assert done["method"].endswith("/CreateStack") and float(done["seconds"]) > 0
    raw.config.DeleteStack(config_pb.DeleteStackRequest(name="traced"))


def test_each_call_of_a_stream_has_an_id(talkative, raw):
    request = layer_pb.ExecuteRequest(id=7, forward=layer_pb.ForwardRequest(session_id="0" * 32, stack="absent", training=False))
    (answer,) = raw.layer.Execute(iter([request]), metadata=(("x-request-id", "stream"), ("traceparent", PARENT)))
    assert answer.code == grpc.StatusCode.NOT_FOUND.value[0] and answer.request_id == "stream.7"
    (line,) = [line for line in lines(talkative, "rpc_failed") if line.get("request_id") == "stream.7"]
    assert line["trace_id"] == TRACE


def test_clients_tell_the_id(talkative):
    with lamina.connect(talkative.target) as client:
        with pytest.raises(lamina.NotFound) as caught:
            client.stack("absent")
        assert re.fullmatch("[0-9a-f]{16}", caught.value.request_id) and caught.value.request_id in str(caught.value)
        assert caught.value.request_id in talkative.log()
        stack = client.create_stack("piped", batch_size=1, max_seq_length=4, hidden_size=8, heads=1, num_hidden_layers=1)
        with client.pipeline() as pipeline:
            with pytest.raises(lamina.InvalidArgument) as caught:
                pipeline.forward(stack, np.ones((1, 4, 16), np.float32), training=False).result()
        assert re.fullmatch(r"[0-9a-f]{16}\.\d+", caught.value.request_id)
        assert caught.value.request_id in talkative.log()
        client.delete_stack("piped")


def test_clients_cannot_fill_the_log():
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        for _ in range(1000):
            refused(raw, None)
        raw.close()
        daemon.format = "text"
        assert 10 <= len(lines(daemon, "rpc_failed")) < 900

        def held_back():
            return sum(int(line["count"]) for line in lines(daemon, "rpc_failures_not_logged"))
        # The next one that is logged tells of those before it that were not.
        wait_until(lambda: refused_now(daemon) and len(lines(daemon, "rpc_failed")) + held_back() >= 1000)
        assert held_back() > 50


def refused_now(daemon):
    raw = Raw(daemon.target)
    refused(raw, None)
    raw.close()
    return True
