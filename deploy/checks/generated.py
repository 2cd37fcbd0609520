"""Files under deploy/ that are made of others."""

import pathlib
import subprocess
import sys

import yaml

DEPLOY = pathlib.Path(__file__).resolve().parents[1]


def dashboard():
    return subprocess.run([sys.executable, DEPLOY / "grafana/dashboard.py"], capture_output=True, text=True,
                          check=True).stdout


def prometheus_rule():
    """The Prometheus operator's form of rules.yaml."""
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text())
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "laminad"},
        "spec": rules,
    }
    return "# Made of rules.yaml by deploy/generate.\n" + yaml.safe_dump(resource, sort_keys=False, width=190)


FILES = {"grafana/laminad.json": dashboard, "prometheus/prometheusrule.yaml": prometheus_rule}


if __name__ == "__main__":
    for name, make in FILES.items():
        if sys.argv[1:] == ["--write"]:
            (DEPLOY / name).write_text(make())
