"""The README's examples as written there, and that what the pages under docs/ and the README name exists."""

import os
import pathlib
import re
import shlex
import subprocess

import lamina
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "client/python/README.md"]
BIN = pathlib.Path(os.environ.get("LAMINAD", ROOT / "build/release/bin/laminad")).parent


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def test_the_two_commands_come_first():
    first = blocks("sh")[0].splitlines()
    assert [line.split()[0] for line in first] == ["scripts/quickstart", "scripts/test"]
    assert all(os.access(ROOT / line.split()[0], os.X_OK) for line in first)


def test_python_example_trains(daemon, monkeypatch, capsys):
    monkeypatch.setenv("LAMINA_TARGET", daemon.target)
    (example,) = blocks("python")
    exec(example, {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    with lamina.connect(daemon.target) as client:
        assert client.stack("demo").info().step == 10


def test_cpp_example_is_the_one_that_is_built_and_run():
    # tests/cpp_consumer builds this file against the installed package and runs it.
    (example,) = blocks("cpp")
    assert example == (ROOT / "client/cpp/examples/train.cc").read_text()


def shell_commands():
    for page in (README, (ROOT / "docs/deploy.md").read_text()):
        for block in blocks("sh", page):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ("laminad", "lamina"):
                    yield pytest.param(words, id=line[:60])


@pytest.mark.parametrize("words", shell_commands())
def test_flags_of_shell_examples_exist(words):
    """laminad's flags against its --help; lamina's commands are run."""
    binary = BIN / words[0]
    if words[0] == "laminad":
        usage = subprocess.run([binary, "--help"], capture_output=True, text=True, check=True).stdout
        missing = [w for w in words[1:] if w.startswith("--") and not re.search(rf"{w}\b", usage)]
        assert not missing
        return
    usage = subprocess.run([binary, words[1], "--help"], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    missing = [w for w in words[2:] if w.startswith("--") and not re.search(rf"{w}\b", usage.stdout)]
    assert not missing
    if words[1] == "plan" and ("--memory" in words or "--device" in words):  # which needs no daemon
        assert subprocess.run([binary, *words[1:]], capture_output=True, text=True, check=True).stdout


def test_scripts_that_are_named_exist():
    page = (ROOT / "docs/deploy.md").read_text()
    for block in blocks("sh", page):
        for line in block.splitlines():
            for word in shlex.split(line, comments=True):
                if re.match(r"(deploy|scripts)/", word):
                    assert (ROOT / word).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert not missing
