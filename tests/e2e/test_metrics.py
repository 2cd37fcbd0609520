"""What a daemon exports, against docs/metrics.md."""

import re

import lamina
import numpy as np
from daemon import ROOT, Daemon

# Labels whose values the page cannot list: the daemon's own, and gRPC's.
OPEN_LABELS = {"version", "commit", "backend", "device", "le", "quantile", "grpc_service", "grpc_method", "grpc_type", "grpc_code"}


def documented():
    """{family: (type, labels, the row's text)}."""
    rows = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if line.startswith("| `"):
            name, kind, labels, meaning = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:5]]
            rows[name.strip("`")] = (kind, labels, meaning)
    return rows


def test_a_scrape_says_what_the_page_says():
    with Daemon() as daemon:
        with lamina.connect(daemon.target) as client:
            stack = client.create_stack("s", batch_size=1, max_seq_length=8, hidden_size=16, heads=2, num_hidden_layers=1)
            y, context = stack.forward(np.ones((1, 8, 16), np.float32))
            stack.backward(context, y)
            stack.apply_gradients(lr=1e-3)
        rows = documented()
        page = (ROOT / "docs/metrics.md").read_text()
        found = {}
        for series in daemon.metrics():
            name, _, labels = series.partition("{")
            family = next((n for n in (name, re.sub(r"_(bucket|sum|count)$", "", name)) if n in rows), None)
            if name.startswith("exposer_"):
                continue
            assert family is not None, f"{series}: not in docs/metrics.md"
            kind, named, meaning = rows[family]
            assert kind == "histogram" or family == name, series
            found.setdefault(family, set())
            for label, value in re.findall(r'(\w+)="([^"]*)"', labels):
                found[family].add(label)
                if label in OPEN_LABELS:
                    continue
                # direction's values are said once, at the top.
                assert f"`{value}`" in (page if label in ("direction", "phase") else meaning), f"{series}: {value} is not in its row"
        assert set(found) == set(rows), "the page names others"
        for family, (kind, named, meaning) in rows.items():
            labels = set(re.findall(r"`(\w+)`", named)) or ({"grpc_service", "grpc_method", "grpc_type"} if "the same" in named else set())
            assert labels - found[family] == set(), family
