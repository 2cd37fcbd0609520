"""The pages beside /metrics: for probes, and /statusz in a real browser."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request

import lamina
import numpy as np
import pytest
from daemon import ROOT, Daemon, wait_until
from lamina.v1 import config_service_pb2 as config_pb
from lamina.v1 import session_service_pb2 as session_pb
from raw import Raw

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;"  # a client's name may be any printable ASCII
CONFIG = dict(batch_size=4, max_seq_length=16, hidden_size=32, heads=2, num_hidden_layers=2)


def get(daemon, path, method="GET"):
    """(code, headers, text)"""
    request = urllib.request.Request(f"http://{daemon.metrics_address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def train(client, stack, steps=3):
    x = client.empty((4, 16, 32), "fp32")
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    for _ in range(steps):
        y, context = stack.forward(x, lengths=np.array([16, 8, 4, 12], np.int32), training=True)
        stack.backward(context, y)
    stack.apply_gradients(lr=1e-3, zero_gradients=True)


@pytest.fixture(scope="module")
def busy():
    with Daemon() as daemon, lamina.connect(daemon.target, client_name=HOSTILE) as client:
        stack = client.create_stack("encoder", **CONFIG)
        train(client, stack)
        yield daemon, client, stack


def test_the_report_says_what_lives_and_what_was_done(busy):
    daemon, client, stack = busy
    code, headers, text = get(daemon, "/statusz.json")
    assert code == 200 and headers["Content-Type"] == "application/json" and headers["Cache-Control"] == "no-store"
    report = json.loads(text)
    assert json.loads(get(daemon, "/statusz?format=json")[2]).keys() == report.keys()
    info = client.info()
    assert report["version"] == info.version and report["state"] == "serving" and report["uptime_seconds"] > 0
    assert report["device"]["backend"] == info.backend and report["device"]["name"] == info.device_name
    assert daemon.target in report["listen"]
    (shown,) = report["stacks"]
    plan = client.plan(**CONFIG)
    assert shown["name"] == "encoder" and shown["config"]["hidden_size"] == 32 and shown["config"]["dtype"] == "fp32"
    assert shown["planned_bytes"] == plan.total_bytes == report["memory"]["planned_bytes"] == sum(shown["planned_by_kind"].values())
    assert 0 < shown["arena_high_water_bytes"] <= shown["arena_bytes"] and shown["arena_used_bytes"] == 0
    (session,) = [s for s in report["sessions"]["list"] if s["client"] == HOSTILE]
    assert session["state"] == "kept" and session["regions"] > 0 and session["region_bytes"] >= 4 * 16 * 32 * 4 and session["contexts"] == 0
    last = report["steps"]["last"]
    assert report["steps"]["total"] >= 7 and [s["number"] for s in last] == list(range(last[0]["number"], last[0]["number"] + len(last)))
    backward = [s for s in last if s["direction"] == "backward"][-1]
    assert backward["stack"] == "encoder" and backward["session"] == session["session"]
    assert backward["tokens"] == 64 and backward["padding_tokens"] == 24 and backward["samples"] == 4 and backward["flops_per_second"] > 0
    parts = sum(backward[f"{phase}_seconds"] for phase in ("queue", "input", "compute", "output"))
    assert 0 < parts <= backward["total_seconds"] * 1.01 + 1e-6
    history = report["history"]
    assert sum(second[1] for second in history["backward"]) >= 3 and history["forward_eval"] == []


def test_the_page_of_the_documentation_has_every_field(busy):
    daemon, _, _ = busy
    page = (ROOT / "docs/operations.md").read_text()
    report = json.loads(get(daemon, "/statusz.json")[2])
    fields = set(report)
    for part in (report["device"], report["memory"], report["queue"], report["checkpoints"], report["stacks"][0],
                 report["sessions"], report["sessions"]["list"][0], report["steps"]):
        fields |= set(part)
    assert not [field for field in sorted(fields) if f"`{field}`" not in page]
    for path in get(daemon, "/")[2].split():
        assert f"| `{path}`" in page or f"`{path}` |" in page, path


def test_the_report_is_bounded_however_many_sessions():
    with Daemon() as other:
        raw = Raw(other.target)  # one session
        for _ in range(59):
            raw.sessions.CreateSession(session_pb.CreateSessionRequest())
        sessions = json.loads(get(other, "/statusz.json")[2])["sessions"]
        assert sessions["live"] == 60 and len(sessions["list"]) == 50
        raw.close()


def test_pages_are_read_only_and_say_what_they_are(busy):
    daemon, _, _ = busy
    for path in ("/statusz", "/statusz.json", "/healthz", "/readyz", "/configz", "/metrics"):
        code, headers, _ = get(daemon, path)
        assert code == 200 and headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY", path
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert get(daemon, path, "HEAD")[0::2] == (200, "")
        for method in ("POST", "PUT", "DELETE"):
            assert get(daemon, path, method)[0] == 405, path
        assert get(daemon, path + "/more")[0] == 404
    assert get(daemon, "/")[2].split() == ["/configz", "/healthz", "/metrics", "/readyz", "/statusz", "/statusz.json"]
    assert get(daemon, "/favicon.ico")[0] == 404
    assert get(daemon, "/..%2f..%2fetc/passwd")[0] in (400, 404)


def test_probes_get_through_beside_connections_that_say_nothing(busy):
    daemon, _, _ = busy
    host, port = daemon.metrics_address.rsplit(":", 1)
    with contextlib.ExitStack() as silent:
        for _ in range(12):
            silent.enter_context(socket.create_connection((host, int(port))))
        began = time.monotonic()
        assert get(daemon, "/healthz")[0] == 200
        assert time.monotonic() - began < 4, "it waited for one of them to be given up"


def test_names_cannot_leave_their_place_in_the_page(busy):
    daemon, _, _ = busy
    page = get(daemon, "/statusz")[2]
    assert HOSTILE not in page and "<img" not in page
    assert page.count("<script") == 2  # the data's and the page's own
    nonces = {get(daemon, "/statusz")[1]["Content-Security-Policy"] for _ in range(3)}
    assert len(nonces) == 3


def test_configz_has_every_flag(busy):
    daemon, _, _ = busy
    settings = json.loads(get(daemon, "/configz")[2])["settings"]
    assert settings["checkpoints"] == str(daemon.checkpoints) and settings["queue-capacity"] == "256" and settings["channelz"] == "false"
    with Daemon("--queue-capacity", "7", "--channelz") as other:
        settings = json.loads(get(other, "/configz")[2])["settings"]
        assert settings["queue-capacity"] == "7" and settings["channelz"] == "true"


def test_draining_is_not_ready_but_alive():
    """While a call that nobody reads keeps the daemon from ending."""
    with Daemon() as daemon:
        raw = Raw(daemon.target)
        config = config_pb.StackConfig(batch_size=1, max_seq_length=8, hidden_size=256, heads=4, num_hidden_layers=12)
        raw.config.CreateStack(config_pb.CreateStackRequest(name="large", config=config))
        unread = raw.config.StreamParameters(config_pb.StreamParametersRequest(stack="large"))
        next(unread)
        assert get(daemon, "/healthz")[0::2] == (200, "ok\n") and get(daemon, "/readyz")[0::2] == (200, "ok\n")
        daemon.process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(daemon, "/readyz")[0] == 503)
        assert get(daemon, "/readyz")[2] == "draining: the daemon was asked to stop\n"
        assert get(daemon, "/healthz")[0::2] == (200, "ok\n")
        assert json.loads(get(daemon, "/statusz.json")[2])["state"] == "draining"
        unread.cancel()
        assert daemon.process.wait(60) == 0
        raw.channel.close()


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="python3-selenium is not installed")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and its driver are not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    yield driver
    driver.quit()


def scheme(browser, which):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": which}]})


def size(browser, width, height):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})


def text(browser):
    return browser.execute_script("return document.body.innerText")


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]


def test_the_page_draws_and_updates_itself(busy, browser):
    daemon, client, stack = busy
    size(browser, 1100, 1400)
    scheme(browser, "light")
    browser.get(f"http://{daemon.metrics_address}/statusz")
    shown = text(browser)
    for expected in ("serving", "encoder", HOSTILE, "Throughput", "forward_training", client.info().device_name):
        assert expected in shown, expected
    assert browser.execute_script("return document.querySelectorAll('#page img').length") == 0
    assert browser.execute_script("return document.querySelectorAll('svg.chart path').length") >= 3
    origins = browser.execute_script("return performance.getEntriesByType('resource').map(e => new URL(e.name).origin)")
    assert set(origins) <= {f"http://{daemon.metrics_address}"}, "it asks others"
    browser.execute_script("window.first = document.querySelector('#page header')")
    client.create_stack("second", **CONFIG)
    train(client, stack, 2)
    wait_until(lambda: "second" in text(browser))
    assert not browser.execute_script("return window.first.isConnected")  # drawn anew, not loaded anew
    assert complaints(browser) == []
    client.delete_stack("second")
    if where := os.environ.get("LAMINA_SCREENSHOT"):
        browser.save_screenshot(where)


@pytest.mark.parametrize("which", ("light", "dark"))
def test_the_page_is_readable_on_a_phone(busy, browser, which):
    daemon, _, _ = busy
    size(browser, 360, 740)
    scheme(browser, which)
    browser.get(f"http://{daemon.metrics_address}/statusz")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360, "the page itself scrolls sideways"
    contrasts = browser.execute_script("""
      const rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = color => rgb(color).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } };
      return ['h1', '.soft', 'td', 'th', '.state', 'h2', 'summary'].map(selector => {
        const e = document.querySelector(selector), [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
        return [selector, (a + 0.05) / (b + 0.05), parseFloat(getComputedStyle(e).fontSize), light(behind(e))];
      });""")
    for selector, contrast, points, background in contrasts:
        assert contrast >= 4.5, f"{selector}: contrast {contrast:.1f}"
        assert points >= 12, f"{selector}: {points} px"
        assert (background < 0.2) == (which == "dark")
    assert complaints(browser) == []


def test_the_page_says_when_the_daemon_is_gone(browser):
    with Daemon() as daemon:
        size(browser, 800, 600)
        browser.get(f"http://{daemon.metrics_address}/statusz")
        assert "no stack" not in text(browser) and "no answer" not in text(browser)
    wait_until(lambda: "no answer" in text(browser))
