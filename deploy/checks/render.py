"""The manifests as a cluster would get them."""

import dataclasses
import logging
import pathlib
import subprocess

import helm_python as helm
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parents[1]
OVERLAYS = sorted(p.parent.name for p in (DEPLOY / "kubernetes/overlays").glob("*/kustomization.yaml"))
CHART = DEPLOY / "chart/lamina"
MONITORED = {"podMonitor": True, "rules": True, "dashboard": True}
CPU = {
    "kind": "StatefulSet", "device": "cpu", "gpu": {"count": 0}, "nodeSelector": {"nvidia.com/gpu.present": None},
    "tolerations": [], "totalRegionCap": "1GiB", "checkpoints": {"size": "5Gi"},
    "resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
}
# The chart's values that are rendered, by the overlay that says the same, if one does.
CHART_VALUES = {
    "daemonset": {},
    "cpu": CPU,
    "monitoring": {"monitoring": MONITORED},
    "tls": {"tls": {"enabled": True}},
    "all": {
        **CPU, "tls": {"enabled": True, "certManager": {"issuerRef": {"kind": "ClusterIssuer", "name": "site"}}},
        "auth": {"tokensSecret": "lamina-tokens", "roles": True},
        "monitoring": MONITORED, "allowUids": [1000, 1001], "env": {"LAMINA_LEASE": "60"},
        "imagePullSecrets": [{"name": "pull"}], "runtimeClassName": "nvidia", "priorityClassName": "training",
    },
}


@dataclasses.dataclass
class Rendering:
    name: str  # "kustomize cpu", "chart cpu"
    text: str

    def objects(self):
        return [o for o in yaml.safe_load_all(self.text) if o]


def kustomize(overlay):
    """Raises RuntimeError with kustomize's own words."""
    done = subprocess.run(["kubectl", "kustomize", DEPLOY / "kubernetes/overlays" / overlay], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    return Rendering(f"kustomize {overlay}", done.stdout)


def chart(name):
    logging.disable(logging.INFO)
    with helm.Chart.load(CHART) as loaded:
        values = CHART_VALUES[name]
        loaded.validate_schema(values)
        files = loaded.render(values, name="laminad", namespace="lamina")
    text = "\n---\n".join(text for path, text in sorted(files.items()) if path.endswith(".yaml") and text.strip())
    return Rendering(f"chart {name}", text)


def pod_spec(obj):
    """The pod template of a workload, or None."""
    template = obj.get("spec", {}).get("template")
    return template if isinstance(template, dict) and "containers" in template.get("spec", {}) else None


def containers(pod):
    return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def daemon(pod):
    """The container that runs laminad."""
    (found,) = [c for c in containers(pod) if c["name"] == "laminad"]
    return found
