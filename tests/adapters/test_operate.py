"""What docs/operate.md gives to operators: image, YAML, Kubernetes, dashboard, alerts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from isolated import run
from test_metrics import SCHEDULER, SPARSE, labels

from sglang_nsa_plugin.state import ALL_ROLES

ROOT = Path(__file__).resolve().parent.parent.parent
OPERATE = ROOT / "docs" / "operate"
DASHBOARD = json.loads((OPERATE / "dashboard.json").read_text())
TIME_LIMIT_S = 300  # importing SGLang takes a minute on a busy machine
OF_PROMETHEUS = {"instance", "job"}  # labels that every scrape adds

# A scheduler's hooks and states, SGLang's collector, and SGLang's own route, which Prometheus scrapes.
SERVER = (
    SCHEDULER
    + """
import os, uvicorn
from fastapi import FastAPI
from sglang.srt.observability.metrics_collector import SchedulerMetricsCollector
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.common import add_prometheus_middleware
from sglang_nsa_plugin.state import STATES
metrics.PERIOD_S = 0.2

def serve_steps():
    while True:
        for state in STATES.values():
            state.reason, state.in_place = "as in a server", True
            state.count.replays += 100
            state.launches += 1
            state.checks += 10
            state.fallbacks["a reason"] += 1
        time.sleep(0.1)

threading.Thread(target=serve_steps, daemon=True).start()
arguments = json.loads(sys.argv[1])
sglangs = SchedulerMetricsCollector(
    labels={**arguments["labels"], "moe_ep_rank": 0}, server_args=ServerArgs(model_path="dummy")
)
sglangs._log_gauge(sglangs.spec_accept_length, 2.5)
app = FastAPI()
add_prometheus_middleware(app)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
"""
)
# A selector: a metric's name, whose colon Prometheus 2 makes an underscore, and the labels.
SELECTOR = re.compile(r'\{__name__=~"(\w+)\[:_\](\w+)"([^}]*)\}')
BY = re.compile(r"\bby \(([^)]*)\)")


# `sglang serve` up to the point where it would start the server.
SERVE = """
import json, sys
import sglang.launch_server
from sglang_nsa_plugin import options

def run_server(args):
    names = ("tp_size", "speculative_num_draft_tokens", "enable_metrics", "mem_fraction_static", "port")
    asked = {name: getattr(args, name) for name in names}
    print(json.dumps({**asked, "backend": options.backend_of(args), "check": options.check_of(args)}))

sglang.launch_server.run_server = run_server
sys.argv[0] = "sglang"
from sglang.cli.main import main
main()
"""
TEXT = (ROOT / "docs" / "operate.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of docs/operate.md in this language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def serve(*command: str) -> dict[str, Any]:
    """Arguments of the server that this would start; SGLang looks for no model named dummy."""
    program, *arguments = ["dummy" if "/GLM" in word else word for word in command]
    assert program == "sglang"
    done = run(SERVE, *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    asked: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return asked


def test_sglang_serve_takes_the_yaml_file(tmp_path):
    (text,) = [each for each in blocks("yaml") if "# server.yaml" in each]
    (tmp_path / "server.yaml").write_text(text)
    (line,) = re.findall(r"^    (sglang serve .*)$", TEXT, re.MULTILINE)
    asked = serve(*line.replace("server.yaml", str(tmp_path / "server.yaml")).split())
    assert (asked["tp_size"], asked["speculative_num_draft_tokens"], asked["enable_metrics"]) == (
        8,
        6,
        True,
    )
    assert (asked["backend"], asked["check"]) == ("auto", 0)


def test_the_pods_command_takes_the_config_map(tmp_path):
    import yaml

    (text,) = [each for each in blocks("yaml") if "kind: Deployment" in each]
    config, deployment = yaml.safe_load_all(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    *command, path = container["command"]
    folder, name = path.rsplit("/", 1)
    assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
    (tmp_path / name).write_text(config["data"][name])
    asked = serve(*command, str(tmp_path / name))
    (port,) = container["ports"]
    assert asked["port"] == port["containerPort"]
    assert asked["tp_size"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert asked["enable_metrics"]
    names = {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert names == {mount["name"] for mount in container["volumeMounts"]}
    labels_of_pod = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels_of_pod


def test_the_images_line_installs_a_wheel_of_the_build_context(tmp_path):
    """A wheel of this name with nothing in it: what counts is what the shell and pip make of it."""
    (text,) = blocks("dockerfile")
    copied, install, checked = re.findall(r"^(?:COPY|RUN) (.*)$", text, re.MULTILINE)
    (tmp_path / "dist").mkdir()
    info = "sglang_nsa_plugin-0.1.0.dist-info"
    name = "sglang_nsa_plugin-0.1.0-py3-none-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(tmp_path / "dist" / name, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: sglang-nsa-plugin\nVersion: 0.1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    target = tmp_path / "site"
    commands = f"cp {copied} && {install}".replace("/tmp/", f"{tmp_path}/")
    commands = commands.replace(
        "pip install", f"{sys.executable} -m pip install --no-index --target {target}"
    )
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (target / info).is_dir()
    assert list(tmp_path.glob("*.whl")) == []
    assert checked.startswith("sglang-nsa-plugin verify --json ")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
    return port


def read(url: str) -> str:
    """The page, as soon as somebody serves it."""
    last = time.monotonic() + TIME_LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > last:
                raise
            time.sleep(0.2)


@contextlib.contextmanager
def running(*command: str, log: Path, **environment: str) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a process that counts steps of every role, as a scheduler does."""
    folder, port = tmp_path_factory.mktemp("metrics"), free_port()
    arguments = {**SPARSE, "implementation": "torch", "labels": labels(0)}
    command = (sys.executable, "-W", "ignore", "-c", SERVER, json.dumps(arguments), str(port))
    log = folder / "log"
    with running(*command, log=log, PROMETHEUS_MULTIPROC_DIR=str(folder)):
        read(f"http://127.0.0.1:{port}/metrics")
        time.sleep(1)
        yield f"127.0.0.1:{port}"


