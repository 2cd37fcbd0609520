"""deploy/validate refuses what it should: manifests with one thing wrong each. Runs with build/deploy-tools' python."""

import copy
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "deploy/checks"))
os.environ.setdefault("LAMINAD", str(ROOT / "build/release/bin/laminad"))

import manifests  # noqa: E402
import observability  # noqa: E402
import parity  # noqa: E402
import pytest  # noqa: E402
import render  # noqa: E402
import settings  # noqa: E402


@pytest.fixture(scope="module")
def tls():
    return render.kustomize("tls").objects()


@pytest.fixture(scope="module")
def monitoring():
    return render.kustomize("monitoring").objects()


def named(objects, kind, name="laminad"):
    (found,) = [obj for obj in objects if obj["kind"] == kind and obj["metadata"]["name"] == name]
    return found


def spec(objects):
    return named(objects, "DaemonSet")["spec"]["template"]["spec"]


def container(objects):
    return spec(objects)["containers"][0]


def set_environment(objects, name, value):
    entries = container(objects)["env"]
    entries[:] = [entry for entry in entries if entry["name"] != name]
    if value is not None:
        entries.append({"name": name, "value": value})


def complaints(check, objects, change):
    changed = copy.deepcopy(objects)
    change(changed)
    return "\n".join(map(str, check(changed)))


