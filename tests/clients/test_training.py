"""Each language's program against a real daemon: the same losses as Python's to the bit, and what it leaves behind."""

import lamina
import pytest
from daemon import Daemon
from losing_proxy import LosingProxy
from programs import ready


@pytest.fixture(scope="module")
def reference(daemon):
    """The losses of ten steps through the Python client."""
    done = ready("python").run("--target", daemon.target)
    assert done.code == 0 and done.transport == "memfd", done
    assert len(done.losses) == 10 and done.losses[-1] < 0.2 * done.losses[0]
    return done.losses


def leaves_nothing(daemon):
    """Sessions, regions and stacks are gone."""
    metrics = daemon.metrics()
    return [metrics[name] for name in ("lamina_sessions", "lamina_regions", "lamina_contexts", "lamina_stacks")] == [0] * 4


@pytest.mark.parametrize("transport", ["memfd", "inline"])
def test_the_same_losses_to_the_bit(program, transport, daemon, reference):
    before = daemon.metrics()
    done = program.run("--target", daemon.target, "--transport", transport)
    assert done.code == 0 and done.err == "", done
    assert done.transport.split(" ")[0] == transport
    assert done.losses == reference
    # What the program says of the transport is what the daemon saw.
    carried = {way: sum(value - before.get(series, 0) for series, value in daemon.metrics().items()
                        if series.startswith("lamina_tensor_bytes_total{") and f'transport="{way}"' in series)
               for way in ("memfd", "inline")}
    # An input, an output and an output gradient of 4 x 16 x 32 floats a step.
    assert carried.pop(transport) == 10 * 3 * 4 * 16 * 32 * 4
    assert list(carried.values()) == [0]
    assert leaves_nothing(daemon)


def test_over_tcp_with_regions(program, daemon, reference):
    done = program.run("--target", daemon.tcp, "--steps", "3")
    assert done.code == 0 and done.transport == "memfd", done
    assert done.losses == reference[:3]


@pytest.fixture(scope="module")
def brokerless():
    with Daemon(broker="none") as d:
        yield d


def test_without_a_broker_it_goes_inline(program, brokerless, reference):
    done = program.run("--target", brokerless.target, "--steps", "3")
    assert done.code == 0 and done.transport.split(" ")[0] == "inline", done
    assert done.losses == reference[:3]
    insisted = program.run("--target", brokerless.target, "--transport", "memfd")
    assert insisted.code == 1 and "broker socket" in insisted.err, insisted
    assert leaves_nothing(brokerless)


@pytest.mark.parametrize("transport", ["memfd", "inline"])
def test_lost_calls_and_answers_change_nothing(example, transport, daemon, reference):
    with LosingProxy(daemon.target) as proxy:
        done = example.run("--target", proxy.target, "--transport", transport, "--steps", "3")
        assert done.code == 0 and done.err == "", done
        assert done.losses == reference[:3]
        assert proxy.lost == {"Forward": 3, "Backward": 3, "ApplyGradients": 3}
    assert leaves_nothing(daemon)


def test_an_answer_that_stays_lost_ends_the_program(example, daemon):
    with LosingProxy(daemon.target, stay_lost="Backward") as proxy:
        done = example.run("--target", proxy.target)
        assert done.code == 1 and len(done.losses) == 1, done
        assert "the answer was lost" in done.err and len(done.err.splitlines()) == 1
        assert proxy.lost["Backward"] == 6 and proxy.lost["ApplyGradients"] == 0
        with lamina.connect(daemon.target) as client:
            assert client.stacks() == []
    assert leaves_nothing(daemon)
