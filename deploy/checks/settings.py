"""What manifests say to the programs in the image, against what those say of themselves. Functions yield complaints."""

import functools
import os
import pathlib
import re
import subprocess

import render

LAMINAD = pathlib.Path(os.environ["LAMINAD"])
LAMINA = LAMINAD.parent / "lamina"
SOCKET = "unix:/run/lamina/laminad.sock"
FILES = ("LAMINA_TLS_CERT", "LAMINA_TLS_KEY", "LAMINA_TLS_CLIENT_CA", "LAMINA_TOKENS", "LAMINA_ROLES")
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# A region counts for the daemon and what it maps besides; a quarter of the limit is left for stacks and the process.
REGION_SHARE = 0.75


@functools.lru_cache(maxsize=None)
def usage(program, *command):
    done = subprocess.run([program, *command, "--help"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} {' '.join(command)} --help: {done.stderr.strip()}")
    return done.stdout


def daemon_settings():
    """{environment variable: flag} that laminad has."""
    return {variable: flag for flag, variable in re.findall(r"(--[a-z-]+)[^\n]*\(Env:(LAMINA_\w+)\)", usage(LAMINAD))}


def environment(container):
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def bytes_of(quantity):
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()
    return float(number) * UNITS[unit.removesuffix("B")]


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def of_the_client(words):
    """Complaints about a command line of `lamina`: its commands and flags must be there."""
    words = list(words)
    while words and words[0].startswith("-"):
        if not re.search(rf"{words[0]}\b", usage(LAMINA)):
            yield f"lamina has no {words[0]}"
        words = words[2:]
    command = []
    while words and not words[0].startswith("-") and len(command) < 2:
        try:
            usage(LAMINA, *command, words[0])
        except RuntimeError:
            break
        command.append(words.pop(0))
    if not command:
        yield f"lamina has no command {words[:1]}"
        return
    text = usage(LAMINA, *command)
    for word in words:
        if word.startswith("--") and not re.search(rf"{word.split('=')[0]}\b", text):
            yield f"lamina {' '.join(command)} has no {word}"


def of_a_pod(pod):
    container = render.daemon(pod)
    settings = environment(container)
    known = daemon_settings()
    spec = pod["spec"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}

    for name in settings:
        if name not in known:
            yield f"laminad has no setting {name}"
    for word in container.get("args", []):
        if word.startswith("--") and word.split("=")[0] not in known.values():
            yield f"laminad has no flag {word}"
    if container.get("command"):
        yield "the image's entry point runs laminad; command would go past it"

    # Ports: what is listened on is what is declared, and what probes and policies name.
    declared = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    tcp = [address for address in settings.get("LAMINA_LISTEN", "").split(",") if address and not address.startswith("unix:")]
    listened = {port_of(address) for address in tcp}
    if settings.get("LAMINA_METRICS", "none") != "none":
        listened.add(port_of(settings["LAMINA_METRICS"]))
    if set(declared.values()) != listened:
        yield f"declares ports {sorted(declared.values())} and listens on {sorted(listened)}"
    secure = "LAMINA_TLS_CERT" in settings
    if tcp and not secure and settings.get("LAMINA_INSECURE") != "true":
        yield "laminad refuses an address other than loopback without TLS or LAMINA_INSECURE"
    if secure and settings.get("LAMINA_INSECURE"):
        yield "LAMINA_INSECURE beside TLS"

    # Probes: all three, by gRPC: the kubelet's own where the port is not TLS, else `lamina health` on the Unix socket.
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind)
        if probe is None:
            yield f"no {kind}"
        elif "grpc" in probe:
            if secure:
                yield f"{kind}: the kubelet's gRPC probe speaks no TLS"
            if probe["grpc"]["port"] not in {port_of(address) for address in tcp}:
                yield f"{kind} asks port {probe['grpc']['port']}, where gRPC is not served"
        else:
            program, *words = probe["exec"]["command"]
            if program != "/opt/lamina/bin/lamina" or "health" not in words:
                yield f"{kind} runs {program}, not lamina health"
            yield from (f"{kind}: {complaint}" for complaint in of_the_client(words))
    if container.get("livenessProbe", {}).get("failureThreshold", 0) * container["livenessProbe"]["periodSeconds"] < 30:
        yield "liveness gives up within 30 s"

    # Paths: everything that is written to or read lies on a volume, as the root is read-only.
    sockets = [address[5:] for address in settings.get("LAMINA_LISTEN", "").split(",") if address.startswith("unix:")]
    if f"unix:{sockets[0] if sockets else ''}" != SOCKET:
        yield f"the first socket must be {SOCKET}, which clients and probes name"
    folders = [os.path.dirname(path) for path in sockets]
    folders += [os.path.dirname(settings[name]) for name in FILES if name in settings]
    folders += [settings["LAMINA_CHECKPOINTS"]] if settings.get("LAMINA_CHECKPOINTS") else []
    for folder in folders:
        if folder not in mounts:
            yield f"nothing is mounted at {folder}"
    for mount in mounts.values():
        if mount["name"] not in volumes and mount["name"] not in pod.get("claims", []):
            yield f"no volume {mount['name']}"
    if settings.get("LAMINA_FINAL_CHECKPOINT") == "true" and "LAMINA_CHECKPOINTS" not in settings:
        yield "LAMINA_FINAL_CHECKPOINT without LAMINA_CHECKPOINTS"

    # The end: the grace period covers preStop, the drain and as long again for the final checkpoint.
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    drain = float(settings.get("LAMINA_DRAIN_TIMEOUT", 30))
    grace = spec.get("terminationGracePeriodSeconds", 30)
    if grace < before + 2 * drain:
        yield f"a grace period of {grace} s is short for preStop ({before} s), drain ({drain:.0f} s) and checkpoint"
    if tcp and not before:
        yield "no preStop: clients still come when the drain begins"

    limit = bytes_of(container["resources"]["limits"]["memory"])
    cap = bytes_of(settings.get("LAMINA_TOTAL_REGION_CAP_BYTES", "32GiB"))
    if cap > REGION_SHARE * limit:
        yield f"regions of {cap / 2**30:.0f} GiB in a container of {limit / 2**30:.0f} GiB"
    gpus = [name for name in container["resources"]["limits"] if name.endswith("/gpu")]
    if settings.get("LAMINA_DEVICE", "auto").startswith("cuda") and not gpus:
        yield "a CUDA device and no GPU in the limits"

    for other in render.containers(pod):
        if other is not container and other.get("command", [""])[0] == "/opt/lamina/bin/lamina":
            words = other["command"][1:] + other.get("args", [])
            yield from (f"{other['name']}: {complaint}" for complaint in of_the_client(words))


