"""plan without a daemon: one config with --device, and the table of --memory."""

import csv
import io
import json
import subprocess

import pytest

import conftest

GIB = 2**30
TABLE = ["plan", "--memory", "32GiB", "--model", "bert-large", "--seq", "128,512"]
MEMORY_FLAGS = {"normalize_invertible", "gelu_checkpoint", "activation_checkpointing"}


def lamina(*arguments):
    """Runs where no daemon can be reached: whatever works needs none."""
    environment = conftest.clean_environment() | {"LAMINA_TARGET": "unix:/nowhere/d.sock"}
    return subprocess.run([conftest.LAMINA, *map(str, arguments)], env=environment, capture_output=True, text=True,
                          timeout=120)


def printed(*arguments):
    done = lamina("--output", "json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    done = lamina("--output", "json", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    return json.loads(done.stderr)["error"]["message"]


@pytest.fixture(scope="module")
def table():
    return printed(*TABLE)


def test_the_table_covers_every_batch_until_memory_ends(table):
    assert table["model"] == "bert-large" and table["memory_bytes"] == 32 * GIB and table["device"] == "cuda"
    assert table["config"]["dtype"] == "bf16" and table["config"]["num_hidden_layers"] == 24
    assert table["config"]["training"] is True
    assert {row["seq"] for row in table["rows"]} == {128, 512}
    for seq in (128, 512):
        rows = [row for row in table["rows"] if row["seq"] == seq]
        assert rows[0]["flags"] == [] and rows[0]["micro_batch_from"] == 1
        for row, following in zip(rows, rows[1:]):
            assert following["micro_batch_from"] == row["micro_batch_to"] + 1
        for row in rows:
            assert set(row) == {"seq", "micro_batch_from", "micro_batch_to", "flags", "bytes"}
            assert set(row["flags"]) <= MEMORY_FLAGS
            assert row["micro_batch_from"] <= row["micro_batch_to"]
            assert row["bytes"] <= 32 * GIB
        assert table["max_micro_batch"][str(seq)] == rows[-1]["micro_batch_to"] > rows[0]["micro_batch_to"]
    assert table["max_micro_batch"]["128"] > table["max_micro_batch"]["512"]


def test_each_row_is_the_plan_of_its_config(table):
    """At a row's end its flags fit, at the next batch they do not; and no row before it would have done."""

    def total(row, batch, flags):
        given = ["--" + flag.replace("_", "-") for flag in flags]
        return printed("plan", "--device", "cuda", "--model", "bert-large", "--dtype", "bf16", "--max-contexts", 1,
                       "--batch-size", batch, "--max-seq-length", row["seq"], *given)["total_bytes"]

    for row in table["rows"]:
        assert total(row, row["micro_batch_to"], row["flags"]) == row["bytes"]
        assert total(row, row["micro_batch_to"] + 1, row["flags"]) > 32 * GIB
        if row["micro_batch_from"] > 1:
            assert total(row, row["micro_batch_from"], []) > 32 * GIB


def test_text_and_csv_say_the_same(table):
    done = lamina("--output", "csv", *TABLE)
    assert done.returncode == 0
    rows = [{"seq": int(row["seq"]), "micro_batch_from": int(row["micro_batch_from"]),
             "micro_batch_to": int(row["micro_batch_to"]), "bytes": int(row["bytes"]),
             "flags": row["flags"].split("+") if row["flags"] else []}
            for row in csv.DictReader(io.StringIO(done.stdout))]
    assert rows == table["rows"]
    text = lamina(*TABLE, "--output", "table").stdout
    assert text == lamina(*TABLE).stdout
    lines = text.splitlines()
    assert lines[0].split() == ["SEQ", "MICRO-BATCH", "SIZE", "BYTES", "FLAGS"]
    assert len(lines) == 1 + len(table["rows"]) + 2
    for row in table["rows"]:
        ends = sorted({row["micro_batch_from"], row["micro_batch_to"]})
        assert any(f" {'-'.join(map(str, ends))} " in line and f"{row['bytes']:,}" in line for line in lines)
    for seq, most in table["max_micro_batch"].items():
        assert any(line.split()[:2] == [seq, f"{most + 1}-"] and line.endswith("out of memory") for line in lines)


def test_the_config_by_hand(table):
    """The model is its config's fields and nothing else; an unordered or repeated length changes nothing."""
    by_hand = printed("plan", "--memory", 32 * GIB, "--seq", "512,128,512", "--hidden-size", 1024, "--heads", 16,
                      "--num-hidden-layers", 24, "--post-layer-norm")
    assert by_hand["model"] is None
    assert by_hand["rows"] == table["rows"]
    fp32 = printed(*TABLE, "--dtype", "fp32")
    assert fp32["max_micro_batch"]["128"] < table["max_micro_batch"]["128"]
    deeper = printed(*TABLE, "--num-hidden-layers", 30)
    assert deeper["max_micro_batch"]["128"] < table["max_micro_batch"]["128"]


def test_nothing_fits():
    none = printed("plan", "--memory", "1MB", "--model", "bert-base")
    assert none["rows"] == [] and none["max_micro_batch"] == {"128": 0, "512": 0}
    assert lamina("plan", "--memory", "1MB", "--model", "bert-base").stdout.count("out of memory") == 2


@pytest.mark.parametrize("extra", [[], ["--activation-checkpointing"], ["--no-training"], ["--dtype", "bf16"]])
def test_offline_is_what_the_daemon_plans(daemon, config_file, extra):
    here = printed("plan", "--device", "cpu", "--config", config_file(), *extra)
    there = daemon.json("plan", "--config", config_file(), *extra)
    for key in ("entries", "by_kind", "total_bytes", "context_bytes"):
        assert here[key] == there[key]
    assert here["device"] == "cpu" and "fits" not in here
    text = lamina("plan", "--device", "cpu", "--config", config_file(), *extra).stdout
    assert f"{here['total_bytes']:,}" in text and "workspace" in text


def test_a_model_for_the_daemon(daemon):
    plan = daemon.json("plan", "--model", "minilm-l6", "--batch-size", 2, "--max-seq-length", 16)
    assert plan["fits"] in (True, False) and plan["by_kind"]["weights"] > 4 * 6 * 12 * 384**2


def test_refusals(daemon, stack):
    assert "bert-large" in refused("plan", "--memory", "1GiB", "--model", "bert-huge")
    assert "32GiB" in refused("plan", "--memory", "lots", "--model", "bert-base")
    assert "hidden_size" in refused("plan", "--memory", "1GiB")
    assert "max_seq_length" in refused("plan", "--memory", "1GiB", "--model", "bert-base", "--seq", "8193")
    assert "--seq" in refused("plan", "--memory", "1GiB", "--model", "bert-base", "--seq", "a")
    assert "--seq needs --memory" in refused("plan", "--device", "cuda", "--model", "bert-base", "--seq", "128")
    assert "--batch-size" in refused(*TABLE, "--batch-size", 3)
    assert "--gelu-checkpoint" in refused(*TABLE, "--gelu-checkpoint")
    assert "batch_size" in refused("plan", "--device", "cuda", "--model", "bert-base")
    assert "--device" in refused("plan", "--device", "tpu", "--model", "bert-base")
    for command in (["stack", "list"], ["plan", "--device", "cpu", "--hidden-size", 8]):
        done = daemon.cli("--output", "csv", *command)
        assert done.returncode == 2 and "plan --memory" in done.stderr


def test_the_page_shows_what_is_printed(table):
    page = (conftest.ROOT / "docs/memory.md").read_text()
    assert lamina(*TABLE).stdout in page
    for seq, most in table["max_micro_batch"].items():
        assert f'"{seq}": {most}' in page
