"""The chart and the overlays say the same: they are two ways to the same objects."""

import manifests

# Helm's own labels, and who it was that rendered.
OWN = ("app.kubernetes.io/instance", "app.kubernetes.io/version", "app.kubernetes.io/managed-by",
       "app.kubernetes.io/part-of", "helm.sh/chart")


def normal(value):
    """Without what may differ: labels of the tool's own, namespaces, the order of named lists."""
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()
                if key not in OWN and item not in (None, {}) and not (isinstance(item, dict) and item and set(item) <= set(OWN))}
    if isinstance(value, list):
        items = [normal(item) for item in value]
        if items and all(isinstance(item, dict) and ("name" in item or "mountPath" in item) for item in items):
            items.sort(key=lambda item: (str(item.get("name")), str(item.get("mountPath"))))
        return items
    return value


def by_name(objects):
    found = {}
    for obj in objects:
        if obj["kind"] == "Namespace":
            continue
        obj = normal(obj)
        # An object's own labels select nothing, but for Grafana's.
        labels = obj["metadata"].pop("labels", {})
        obj["metadata"]["labels"] = {key: value for key, value in labels.items() if key != "app.kubernetes.io/name"}
        obj["metadata"].pop("namespace", None)  # a PersistentVolume has none
        found[manifests.name_of(obj)] = obj
    return found


def differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                yield f"{path}.{key}: only in {'the chart' if key in b else 'kustomize'}"
            else:
                yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b)):
            yield from differences(one, other, f"{path}[{index}]")
    elif a != b:
        yield f"{path}: {str(a)[:100]} in kustomize, {str(b)[:100]} in the chart"


def between(overlay, chart):
    yield from differences(by_name(overlay), by_name(chart))
