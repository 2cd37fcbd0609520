"""Kills clients at random points of their steps and looks at what the daemon keeps of them. See scripts/chaos."""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "client/python"), str(ROOT / "tests/e2e")]

import grpc  # noqa: E402
import lamina  # noqa: E402
from daemon import BINARY, Daemon  # noqa: E402
from lamina.v1 import session_service_pb2 as spb  # noqa: E402
from lamina.v1 import session_service_pb2_grpc  # noqa: E402

VICTIM = os.environ.get("LAMINA_VICTIM", str(pathlib.Path(BINARY).parent / "lamina_victim"))
SURVIVORS = ("memfd", "inline", "execute")
# How clients end: of a hundred.
ENDINGS = {"kill": 72, "stop": 4, "close": 8, "half": 8, "leave": 4, "delete": 4}
PHASES = {"s": "CreateSession", "k": "KeepAlive", "r": "CreateRegion", "b": "the broker's hand-over", "f": "Forward",
          "w": "Backward", "a": "ApplyGradients", "x": "Execute", "i": "inline calls", "p": "StreamParameters",
          "d": "ReleaseRegion"}
# Victims share a stack that has room for the contexts of all that may be there at a time.
VICTIMS_STACK = dict(batch_size=4, max_seq_length=32, hidden_size=64, heads=4, num_hidden_layers=2, seed=1, max_contexts=96)
# What is counted at /metrics, by what it is called here.
METRICS = {"sessions": "lamina_sessions", "regions": "lamina_regions", "region bytes": "lamina_region_bytes",
           "contexts": "lamina_contexts", "context bytes": "lamina_activation_bytes_in_use",
           "queued calls": "lamina_queue_depth", "stacks": "lamina_stacks"}
RESIDENT = "resident bytes"
# Known to breathe: gRPC's pools end threads that were idle for a while.
NOT_JUDGED = ("threads",)
# A batch of the warm-up that grows the daemon by less than this has left it as it was.
STEADY = 0.002