SCHEMAS = {
    "a misspelt field": (lambda o: container(o).update(imagePullPolcy="Always"), "imagePullPolcy"),
    "a port that is a string": (lambda o: container(o)["ports"][0].update(containerPort="50051"), "50051"),
    "a missing selector": (lambda o: named(o, "DaemonSet")["spec"].pop("selector"), "selector"),
    "a kind that is not": (lambda o: o.append({"apiVersion": "apps/v1", "kind": "Daemon", "metadata": {"name": "x"}}), "Daemon"),
    "a certificate's field": (lambda o: named(o, "Certificate")["spec"].update(dnsName="x"), "dnsName is not a field"),
    "a certificate without issuer": (lambda o: named(o, "Certificate")["spec"].pop("issuerRef"), "issuerRef"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(tls, name):
    change, expected = SCHEMAS[name]
    assert expected in complaints(manifests.against_schemas, tls, change)


def test_schemas_of_the_operator(monitoring):
    def change(objects):
        named(objects, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    assert "intervall is not a field" in complaints(manifests.against_schemas, monitoring, change)


SECURITY = {
    "root": (lambda o: spec(o)["securityContext"].update(runAsUser=0), "not root"),
    "no seccomp": (lambda o: spec(o)["securityContext"].pop("seccompProfile"), "seccompProfile"),
    "escalation": (lambda o: container(o)["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation"),
    "a capability": (lambda o: container(o)["securityContext"]["capabilities"].update(add=["NET_RAW"]), "capabilities"),
    "a writable root": (lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False), "readOnlyRootFilesystem"),
    "privileged": (lambda o: container(o)["securityContext"].update(privileged=True), "privileged"),
    "a hostPath": (lambda o: spec(o)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "hostPath"),
    "the host's IPC": (lambda o: spec(o).update(hostIPC=True), "hostIPC"),
    "a host port": (lambda o: container(o)["ports"][0].update(hostPort=50051), "hostPort"),
    "a token": (lambda o: spec(o).pop("automountServiceAccountToken"), "automountServiceAccountToken"),
    "no limit": (lambda o: container(o)["resources"]["limits"].pop("memory"), "memory"),
}


@pytest.mark.parametrize("name", SECURITY)
def test_pod_security(tls, name):
    change, expected = SECURITY[name]
    assert expected in complaints(manifests.pod_security, tls, change)


SETTINGS = {
    "an unknown setting": (lambda o: set_environment(o, "LAMINA_LISTENS", "x"), "no setting LAMINA_LISTENS"),
    "an unknown flag": (lambda o: container(o).update(args=["--cuda"]), "no flag --cuda"),
    "another port": (lambda o: set_environment(o, "LAMINA_LISTEN", "unix:/run/lamina/laminad.sock,0.0.0.0:50052"), "listens on"),
    "no TLS and not insecure": (lambda o: set_environment(o, "LAMINA_TLS_CERT", None), "refuses an address"),
    "insecure beside TLS": (lambda o: set_environment(o, "LAMINA_INSECURE", "true"), "beside TLS"),
    "a gRPC probe of TLS": (lambda o: container(o).update(readinessProbe={"grpc": {"port": 50051}}), "speaks no TLS"),
    "no probe": (lambda o: container(o).pop("startupProbe"), "no startupProbe"),
    "a probe's flag": (lambda o: container(o)["livenessProbe"]["exec"]["command"].insert(1, "--quick"), "no --quick"),
    "a hasty liveness": (lambda o: container(o)["livenessProbe"].update(failureThreshold=1), "gives up"),
    "nothing mounted": (lambda o: container(o)["volumeMounts"].pop(), "nothing is mounted"),
    "checkpoints elsewhere": (lambda o: set_environment(o, "LAMINA_CHECKPOINTS", "/data"), "nothing is mounted at /data"),
    "a short grace": (lambda o: spec(o).update(terminationGracePeriodSeconds=30), "grace period"),
    "no preStop": (lambda o: container(o).pop("lifecycle"), "no preStop"),
    "regions beyond the limit": (lambda o: set_environment(o, "LAMINA_TOTAL_REGION_CAP_BYTES", "15GiB"), "regions of"),
    "no GPU": (lambda o: container(o)["resources"]["limits"].pop("nvidia.com/gpu"), "no GPU"),
    "a Service's port": (lambda o: named(o, "Service")["spec"]["ports"][0].update(targetPort="http"), "leads to port http"),
    "a Service's selector": (lambda o: named(o, "Service")["spec"]["selector"].update(a="b"), "selects other pods"),
    "no policy": (lambda o: o.remove(named(o, "NetworkPolicy")), "no NetworkPolicy"),
    "no budget": (lambda o: o.remove(named(o, "PodDisruptionBudget")), "no PodDisruptionBudget"),
    "no claim": (lambda o: o.remove(named(o, "PersistentVolumeClaim", "laminad-sockets")), "no claim laminad-sockets"),
    "no certificate": (lambda o: o.remove(named(o, "Certificate")), "no certificate makes"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tls, name):
    change, expected = SETTINGS[name]
    assert expected in complaints(settings.of_a_rendering, tls, change)


def test_settings_of_monitoring(monitoring):
    def change(objects):
        named(objects, "PodMonitor")["spec"].update(jobLabel="app")
    assert "another job" in complaints(settings.of_a_rendering, monitoring, change)


def test_nothing_is_complained_of_as_it_is(tls, monitoring):
    for objects in (tls, monitoring):
        for check in (manifests.against_schemas, manifests.pod_security, settings.of_a_rendering):
            assert complaints(check, objects, lambda _: None) == ""


def test_parity(tls):
    other = render.chart("tls").objects()
    assert not list(parity.between(tls, other))
    container(other)["env"][0]["value"] = "other"
    named(other, "Service")["spec"].pop("internalTrafficPolicy")
    assert len(list(parity.between(tls, other))) == 2


@pytest.mark.parametrize("expression, names", [
    ('sum by (instance) (rate(lamina_steps_total{job="lamina_not_this"}[5m]))', {"lamina_steps_total"}),
    ("max by (UUID) (DCGM_FI_DEV_GPU_UTIL) * on (UUID) group_right () lamina_device_info{}", {"DCGM_FI_DEV_GPU_UTIL", "lamina_device_info"}),
    ("lamina:step_seconds:mean5m > 2", {"lamina:step_seconds:mean5m"}),
])
def test_metrics_of_an_expression(expression, names):
    assert observability.metrics_of(expression) == names
