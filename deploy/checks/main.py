"""deploy/validate: all checks of deploy/, a line each."""

import argparse
import pathlib
import re
import subprocess
import tempfile
import time

import helm_python as helm
import manifests
import observability
import parity
import render
import settings

ROOT = render.DEPLOY.parent


def dockerfile():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    if done.returncode != 0:
        yield done.stdout + done.stderr
    text = (ROOT / "Dockerfile").read_text()
    if not re.search(r"^USER 65532:65532$", text, re.MULTILINE):
        yield "USER is not 65532, which the manifests run as"
    for name in re.findall(r"\b(LAMINA_[A-Z_]+)=", text.rsplit("\nFROM ", 1)[1]):
        if name not in settings.daemon_settings() and name not in settings.usage(settings.LAMINA):
            yield f"neither laminad nor lamina has a setting {name}"


def yaml_style():
    done = subprocess.run(["yamllint", "-s", "-c", render.DEPLOY / ".yamllint", "."], capture_output=True, text=True,
                          cwd=render.DEPLOY)
    if done.returncode != 0:
        yield done.stdout


BAD_VALUES = [
    {"kind": "Deployment"}, {"device": "cuda"}, {"imgae": {}}, {"service": {"port": 70000}}, {"gpu": {"count": -1}},
    {"tls": {"enabled": "yes"}}, {"env": {"LAMINA_LEASE": 60}}, {"checkpoints": {"size": "much"}},
    {"checkpoints": {"hostPath": "relative"}}, {"shutdown": {"drainSeconds": "30"}}, {"image": {"pullPolicy": "Sometimes"}},
]


def chart_is_right():
    report = helm.lint(render.CHART, strict=True)
    yield from report["errors"]
    for message in report["messages"]:
        if message["severity"] > 1:
            yield message["error"]
    with helm.Chart.load(render.CHART) as chart:
        for values in BAD_VALUES:
            try:
                chart.validate_schema(values)
            except helm.HelmError:
                continue
            yield f"values.schema.json takes {values}"
        try:
            chart.render({"auth": {"tokensSecret": "tokens"}}, name="laminad", namespace="lamina")
            yield "the chart takes tokens without TLS"
        except helm.HelmError:
            pass


def versions_agree():
    version = re.search(r"project\(lamina VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    said = {"Dockerfile": re.search(r"^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE).group(1)}
    with helm.Chart.load(render.CHART) as chart:
        said["the chart's version"], said["the chart's appVersion"] = chart.version, chart.metadata["appVersion"]
    for path in render.DEPLOY.glob("kubernetes/*/**/kustomization.yaml"):
        for tag in re.findall(r"newTag: (.*)", path.read_text()):
            said[str(path.relative_to(ROOT))] = tag
    for where, tag in said.items():
        if tag != version:
            yield f"{where} says {tag}, the project is {version}"


class Report:
    passed = failed = 0

    def check(self, name, complaints, note=""):
        began = time.monotonic()
        complaints = list(complaints)
        self.passed, self.failed = self.passed + (not complaints), self.failed + bool(complaints)
        print(f"{'FAIL' if complaints else 'ok  '}  {name:<42} {time.monotonic() - began:5.1f} s  {note}".rstrip(), flush=True)
        for complaint in complaints:
            print("      | " + str(complaint).replace("\n", "\n      | "))


def main():
    parser = argparse.ArgumentParser(prog="deploy/validate")
    parser.add_argument("--keep", metavar="FOLDER", type=pathlib.Path, help="leave the rendered manifests there")
    arguments = parser.parse_args()
    report = Report()

    report.check("yaml style (yamllint)", yaml_style())
    report.check("generated files", observability.files_are_as_generated())
    report.check("rules (promtool check)", observability.rules_are_right())
    report.check("rules' tests (promtool test)", observability.rules_are_tested())
    report.check("alerts' runbooks", observability.alerts_have_runbooks())
    report.check("dashboard", observability.dashboard_is_right(),
                 f"{sum(len(panel['targets']) for _, panel in observability.panels())} queries")
    report.check("Dockerfile (hadolint)", dockerfile())
    report.check("versions", versions_agree())
    report.check("chart (helm lint, values.schema.json)", chart_is_right())

    with tempfile.TemporaryDirectory(prefix="lamina-deploy-") as temporary:
        folder = arguments.keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rendered = {}
        for kind, names in (("kustomize", render.OVERLAYS), ("chart", render.CHART_VALUES)):
            for name in names:
                try:
                    rendering = getattr(render, kind)(name)
                except (RuntimeError, helm.HelmError) as error:
                    report.check(f"{kind} {name}", [error])
                    continue
                (folder / f"{kind}-{name}.yaml").write_text(rendering.text)
                objects = rendered[kind, name] = rendering.objects()
                note = f"{len(objects)} objects"
                report.check(f"{kind} {name}: schemas", manifests.against_schemas(objects), note)
                report.check(f"{kind} {name}: pod security", manifests.pod_security(objects))
                report.check(f"{kind} {name}: settings", settings.of_a_rendering(objects))
        for name in render.OVERLAYS:
            if ("kustomize", name) in rendered and ("chart", name) in rendered:
                report.check(f"chart {name} = kustomize {name}",
                             parity.between(rendered["kustomize", name], rendered["chart", name]))
        report.check("policy (checkov)", manifests.policy(folder))

    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
