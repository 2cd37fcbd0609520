"""What a daemon exports, against docs/metrics.md: nothing more, nothing less."""

import re
import urllib.request

import lamina
import numpy as np
import pytest
from daemon import ROOT, Daemon

# Labels whose values the page cannot list: the daemon's own, and gRPC's.
OPEN_LABELS = {"version", "commit", "backend", "device", "UUID", "ordinal", "grpc_service", "grpc_method", "grpc_type", "grpc_code"}
UNITS = {"seconds", "seconds (Unix)", "bytes", "ratio", "1", "0 or 1", "FLOPs", "FLOP/s", "steps", "sequences", "tokens", "calls", "stacks",
         "contexts", "sessions", "streams", "regions", "checkpoints", "RPCs", "descriptors"}
SUFFIX_OF_UNIT = {"seconds": "_seconds", "seconds (Unix)": "_seconds", "bytes": "bytes", "ratio": "_ratio", "FLOP/s": "_per_second"}


def documented():
    """{family: {type, unit, labels, meaning, example}}."""
    rows, last = {}, set()
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 6, line
            name, kind, unit, named, meaning, example = cells
            labels = set(re.findall(r"`(\w+)`", named)) | (last if named.startswith("the same") else set())
            last = labels
            rows[name.strip("`")] = {"type": kind, "unit": unit, "labels": labels, "meaning": meaning, "example": example}
    return rows