class Watched:
    """What a daemon holds, by its process and its metrics."""

    def __init__(self, pid, metrics_address):
        self.pid, self._address = pid, metrics_address
        self.last_descriptors = collections.Counter()  # those of the last look
        with open(f"/proc/{pid}/maps") as maps:
            self.sanitized = bool(re.search(r"lib[at]san\.so", maps.read()))

    def descriptors(self):
        """How many of each kind: socket, memfd, eventfd, ..."""
        kinds = collections.Counter()
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                kinds[re.sub(r":?\[\d+\]$| \(deleted\)", "", os.readlink(f"/proc/{self.pid}/fd/{number}"))] += 1
        return kinds

    def resources(self):
        kinds = self.descriptors()  # first: the next line opens one
        with urllib.request.urlopen(f"http://{self._address}/metrics", timeout=30) as answer:
            lines = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line and line[0] != "#"]
        series = {name: float(value) for name, value in lines}
        found = {name: int(series[metric]) for name, metric in METRICS.items()}
        found["descriptors"] = sum(kinds.values())
        self.last_descriptors = kinds
        with open(f"/proc/{self.pid}/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps if "memfd:lamina-region" in line]
        found["mapped bytes"] = sum(int(end, 16) - int(begin, 16) for begin, end in ranges)
        with open(f"/proc/{self.pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        found["threads"] = int(fields["Threads"])
        found[RESIDENT] = int(fields["VmRSS"].split()[0]) * 1024
        return found

    def settled(self, sessions, seconds):
        """The resources once this many sessions are left and two looks in a row are the same but for resident memory;
        after so many seconds, as they are then."""
        deadline = time.monotonic() + seconds
        before = None
        while True:
            found = self.resources()
            judged = {k: v for k, v in found.items() if k not in (RESIDENT, *NOT_JUDGED)}
            if time.monotonic() > deadline or (found["sessions"] == sessions and judged == before):
                return found
            before = judged
            time.sleep(0.3)


class Survivor:
    """A process of survivor.py."""

    def __init__(self, target, kind, stack, steps=None):
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/chaos/survivor.py"), target, kind, stack, *([str(steps)] if steps else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'client/python'}"})

    def expect(self, word):
        line = self._process.stdout.readline().strip()
        if line != word:
            raise SystemExit(f"chaos: survivor {self.kind} saw an error (above), instead of '{word}'")

    def order(self, word):
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def result(self):
        """What it computed; None where it saw an error."""
        line = self._process.stdout.readline()
        return json.loads(line) if self._process.wait() == 0 else None

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class Victims:
    """Starts victims, so many at a time, and counts how they ended."""

    def __init__(self, target, stack, concurrency, lease, seed):
        self._target, self._stack, self._concurrency, self._lease = target, stack, concurrency, lease
        self._random = random.Random(seed)
        self.phases, self.endings, self.errors = collections.Counter(), collections.Counter(), []
        self._lock = threading.Lock()

    def run(self, count, progress=None):
        plan = [(self._random.getrandbits(32), ending)
                for ending in self._random.choices(list(ENDINGS), list(ENDINGS.values()), k=count)]
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            for done, _ in enumerate(pool.map(lambda each: self._one(*each), plan), 1):
                if progress:
                    progress(done)

    def _one(self, seed, ending):
        with subprocess.Popen([VICTIM, "--target", self._target, "--stack", self._stack, "--seed", str(seed),
                               "--ending", ending], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wrong = None
            if ending == "stop":
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                if os.WIFSTOPPED(status):
                    time.sleep(self._lease + 1)  # a hang: the lease ends, and only then the process
                    process.kill()
                else:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    wrong = f"ended with {process.returncode} before it hung"
            output, errors = process.communicate()
            code = process.returncode
        # Whose sockets are closed under it may well abort.
        expected = {"kill": (-9,), "stop": (-9,), "half": (-9,), "close": (0, -6)}.get(ending, (0,))
        if wrong is None and code not in expected:
            wrong = f"ended with {code}: {errors.decode(errors='replace').strip()[-500:]}"
        with self._lock:
            self.endings[ending] += 1
            self.phases[PHASES[output[-1:].decode()] if output else "before the first call"] += 1
            if wrong:
                self.errors.append(f"victim {seed} ({ending}): {wrong}")


def pid_behind(target):
    """The process that listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(target[len("unix:"):])
        return struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def lease_of(target):
    """The daemon's lease in seconds, as it tells every session."""
    with grpc.insecure_channel(target) as channel:
        sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        opened = sessions.CreateSession(spb.CreateSessionRequest(client_name="chaos"), timeout=30)
        sessions.DeleteSession(spb.DeleteSessionRequest(session_id=opened.session_id))
        return opened.lease_seconds


def differences(before, after, tolerance, sanitized):
    """The names of the resources that are not back."""
    def differs(name):
        if name in NOT_JUDGED or (name == RESIDENT and sanitized):
            return False
        if name == RESIDENT:
            return abs(after[name] - before[name]) > tolerance / 100 * before[name]
        return after[name] != before[name]

    return [name for name in before if differs(name)]


def compare_results(results, target, kinds):
    """Trains the same on a daemon that nobody disturbs; what differs, in words."""
    twins = [Survivor(target, kind, f"chaos-undisturbed-{kind}", steps=len(results[kind]["steps"])) for kind in kinds]
    wrong = []
    for twin in twins:
        undisturbed, disturbed = twin.result(), results[twin.kind]
        if undisturbed is None:
            wrong.append(f"survivor {twin.kind}: the undisturbed training failed")
            continue
        for step, (a, b) in enumerate(zip(disturbed["steps"], undisturbed["steps"]), 1):
            if a != b:
                wrong.append(f"survivor {twin.kind}: step {step} of {len(disturbed['steps'])} differs from the undisturbed one")
                break
        if disturbed["weights"] != undisturbed["weights"]:
            wrong.append(f"survivor {twin.kind}: the weights differ from the undisturbed ones'")
    return wrong


def torment(arguments, target, watched, lease):
    """Runs it all against a daemon. Returns (report, what is wrong, survivors' results)."""
    say = (lambda *_: None) if arguments.quiet else (lambda *words: print(*words, flush=True))
    survivors = []
    with lamina.connect(target, client_name="chaos") as client:
        with contextlib.suppress(lamina.NotFound):
            client.delete_stack("chaos-victims")
        client.create_stack("chaos-victims", **VICTIMS_STACK)
    try:
        for kind in SURVIVORS:
            survivors.append(Survivor(target, kind, f"chaos-{kind}"))
        for survivor in survivors:
            survivor.expect("ready")
        victims = Victims(target, "chaos-victims", arguments.concurrency, lease, arguments.seed)
        sessions = None

        def look():
            """The resources while the survivors hold still."""
            for survivor in survivors:
                survivor.order("pause")
            for survivor in survivors:
                survivor.expect("paused")
            found = watched.settled(sessions if sessions is not None else watched.resources()["sessions"], lease + 30)
            for survivor in survivors:
                survivor.order("go")
            return found

        start = look()
        sessions = start["sessions"]
        before, warm = start, 0
        while warm < arguments.warm_up:
            batch = min(arguments.warm_up - warm, max(40, arguments.warm_up // 5))
            victims.run(batch)
            warm += batch
            earlier, before = before, look()
            say(f"warm-up: {warm} clients, {before[RESIDENT]:,} resident bytes")
            if warm > batch and before[RESIDENT] <= earlier[RESIDENT] * (1 + STEADY):
                break
        kinds_before = watched.last_descriptors
        began = time.monotonic()
        every = max(1, arguments.clients // 10)
        victims.run(arguments.clients, lambda n: say(f"{n} of {arguments.clients} clients have ended"
                                                     f" ({time.monotonic() - began:.0f} s)") if n % every == 0 else None)
        seconds = time.monotonic() - began
        after = look()
        kinds_after = watched.last_descriptors
        for survivor in survivors:
            survivor.order("stop")
        results = {survivor.kind: survivor.result() for survivor in survivors}
    finally:
        for survivor in survivors:
            survivor.kill()
    wrong = [f"{name}: {before[name]:,} before, {after[name]:,} after"
             for name in differences(before, after, arguments.tolerance, watched.sanitized)]
    # What counts must be as at the very start, too: it has nothing to warm up.
    wrong += [f"{name}: {start[name]:,} before the first client, {after[name]:,} after the last"
              for name in METRICS if start[name] != after[name]]
    if before["descriptors"] != after["descriptors"]:
        wrong += [f"descriptors of {kind}: {kinds_before[kind]} before, {kinds_after[kind]} after"
                  for kind in sorted({*kinds_before, *kinds_after}) if kinds_before[kind] != kinds_after[kind]]
    wrong += [f"survivor {kind}: saw an error (above)" for kind, result in results.items() if result is None]
    wrong += victims.errors
    with lamina.connect(target, client_name="chaos") as client:
        client.delete_stack("chaos-victims")
    report = {"clients": arguments.clients, "warm_up": warm, "concurrency": arguments.concurrency, "seed": arguments.seed,
              "seconds": round(seconds, 1), "before": before, "after": after, "endings": victims.endings,
              "last_phase": victims.phases,
              "survivor_steps": {kind: len(result["steps"]) for kind, result in results.items() if result}}
    return report, wrong, results


def show(report, wrong, sanitized, tolerance):
    print(f"\nended: {', '.join(f'{n} {how}' for how, n in sorted(report['endings'].items()))}")
    print(f"in:    {', '.join(f'{n} {phase}' for phase, n in sorted(report['last_phase'].items()))}")
    print(f"survivors' steps meanwhile: {', '.join(f'{n} {kind}' for kind, n in report['survivor_steps'].items())}\n")
    print(f"{'resource':<16} {'before':>14} {'after':>14}")
    bad = differences(report["before"], report["after"], tolerance, sanitized)
    for name, value in report["before"].items():
        note = "differs" if name in bad else ""
        if name in NOT_JUDGED:
            note = "(not judged: gRPC's pools end threads that were idle)"
        elif name == RESIDENT:
            change = 100 * (report["after"][name] - value) / value
            note = f"{change:+.2f} % {note}" + (" (not judged: a sanitizer keeps what is freed)" if sanitized else "")
        print(f"{name:<16} {value:>14,} {report['after'][name]:>14,}  {note}".rstrip())
    print(*(["", "wrong:"] + wrong[:20] if wrong else []), sep="\n")


def number(least):
    def parse(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    return parse


def main():
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Kills clients at random points of their steps and compares what the daemon holds afterwards with what it\n"
                    "held before: sessions, regions, contexts, descriptors, mapped bytes, resident memory. Three clients\n"
                    "train all the while; their results are compared, bit for bit, with an undisturbed training.\n"
                    "docs/faults.md says how clients end and why a warm-up comes first.",
        epilog="Exits with 0 when everything is back and right, 1 when something differs, 2 for a mistake on the command line.")
    parser.add_argument("--clients", type=number(1), default=1000, help="clients that end (default %(default)s)")
    parser.add_argument("--concurrency", type=number(1), default=8, help="so many at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides where and how each ends (default %(default)s)")
    parser.add_argument("--target", help="unix:PATH of a daemon that runs and that nobody else uses; default: one of its own")
    parser.add_argument("--metrics", default="127.0.0.1:9464", help="HOST:PORT of that daemon's metrics (default %(default)s)")
    parser.add_argument("--warm-up", type=number(0), default=600,
                        help="at most so many clients end before the first look, until resident memory stands still"
                             " (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1.0,
                        help="per cent by which resident memory may differ (default %(default)s)")
    parser.add_argument("--lease", type=float, default=5.0, help="lease of its own daemon, seconds (default %(default)s)")
    parser.add_argument("--json", help="write the report to this file, too")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    arguments = parser.parse_args()
    if arguments.target and not arguments.target.startswith("unix:"):
        parser.error("--target must be unix:PATH: victims map memory")
    if not os.access(VICTIM, os.X_OK):
        parser.error(f"there is no {VICTIM}; scripts/chaos builds it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    if arguments.target:
        watched = Watched(pid_behind(arguments.target), arguments.metrics)
        report, wrong, results = torment(arguments, arguments.target, watched, lease_of(arguments.target))
        if all(results.values()):
            wrong += compare_results(results, arguments.target, SURVIVORS)
    else:
        with Daemon("--lease", str(arguments.lease), "--threads", "1", checkpoints=False) as daemon:
            watched = Watched(daemon.process.pid, daemon.metrics_address)
            report, wrong, results = torment(arguments, daemon.target, watched, arguments.lease)
        if all(results.values()):
            with Daemon("--threads", "1", checkpoints=False) as undisturbed:
                wrong += compare_results(results, undisturbed.target, SURVIVORS)
    show(report, wrong, watched.sanitized, arguments.tolerance)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({**report, "wrong": wrong}, indent=2) + "\n")
    print(f"\n{'nothing is left, nothing is wrong' if not wrong else f'{len(wrong)} wrong'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
