"""What is asked of any manifest: schemas, pod security, the policy checker. Each function yields complaints."""

import functools
import json
import subprocess

import cloudcoil.models.cert_manager.v1 as cert_manager
import cloudcoil.models.prometheus_operator.v1 as prometheus_operator
import kubernetes_validate
import kubernetes_validate.utils as schemas
import pydantic
import render

# The least that the chart takes, and the newest that there is a schema of.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
RESOURCES = {
    ("cert-manager.io/v1", "Certificate"): cert_manager.Certificate,
    ("cert-manager.io/v1", "Issuer"): cert_manager.Issuer,
    ("monitoring.coreos.com/v1", "PodMonitor"): prometheus_operator.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus_operator.PrometheusRule,
}
# A file of all of Kubernetes' definitions is read anew for each object else.
schemas.schema_contents = functools.lru_cache(maxsize=None)(schemas.schema_contents)


def name_of(obj):
    return f"{obj.get('kind')}/{obj.get('metadata', {}).get('name')}"


def unknown_keys(given, known, path=""):
    """Keys of `given` that a model dropped on the way to `known`: pydantic ignores what it does not know."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            if key not in known:
                yield f"{path}.{key} is not a field"
            else:
                yield from unknown_keys(value, known[key], f"{path}.{key}")
    elif isinstance(given, list) and isinstance(known, list):
        for index, (a, b) in enumerate(zip(given, known)):
            yield from unknown_keys(a, b, f"{path}[{index}]")


def against_schemas(objects):
    for obj in objects:
        model = RESOURCES.get((obj.get("apiVersion"), obj.get("kind")))
        if model is not None:
            try:
                parsed = model.model_validate(obj).model_dump(mode="json", by_alias=True, exclude_unset=True)
            except pydantic.ValidationError as error:
                yield f"{name_of(obj)}: {error}"
                continue
            yield from (f"{name_of(obj)}: {complaint}" for complaint in unknown_keys(obj, parsed))
            continue
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(obj, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(str(step) for step in error.path)
                yield f"{name_of(obj)}: Kubernetes {version}: {where}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError as error:
                yield f"{name_of(obj)}: {error.message}"


# Volume types that "restricted" allows.
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
                      "secret"}


def pod_security(objects):
    """Kubernetes' pod security standard "restricted", and what this project asks beyond it: a read-only root, no token
    of the API server's, requests and limits."""
    for obj in objects:
        pod = render.pod_spec(obj)
        if pod is None:
            continue
        spec, where = pod["spec"], name_of(obj)
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{where}: {field}"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{where}: automountServiceAccountToken must be false"
        for volume in spec.get("volumes", []):
            kinds = set(volume) - {"name"}
            if not kinds <= RESTRICTED_VOLUMES:
                yield f"{where}: volume {volume['name']} is a {kinds.pop()}"
        for container in render.containers(pod):
            inside = f"{where}: {container['name']}"
            mine = container.get("securityContext", {})

            def effective(field):
                return mine.get(field, spec.get("securityContext", {}).get(field))

            if effective("runAsNonRoot") is not True or effective("runAsUser") in (None, 0):
                yield f"{inside}: must run as a user that is named and not root"
            if (effective("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{inside}: seccompProfile must be RuntimeDefault or Localhost"
            if mine.get("privileged"):
                yield f"{inside}: privileged"
            if mine.get("allowPrivilegeEscalation") is not False:
                yield f"{inside}: allowPrivilegeEscalation must be false"
            capabilities = mine.get("capabilities", {})
            if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
                yield f"{inside}: must drop ALL capabilities and add none"
            if mine.get("readOnlyRootFilesystem") is not True:
                yield f"{inside}: readOnlyRootFilesystem must be true"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{inside}: hostPort"
            for kind in ("requests", "limits"):
                missing = {"cpu", "memory"} - set(container.get("resources", {}).get(kind, {}))
                if missing:
                    yield f"{inside}: resources.{kind} lacks {', '.join(sorted(missing))}"


# A pod that the policy checker must refuse: one that looks at nothing finds nothing.
CANARY = """apiVersion: v1
kind: Pod
metadata: {name: canary, namespace: canary}
spec:
  containers:
    - {name: canary, image: canary, securityContext: {privileged: true}}
"""


def policy(folder):
    """checkov over a folder of rendered manifests, as deploy/checkov.yaml asks."""
    canary = folder / "canary.yaml"
    canary.write_text(CANARY)
    done = subprocess.run(["checkov", "--config-file", render.DEPLOY / "checkov.yaml", "-d", folder, "-o", "json"],
                          capture_output=True, text=True)
    canary.unlink()
    try:
        results = json.loads(done.stdout)["results"]
    except (json.JSONDecodeError, KeyError, TypeError):
        yield f"checkov: {done.stdout[-1000:]} {done.stderr[-1000:]}"
        return
    refused = {failed["check_id"] for failed in results["failed_checks"] if failed["resource"] == "Pod.canary.canary"}
    if "CKV_K8S_16" not in refused:
        yield "checkov takes a privileged container"
    for failed in results["failed_checks"]:
        if failed["resource"] != "Pod.canary.canary":
            yield f"{failed['file_path']} {failed['resource']}: {failed['check_id']} {failed['check_name']}"
    for broken in results.get("parsing_errors", []):
        yield f"checkov cannot read {broken}"
