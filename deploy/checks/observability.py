"""Rules and dashboard, without a daemon: tests/deploy asks a real Prometheus. Functions yield complaints."""

import collections
import json
import re
import subprocess

import generated
import yaml

DEPLOY = generated.DEPLOY
ROOT = DEPLOY.parent
# dcgm-exporter's, and what Prometheus itself adds.
FOREIGN = re.compile(r"DCGM_FI_\w+|up")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=DEPLOY / "prometheus")
    if done.returncode != 0:
        yield (done.stdout + done.stderr).strip()


def rules():
    return yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())["groups"]


def alerts():
    return [rule for group in rules() for rule in group["rules"] if "alert" in rule]


def panels():
    """(row's title, panel) of the committed dashboard."""
    row = None
    for panel in json.loads((DEPLOY / "grafana/laminad.json").read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            yield row, panel


def documented():
    """Metrics of docs/metrics.md, with the names that a histogram's series have."""
    names = set()
    for name, kind in re.findall(r"^\| `(\w+)` \| (\w+)", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE):
        names |= {name} | ({f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else set())
    return names


def metrics_of(expression):
    """Names of series that an expression selects."""
    expression = re.sub(r'"(\\.|[^"\\])*"', '""', expression)
    expression = re.sub(r"\b(by|on|group_left|group_right|without|ignoring)\s*\([^)]*\)", "", expression)
    expression = re.sub(r"\{[^}]*\}", "{}", expression)
    return set(re.findall(r"\b(?:lamina|grpc_server|process|up|DCGM_FI)[\w:]*", expression))


def rules_are_right():
    yield from run("promtool", "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml")
    yield from run("promtool", "check", "config", "prometheus.yaml")
    records = {rule["record"] for group in rules() for rule in group["rules"] if "record" in rule}
    for rule in (rule for group in rules() for rule in group["rules"]):
        for name in metrics_of(rule["expr"]) - records - documented():
            if not FOREIGN.fullmatch(name):
                yield f"{rule.get('alert', rule.get('record'))}: docs/metrics.md has no {name}"


def rules_are_tested():
    yield from run("promtool", "test", "rules", "rules_test.yaml")
    seen = collections.defaultdict(set)
    for test in yaml.safe_load((DEPLOY / "prometheus/rules_test.yaml").read_text())["tests"]:
        for case in test.get("alert_rule_test", []):
            seen[case["alertname"]].add(bool(case["exp_alerts"]))
    for alert in alerts():
        if seen[alert["alert"]] != {True, False}:
            yield f"{alert['alert']}: rules_test.yaml must show it fire and stay quiet"


def alerts_have_runbooks():
    sections = re.findall(r"^## (Lamina\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    for alert in alerts():
        if alert["annotations"].get("runbook") != f"docs/runbook.md#{alert['alert'].lower()}":
            yield f"{alert['alert']}: annotation runbook must lead to docs/runbook.md#{alert['alert'].lower()}"
        if alert["alert"] not in sections:
            yield f"docs/runbook.md has no section {alert['alert']}"
        if alert["labels"].get("severity") not in ("warning", "critical"):
            yield f"{alert['alert']}: severity must be warning or critical"
    for section in set(sections) - {alert["alert"] for alert in alerts()}:
        yield f"docs/runbook.md: no alert {section}"


def files_are_as_generated():
    for name, make in generated.FILES.items():
        if (DEPLOY / name).read_text() != make():
            yield f"deploy/{name} is not what deploy/generate writes"


ROWS = ["Health", "Throughput", "Latency", "Queue", "Errors", "Memory", "GPU"]


def dashboard_is_right():
    board = json.loads((DEPLOY / "grafana/laminad.json").read_text())
    titles = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    if titles != ROWS:
        yield f"rows {titles}, not {ROWS}"
    ids = [panel["id"] for panel in board["panels"]]
    if len(set(ids)) != len(ids):
        yield "two panels with one id"
    taken = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if x >= 24 or taken.setdefault((x, y), panel["title"]) != panel["title"]:
                    yield f"{panel['title']} lies over {taken.get((x, y), 'the edge')}"
                    break
    known = documented()
    for row, panel in panels():
        where = f"{row}: {panel['title']}"
        if panel.get("datasource", {}).get("uid") != "${datasource}":
            yield f"{where}: another data source than the variable's"
        for target in panel["targets"]:
            expression = target["expr"]
            if 'instance=~"$instance"' not in expression:
                yield f"{where}: {expression} asks for all daemons"
            for name in metrics_of(expression) - known:
                if not FOREIGN.fullmatch(name):
                    yield f"{where}: docs/metrics.md has no {name}"