def of_a_rendering(objects):
    pods = 0
    for obj in objects:
        pod = render.pod_spec(obj)
        if pod is None:
            continue
        pods += 1
        claims = [claim["metadata"]["name"] for claim in obj["spec"].get("volumeClaimTemplates", [])]
        yield from of_a_pod({**pod, "claims": claims})
        yield from around_a_pod(objects, pod)
    if pods != 1:
        yield f"{pods} workloads, not one"


def around_a_pod(objects, pod):
    """What else names the pod: claims, services, policies, monitors."""
    labels = pod["metadata"]["labels"]
    ports = {port["name"] for port in render.daemon(pod).get("ports", [])}
    by_kind = {}
    for obj in objects:
        by_kind.setdefault(obj["kind"], []).append(obj)
    there = {claim["metadata"]["name"] for claim in by_kind.get("PersistentVolumeClaim", [])}
    for volume in pod["spec"].get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and claim not in there:
            yield f"no claim {claim}"
        secret = volume.get("secret", {}).get("secretName")
        made = {c["spec"]["secretName"] for c in by_kind.get("Certificate", [])}
        if secret and volume["name"] == "tls" and secret not in made:
            yield f"no certificate makes the secret {secret}"
    accounts = {account["metadata"]["name"] for account in by_kind.get("ServiceAccount", [])}
    if pod["spec"].get("serviceAccountName") not in accounts:
        yield "no such service account"

    def selects(selector):
        return selector and selector.items() <= labels.items()

    for service in by_kind.get("Service", []):
        if not selects(service["spec"]["selector"]):
            yield "the Service selects other pods"
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in ports:
                yield f"the Service leads to port {port['targetPort']}, which the pod has not"
    for kind, field in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector"), ("PodMonitor", "selector")):
        for obj in by_kind.get(kind, []):
            if not selects(obj["spec"][field].get("matchLabels")):
                yield f"the {kind} selects other pods"
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        if kind not in by_kind:
            yield f"no {kind}"
    for monitor in by_kind.get("PodMonitor", []):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in ports:
                yield f"the PodMonitor scrapes port {endpoint['port']}, which the pod has not"
        if labels.get(monitor["spec"].get("jobLabel")) != "laminad":
            yield 'scraped as another job than "laminad", which rules and dashboard ask for'
