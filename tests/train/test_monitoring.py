"""The dashboard and the alert rules query metrics that runs really serve."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_run import make_base, make_config, make_dataset
from ray_head import free_port
from run_command import PLAIN, ROOT, start

from ex4d.errors import ConfigError
from ex4d.train import progress as train_progress
from ex4d.train.config import TrainConfig
from ex4d.train.report import NonFinite
from pipelines.runtime import progress

MONITORING = ROOT / "cluster" / "monitoring"
STEP = {
    **{"step": 3, "loss": 0.5, "mse": 0.4, "validation_loss": 0.6, "grad_norm": 1.0, "lr": 1e-4, "samples_per_s": 2.0},
    **{"peak_memory_bytes": 1 << 20, "processes": 2, "bad_samples": 1, "step_s": {"total": 1.0, "data": 0.1}},
}


def expressions() -> list[str]:
    """Return every PromQL expression of the dashboard and of the alert rules."""
    panels = json.loads((MONITORING / "grafana" / "dashboards" / "ex4d.json").read_text())["panels"]
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [*shown, *(rule["expr"] for rule in rules)]


def lost(ours: Any, read: Any, where: str = "") -> list[str]:
    """Return the paths at which `read` lacks an entry of `ours` or has another value."""
    if isinstance(ours, dict) and isinstance(read, dict):
        return [place for name in ours for place in lost(ours[name], read.get(name), f"{where}.{name}")]
    if isinstance(ours, list) and isinstance(read, list) and len(ours) == len(read):
        pairs = enumerate(zip(ours, read, strict=True))
        return [place for number, pair in pairs for place in lost(*pair, f"{where}[{number}]")]
    return [] if ours == read else [where]


def test_the_dashboard_is_one_in_grafanas_own_types():
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard, prometheus

    plugins.register_default_plugins()

    def round_trip(tree: dict) -> tuple[dashboard.Dashboard, dict]:
        read = dashboard.Dashboard.from_json(tree)
        return read, json.loads(JSONEncoder(sort_keys=True).encode(read))

    tree = json.loads((MONITORING / "grafana" / "dashboards" / "ex4d.json").read_text())
    read, back = round_trip(tree)
    assert lost(tree, back) == [], "no word that Grafana does not know"
    panels = [panel for panel in read.panels if isinstance(panel, dashboard.Panel)]
    assert len(panels) > 10
    assert {type(target) for panel in panels for target in panel.targets} == {prometheus.Dataquery}
    assert lost(tree | {"refreshes": "10s"}, round_trip(tree | {"refreshes": "10s"})[1]) == [".refreshes"]


def asked(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Return (metric, labels that it must have with these values) of an expression."""
    found = re.findall(r"\b(ex4d_\w+)(?:\{([^}]*)\})?", expression)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels))) for name, labels in found]


