"""docs/clients.md: its commands as written, and that its excerpts are the programs'."""

import os
import re
import subprocess

import pytest
from daemon import ROOT
from programs import ready

PAGE = (ROOT / "docs/clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
PROGRAMS = {"Python": ("python", "client/python/examples/train.py"), "C++": ("cpp", "client/cpp/examples/losses.cc"),
            "Go": ("go", "client/go/train/main.go"), "Ruby": ("ruby", "client/ruby/train.rb")}


def blocks(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)


def run(script, daemon):
    """What a block of commands printed; each must work."""
    socket = daemon.target.removeprefix("unix:")
    script = script.replace("/run/lamina/laminad.sock", socket)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, text=True, timeout=600, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "LAMINA_TARGET": daemon.target})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("section", PROGRAMS)
def test_excerpts_are_the_programs(section):
    language, path = PROGRAMS[section]
    # Without indentation: an excerpt begins at the margin.
    lines = [line.strip() for line in (ROOT / path).read_text().splitlines()]
    excerpts = blocks(section, language)
    assert excerpts
    for excerpt in excerpts:
        wanted = [line.strip() for line in excerpt.splitlines()]
        assert any(lines[i : i + len(wanted)] == wanted for i in range(len(lines))), excerpt


@pytest.mark.parametrize("section", PROGRAMS)
def test_commands_train(section, daemon):
    ready(PROGRAMS[section][0])  # skips where the toolchain is not there
    (script,) = blocks(section, "sh")
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)$", run(script, daemon), re.MULTILINE)]
    assert len(losses) == 10 and losses[-1] < 0.2 * losses[0]


@pytest.fixture(scope="module")
def buf():
    installed = subprocess.run(["scripts/buf", "--version"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if installed.returncode != 0:
        pytest.skip(f"buf could not be installed: {installed.stdout[-200:]}")


def test_exploring(buf, daemon):
    look, call = blocks("Exploring a daemon", "sh")
    seen = run(look, daemon)
    for words in ("lamina.v1.SessionService\n", "lamina.v1.LayerService/Forward\n", '"inlineCapBytes": ', '"status": "SERVING"'):
        assert words in seen, seen
    answers = run(call, daemon)
    for words in ('"name": "tiny"', '"inputTransport": "TRANSPORT_INLINE"', '"inlineData": '):
        assert words in answers, answers
    metrics = daemon.metrics()
    assert metrics["lamina_stacks"] == 0 and metrics["lamina_sessions"] == 0


def test_a_refusal_exits_as_the_page_says(buf, daemon):
    socket = daemon.target.removeprefix("unix:")
    done = subprocess.run(["scripts/buf", "curl", "--protocol", "grpc", "--unix-socket", socket, "-d", '{"name": "none"}',
                           "http://localhost/lamina.v1.ConfigService/GetStack"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 40 and 'there is no stack' in done.stderr
