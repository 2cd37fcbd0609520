"""The daemon started with what each manifest sets, on paths and ports of this machine, and asked by its probes; and that
its health does not wait for a step."""

import pathlib
import subprocess
import threading
import time

import lamina
import numpy as np
import pytest
import yaml
from daemon import BINARY, ROOT, Daemon

OVERLAYS = sorted(path.parent.name for path in (ROOT / "deploy/kubernetes/overlays").glob("*/kustomization.yaml"))
MOUNTED = {"/run/lamina": "run", "/var/lib/lamina": "checkpoints", "/etc/lamina/tls": "tls"}


def rendered(tools, overlay):
    done = subprocess.run([tools / "kubectl", "kustomize", ROOT / "deploy/kubernetes/overlays" / overlay],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [obj for obj in yaml.safe_load_all(done.stdout) if obj]


def pod_of(objects):
    (pod,) = [obj["spec"]["template"]["spec"] for obj in objects if obj["kind"] in ("DaemonSet", "StatefulSet", "Job")]
    return pod


def make_certificates(folder):
    """What cert-manager would put into the Secret: tls.crt, tls.key, ca.crt."""
    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=ca",
            "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=laminad",
            "-keyout", "tls.key", "-out", "tls.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2", "-extfile", "names",
            "-out", "tls.crt")
    (folder / "tls.key").chmod(0o440)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_daemon_takes_what_the_manifest_sets(overlay, tools, lamina_cli, tmp_path, monkeypatch):
    pod = pod_of(rendered(tools, overlay))
    (container,) = [c for c in pod.get("initContainers", []) + pod["containers"] if c["name"] == "laminad"]
    here = {inside: tmp_path / name for inside, name in MOUNTED.items()}
    for folder in here.values():
        folder.mkdir(mode=0o700)
    make_certificates(here["/etc/lamina/tls"])

    def on_this_machine(value):
        for inside, folder in here.items():
            value = value.replace(inside, str(folder))
        return value.replace(":50051", ":0").replace(":9464", ":0")

    settings = {entry["name"]: on_this_machine(entry["value"]) for entry in container["env"]}
    assert settings["LAMINA_DEVICE"] in ("auto", "cpu", "cuda:0")
    settings["LAMINA_DEVICE"] = "cpu"
    log = tmp_path / "log"
    with open(log, "w") as sink:
        process = subprocess.Popen([BINARY], env=settings, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + 60
        while '"ready"' not in log.read_text() and "event=ready" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        words = ["--target", f"unix:{here['/run/lamina']}/laminad.sock", "health"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container[kind]
            if "exec" in probe:
                words = [on_this_machine(word) for word in probe["exec"]["command"][1:]]
            subprocess.run([lamina_cli, *words], check=True, timeout=probe["timeoutSeconds"] + 5)
        # The client's containers do what they are told to.
        for other in pod.get("initContainers", []) + pod["containers"]:
            if other is not container:
                words = [on_this_machine(word) for word in other["command"][1:] + other["args"]]
                words = ["1" if before == "--seconds" else word for before, word in zip(["", *words], words)]
                subprocess.run([lamina_cli, *words], check=True, timeout=60, stdout=subprocess.DEVNULL)
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def test_health_does_not_wait_for_a_step(tools, lamina_cli):
    """Probes are answered within their time while one step takes longer than several of them."""
    (container,) = [c for c in pod_of(rendered(tools, "cpu"))["containers"]]
    allowed = container["livenessProbe"]["timeoutSeconds"]
    with Daemon() as daemon, lamina.connect(daemon.target) as client:
        stack = client.create_stack("slow", batch_size=8, max_seq_length=512, hidden_size=512, heads=8, num_hidden_layers=6,
                                    training=False, seed=1)
        x = client.empty((8, 512, 512), "fp32")
        x[:] = np.random.default_rng(0).standard_normal(x.shape)
        took = []

        def run():
            began = time.monotonic()
            stack.forward(x)
            took.append(time.monotonic() - began)

        step = threading.Thread(target=run)
        step.start()
        probes = []
        while not took:
            began = time.monotonic()
            subprocess.run([lamina_cli, "--target", daemon.target, "health"], check=True, stdout=subprocess.DEVNULL)
            if not took:
                probes.append(time.monotonic() - began)
        step.join()
        assert len(probes) >= 3, f"a step of {took[0]:.1f} s shows nothing"
        assert max(probes) < min(allowed, took[0])