def panel_queries() -> dict[str, str]:
    """The queries of the dashboard by panel and letter, with Grafana's variables filled in."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$instance", ".*")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    }


def alert_queries() -> dict[str, str]:
    import yaml

    (group,) = yaml.safe_load((OPERATE / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def exported(page: str) -> dict[str, set[str]]:
    """The labels of each metric of /metrics."""
    found = re.findall(r"^(sglang\w*:\w+)\{(.*)\} \S+$", page, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', text)) for name, text in found}


def test_every_metric_and_label_of_dashboard_and_alerts_is_exported(server):
    metrics = exported(read(f"http://{server}/metrics"))
    for place, query in {**panel_queries(), **alert_queries()}.items():
        selectors = SELECTOR.findall(query)
        assert selectors, place
        grouped = {label for each in BY.findall(query) for label in re.split(r",\s*", each)}
        assert len(selectors) == query.count("{")
        for prefix, rest, braces in selectors:
            name = f"{prefix}:{rest}"
            assert name in metrics, f"{place}: no metric {name}"
            named = {*re.findall(r"(\w+)(?:=|!=)~?\"", braces), *grouped}
            assert named <= {*metrics[name], *OF_PROMETHEUS}, f"{place}: {name}"


def test_the_legends_of_the_dashboard_name_labels_of_its_queries():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            kept = {label for each in BY.findall(target["expr"]) for label in re.split(r",\s*", each)}
            assert named <= kept, panel["title"]


def test_the_dashboard_stands_on_its_own():
    """No data source of one Grafana's: the variable names it; panels do not overlap."""
    text = (OPERATE / "dashboard.json").read_text()
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"${datasource}", "sglang-nsa-plugin"}
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# With Prometheus, of Debian's package `prometheus`

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="needs Prometheus"
)


@needs_prometheus
@pytest.mark.parametrize(
    "check",
    [("check", "rules", "docs/operate/alerts.yml"), ("test", "rules", "tests/operate/alerts_test.yml")],
)
def test_promtool_accepts_the_alerts(check):
    done = subprocess.run(["promtool", *check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with the alerts, which has scraped that process a few times."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(OPERATE / "alerts.yml")],
        "scrape_configs": [{"job_name": "sglang", "static_configs": [{"targets": [server]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = (
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with running(*command, log=folder / "log"):
        address = f"http://127.0.0.1:{port}"
        read(f"{address}/-/ready")
        last = time.monotonic() + TIME_LIMIT_S
        while not ask(address, "query", query="count_over_time(up[1m]) > 4")["result"]:
            assert time.monotonic() < last
            time.sleep(0.5)
        yield address


def ask(prometheus: str, route: str, **parameters: str) -> Any:
    answer = json.loads(read(f"{prometheus}/api/v1/{route}?{urllib.parse.urlencode(parameters)}"))
    assert answer["status"] == "success"
    return answer["data"]


@needs_prometheus
def test_every_panel_shows_data(prometheus):
    for place, query in panel_queries().items():
        found = ask(prometheus, "query", query=query)["result"]
        assert found, place
        roles = {series["metric"].get("role") for series in found} - {None}
        assert roles in (set(), set(ALL_ROLES)), place
    (instance,) = ask(prometheus, "label/instance/values")
    assert instance == urllib.parse.urlsplit(f"//{instance}").netloc


@needs_prometheus
def test_prometheus_evaluates_the_alerts(prometheus):
    """None fires: one fallback a hundred steps is not more than one in a hundred."""
    (group,) = ask(prometheus, "rules")["groups"]
    states = {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}
    assert states == dict.fromkeys(alert_queries(), ("ok", "inactive"))
