"""The image that scripts/build-image makes: the script itself runs its daemon; here is what the image holds and says."""

import json
import pathlib
import re
import subprocess
import tarfile

import pytest
from daemon import BINARY

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = re.search(r"project\(lamina VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)


@pytest.fixture(scope="module")
def image():
    """(settings, {path: tar member}) of the image, from the binaries under test."""
    done = subprocess.run([ROOT / "scripts/build-image", "--prebuilt", pathlib.Path(BINARY).parent],
                          capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert "Forwards by regions" in done.stderr and "Forwards by inline" in done.stderr
    files = {}
    with tarfile.open(ROOT / "build/image/lamina.tar") as archive:
        (manifest,) = json.load(archive.extractfile("manifest.json"))
        assert any(tag.split("/")[-1] == f"lamina:{VERSION}" for tag in manifest["RepoTags"])
        settings = json.load(archive.extractfile(manifest["Config"]))["config"]
        for layer in manifest["Layers"]:
            # Layers may be links to others of the archive.
            with tarfile.open(fileobj=archive.extractfile(layer)) as tar:
                files.update({"/" + member.name.lstrip("./"): member for member in tar.getmembers()})
    return settings, files


def test_settings(image):
    settings, _ = image
    assert settings["User"] == "65532:65532"
    assert settings["Entrypoint"] == ["/opt/lamina/bin/tini", "--", "/opt/lamina/bin/laminad"]
    assert settings["Healthcheck"]["Test"] == ["CMD", "/opt/lamina/bin/lamina", "health"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in settings["Labels"].items()}
    assert {"title", "description", "licenses", "version", "revision"} <= labels.keys()
    assert labels["version"] == VERSION and labels["licenses"] == "Apache-2.0" and labels["revision"]


def test_only_what_runs(image):
    _, files = image
    programs = {path for path, member in files.items() if member.isfile() and member.mode & 0o111
                and pathlib.PurePosixPath(path).parent.name in ("bin", "sbin")}
    ours = {f"/opt/lamina/bin/{name}" for name in ("laminad", "lamina", "tini")}
    assert ours <= programs
    assert not [path for path in programs if pathlib.PurePosixPath(path).name in ("sh", "bash", "dash", "apt-get", "dpkg", "perl")]
    assert not [path for path, member in files.items() if member.isfile() and member.mode & 0o6000], "setuid"
    assert sum(member.size for path, member in files.items() if "libcublasLt" not in path) < 120e6


def test_its_user_owns_what_it_writes_alone(image):
    _, files = image
    for folder in ("/run/lamina", "/var/lib/lamina"):
        member = files[folder]
        assert (member.uid, member.gid, member.mode & 0o777) == (65532, 65532, 0o700)
    others = [path for path, member in files.items() if member.uid == 65532 and path not in ("/run/lamina", "/var/lib/lamina")]
    assert not others


def test_bill_of_materials(image, tools):
    _, files = image
    path = ROOT / "build/image/lamina.spdx.json"
    checked = subprocess.run([tools / "pyspdxtools", "-i", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    packages = {package["name"]: package for package in json.loads(path.read_text())["packages"]}
    # What is linked to in /opt/lamina/lib, and the base.
    assert {"lamina", "tini", "libgrpc29", "libprotobuf32", "libssl3", "libc6", "libstdc++6"} <= packages.keys()
    assert all(package["versionInfo"] for package in packages.values())
    inside = "/opt/lamina/share/doc/"
    with_terms = {path.removeprefix(inside).split("/")[0] for path in files if path.startswith(inside) and path.endswith("copyright")}
    assert with_terms and with_terms <= packages.keys()
    assert "/opt/lamina/share/lamina.spdx.json" in files


def test_versions_are_those_of_where_the_image_was_made(tmp_path):
    """An image's build stage has packages of its own, which this machine may have in other versions, or not at all."""
    own = tmp_path / "opt/lamina"
    for folder in ("bin", "share/doc/lamina", "share/doc/libssl3"):
        (own / folder).mkdir(parents=True)
    for name in ("laminad", "lamina"):
        (own / "bin" / name).write_text(name)
    (own / "share/lamina.spdx.json").write_text(json.dumps({"packages": [
        {"SPDXID": "SPDXRef-lamina", "name": "lamina", "versionInfo": "7.8.9"},
        {"SPDXID": "SPDXRef-deb-libssl3", "name": "libssl3", "versionInfo": "99.1-1"}]}))
    (tmp_path / "var/lib/dpkg/status.d").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status.d/libc6").write_text("Package: libc6\nVersion: 98.2-1\nArchitecture: amd64\n")
    done = subprocess.run([ROOT / "scripts/sbom", "--image", tmp_path], capture_output=True, text=True, check=True)
    packages = {package["name"]: package["versionInfo"] for package in json.loads(done.stdout)["packages"]}
    assert packages == {"lamina": "7.8.9", "libssl3": "99.1-1", "libc6": "98.2-1"}