def missing(text: str) -> list[str]:
    """Return what the expressions query and a scrape does not contain."""
    served: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^(ex4d_\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        served.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    wanted = {(name, tuple(labels.items())) for one in expressions() for name, labels in asked(one)}
    assert len(wanted) > 15, "the expressions are read"
    return [
        f"{name} {dict(labels)}"
        for name, labels in sorted(wanted)
        if not any(all(has.get(k) == v for k, v in labels) for has in served.get(name, []))
    ]


def scrape(port: int) -> str:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        return ""


def test_the_dashboard_and_the_rules_ask_for_what_is_served(monkeypatch):
    monkeypatch.setattr("pipelines.runtime.cluster.count_nodes", lambda: {"alive": 2, "lost": 0})  # no Ray for this
    port, other = free_port(), free_port()
    jobs = progress.Progress(None, port)
    jobs.tallies["pair"] = progress.Tally(1.0, 0.0, done=3, rejected=1)
    jobs.passes.append(progress.Pass("clips", 4))
    training = train_progress.Progress(TrainConfig(metrics_port=other))
    with jobs.serving(), training as show:
        show(STEP)
        text = scrape(port) + scrape(other)
    assert missing(text) == []
    assert missing(text.replace("ex4d_train_loss", "ex4d_train_los")) == ["ex4d_train_loss {}"]
    assert 'ex4d_train_step_seconds{part="data"} 0.1' in text
    assert "ex4d_train_bad_samples_total 1.0" in text
    assert scrape(other) == "", "it ends with the run"


def test_a_loss_that_is_not_finite_is_served_before_the_run_ends(monkeypatch):
    port, heard = free_port(), []
    monkeypatch.setattr(train_progress.time, "sleep", lambda seconds: heard.append((seconds, scrape(port))))
    shown = train_progress.Progress(TrainConfig(metrics_port=port))
    shown.__enter__()(STEP)
    assert "ex4d_train_non_finite 0.0" in scrape(port)
    shown.__exit__(NonFinite, NonFinite("step 4"), None)
    interval = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert heard[0][0] >= 2 * int(interval.rstrip("s"))
    assert "ex4d_train_non_finite 1.0" in heard[0][1]


def test_a_port_that_is_taken_does_not_end_a_training(caplog):
    port = free_port()
    with progress.Progress(None, port).serving():
        with pytest.raises(ConfigError, match="metrics_port"), progress.Progress(None, port).serving():
            pass
        with train_progress.Progress(TrainConfig(metrics_port=port)) as show:
            show(STEP)
    assert "metrics are not served" in caplog.text


def test_the_provisioning_names_one_data_source():
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    dashboard = json.loads((MONITORING / "grafana/dashboards/ex4d.json").read_text())
    uids = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel}
    assert uids == {source["datasources"][0]["uid"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_rules_are_valid_and_each_fires_when_it_should():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (it comes with Prometheus)")
    for words in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=MONITORING, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_query_is_answered_from_the_metrics_of_real_runs(tmp_path):
    """A preprocess on Ray and a training with ports; a real Prometheus asks and answers where one is installed."""
    make_dataset(tmp_path)
    make_base(tmp_path)
    ports = (free_port(), free_port())
    config = make_config(
        tmp_path, num_steps=30, num_processes=1, validate_every=5, output=str(tmp_path / "run"), metrics_port=ports[1]
    )
    corpus = {"num_videos": 5, "num_frames": 27, "size": [64, 64]}
    clips = {"num_frames": 9, "size": [64, 64], "clips_per_shot": 3, "output": str(tmp_path / "shards")}
    clips |= {"metrics_port": ports[0], "depth": "sidecar"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"synthetic": corpus, "preprocess": clips}))
    server = _Prometheus(tmp_path, ports) if shutil.which("prometheus") else None
    began = time.time()
    quick = {"RAY_worker_niceness": "0"}  # else 15, and they starve on a busy machine
    preprocess = ("-m", "pipelines.cli", "preprocess")
    jobs = [start(config), start(tmp_path / "p.yaml", launcher=preprocess, environment=quick)]
    best = ["", ""]
    try:
        while any(job.poll() is None for job in jobs):
            for index, port in enumerate(ports):
                best[index] = max(scrape(port), best[index], key=len)  # at the end Ray, and its nodes, are gone
            time.sleep(0.2)
        assert [job.returncode for job in jobs] == [0, 0], [job.communicate()[0][-2000:] for job in jobs]
        assert missing("".join(best)) == []
        if server:
            rules = {
                rule["expr"] for rule in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
            }
            for expression in expressions():
                answer = server.ask(expression, began)
                assert answer["status"] == "success", expression
                assert answer["data"]["result"] or expression in rules, f"nothing: {expression}"
    finally:
        for job in jobs:
            job.kill()
        if server:
            server.process.kill()
            server.process.wait()


class _Prometheus:
    def __init__(self, folder: Path, ports: tuple[int, ...]):
        given = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        given["global"]["scrape_interval"] = given["global"]["evaluation_interval"] = "1s"
        given["rule_files"] = [str(MONITORING / "alerts.yml")]
        given["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(given))
        self.url = f"127.0.0.1:{free_port()}"
        words = [f"--config.file={folder}/prometheus.yml", f"--web.listen-address={self.url}"]
        words.append(f"--storage.tsdb.path={folder}/tsdb")
        self.process = subprocess.Popen(["prometheus", *words], env=PLAIN, stderr=subprocess.DEVNULL)

    def ask(self, expression: str, began: float) -> dict:
        query = urllib.parse.urlencode({"query": expression, "start": began, "end": time.time(), "step": 1})
        return json.loads(urllib.request.urlopen(f"http://{self.url}/api/v1/query_range?{query}", timeout=20).read())