def scraped(daemon):
    """{family: {type, help, labels, values: {label: values}}} of one scrape."""
    with urllib.request.urlopen(f"http://{daemon.metrics_address}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.read().decode()
    families, helps = {}, {}
    family = None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            _, _, name, help_text = line.split(" ", 3)
            helps[name] = help_text
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in families, f"{name} comes twice"
            family = families[name] = {"type": kind, "help": helps[name], "series": [], "values": {}}
        elif line:
            series, value = line.rsplit(" ", 1)
            float(value)
            name, _, labels = series.partition("{")
            base = re.sub(r"_(bucket|sum|count)$", "", name) if family["type"] == "histogram" else name
            assert families.get(base) is family, f"{series}: stands under another family"
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
            found.pop("le", None)
            family["series"].append(set(found))
            for label, held in found.items():
                family["values"].setdefault(label, set()).add(held)
    return families


@pytest.fixture(scope="module")
def busy():
    """A daemon that has done some of everything."""
    with Daemon() as daemon:
        with lamina.connect(daemon.target) as client:
            stack = client.create_stack("s", batch_size=2, max_seq_length=8, hidden_size=16, heads=2, num_hidden_layers=1)
            y, context = stack.forward(np.ones((2, 8, 16), np.float32), lengths=np.array([3, 8], np.int32), training=True)
            stack.backward(context, y)
            stack.apply_gradients(lr=1e-3)
            stack.save()
            yield daemon, client, stack


def test_a_scrape_says_what_the_page_says(busy):
    daemon, _, _ = busy
    rows, families = documented(), scraped(daemon)
    assert set(families) == set(rows), "the page and the daemon name different metrics"
    page = (ROOT / "docs/metrics.md").read_text()
    for name, family in families.items():
        row = rows[name]
        assert family["type"] == row["type"], name
        assert family["help"], f"{name}: has no help"
        assert family["series"], f"{name}: has no series"
        for labels in family["series"]:
            assert labels == row["labels"], f"{name}: its labels are {labels}, the page says {row['labels']}"
        for label, values in family["values"].items():
            if label in OPEN_LABELS:
                continue
            # direction's values are said once, at the top; ranks as a range.
            where = page if label in ("direction", "phase") else row["meaning"]
            for value in values - ({"2", "3", "4"} if label == "rank" else set()):
                assert f"`{value}`" in where, f"{name}: {label} {value} is not in its row"


def test_the_page_follows_the_conventions():
    for name, row in documented().items():
        assert row["unit"] in UNITS, f"{name}: unit {row['unit']!r}"
        stem = name[: -len("_total")] if row["type"] == "counter" else name
        assert (row["type"] == "counter") == name.endswith("_total"), f"{name}: counters alone end in _total"
        suffix = SUFFIX_OF_UNIT.get(row["unit"])
        if suffix and not name.startswith("lamina_activation_bytes"):
            assert stem.endswith(suffix), f"{name}: does not end in its unit"
        assert len(row["meaning"]) > 10, f"{name}: has no meaning"
        # An example that names the metric itself, or another of the page whose sense it gives.
        assert re.search(r"`[^`]*\b" + name + r"(_bucket|_sum|_count)?\b[^`]*`", row["example"]), f"{name}: its example does not use it"


def test_every_name_of_the_examples_exists():
    rows = documented()
    for name, row in rows.items():
        for used in re.findall(r"\b(?:lamina|grpc|process)_[a-z_]+", row["example"]):
            base = re.sub(r"_(bucket|sum|count)$", "", used)
            assert base in rows or used.startswith("grpc_") and used in ("grpc_method", "grpc_code") , f"{name}: its example has {used}"


def test_tokens_are_real_or_padding(busy):
    daemon, client, stack = busy

    def tokens():
        metrics = daemon.metrics()
        return [metrics[f'lamina_tokens_total{{direction="forward_eval",kind="{kind}"}}'] for kind in ("real", "padding")]

    x = np.ones((2, 8, 16), np.float32)
    before = tokens()
    stack.forward(x, lengths=np.array([3, 8], np.int32), training=False)
    assert np.subtract(tokens(), before).tolist() == [11, 5]
    mask = np.zeros((2, 1, 1, 8), np.float32)
    mask[0, ..., 2:] = -10000
    mask[1, ..., 7:] = -np.inf
    mask[1, ..., 0] = -5  # leans away from a key and hides nothing
    stack.forward(x, mask=mask, training=False)
    assert np.subtract(tokens(), before).tolist() == [11 + 9, 5 + 7]
    stack.forward(x, training=False)
    assert np.subtract(tokens(), before).tolist() == [11 + 9 + 16, 5 + 7]


def test_flops_are_held_against_the_devices_peak(busy):
    daemon, _, stack = busy
    stack.forward(np.ones((2, 8, 16), np.float32), training=False)
    metrics = daemon.metrics()
    peak = metrics['lamina_device_peak_flops_per_second{dtype="fp32"}']
    achieved = metrics['lamina_achieved_flops_per_second{direction="forward_eval"}']
    assert peak > 1e8
    assert 0 < achieved <= peak
    assert metrics['lamina_mfu_ratio{direction="forward_eval"}'] == pytest.approx(achieved / peak, rel=1e-5)


def test_what_sessions_hold_is_ranked(busy):
    daemon, client, stack = busy

    def held(kind):
        metrics = daemon.metrics()
        return [metrics[f'lamina_session_memory_bytes{{kind="{kind}",rank="{rank}"}}'] for rank in (1, 2, 3, 4, 5, "rest")]

    others = [lamina.connect(daemon.target) for _ in range(7)]
    try:
        keep = [other.empty((1 << (18 + power),), "fp32") for power, other in enumerate(others)]
        for ranked, mebibytes in zip(held("regions"), (64, 32, 16, 8, 4)):  # a client's regions have room for a little more
            assert mebibytes << 20 <= ranked <= (mebibytes + 4) << 20
        assert held("regions")[5] >= 3 << 20  # two of them, and the client of the fixture
        assert sum(held("regions")) == daemon.metrics()["lamina_region_bytes"]
        assert sum(held("activations")) == 0
        y, context = others[0].stack("s").forward(keep[0][: 2 * 8 * 16].reshape(2, 8, 16), training=True)
        assert sum(held("activations")) == daemon.metrics()["lamina_activation_bytes_in_use"] > 0
        others[0].stack("s").backward(context, y)
        assert sum(held("activations")) == 0
        del keep
    finally:
        for other in others:
            other.close()
    assert sum(series.startswith("lamina_session_memory_bytes") for series in daemon.metrics()) == 12


def test_checkpoints_have_an_age(busy):
    daemon, _, stack = busy
    stack.save()
    metrics = daemon.metrics()
    assert metrics["lamina_checkpoints_enabled"] == 1
    assert 0 <= metrics["lamina_checkpoint_age_seconds"] < 30
    with pytest.raises(lamina.LaminaError):
        stack.load("never-saved")
    assert daemon.metrics()['lamina_checkpoint_failures_total{op="load"}'] == 0
    (daemon.checkpoints / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(lamina.LaminaError):
        stack.load("broken")
    assert daemon.metrics()['lamina_checkpoint_failures_total{op="load"}'] == 1
