"""Live figures of a run: every sink reports the same counts."""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.request

import pytest

from ex4d.errors import BadSample, ConfigError
from pipelines.runtime import progress, runner
from pipelines.runtime.progress import Progress
from pipelines.runtime.stage import Stage, new_row


def halve(row, _):
    if row["number"] % 2:
        raise BadSample("odd", f"{row['number']}")
    return {"half": row["number"] // 2}


STAGES = (
    Stage("halve", halve, reads=("number",), writes=("half",)),
    Stage("square", lambda row, _: {"square": row["half"] ** 2}, reads=("half",), writes=("square",), num_gpus=0.5),
)


def run(shown: Progress, count: int = 10) -> None:
    rows = [new_row(f"row-{number}", number=number) for number in range(count)]
    with shown.watch([("numbers", STAGES)]) as watched:
        watched.expect("numbers", len(rows))
        for row in runner.through(runner.Inline(), STAGES, rows, None, ()):
            watched.count("numbers", row, 3.0)


def test_a_tally_counts_what_each_stage_worked_on_and_refused(tmp_path):
    shown = Progress(str(tmp_path))
    run(shown)
    halves, squares = shown.tallies["halve"], shown.tallies["square"]
    assert (halves.done, halves.rejected, halves.video_s) == (10, 5, 30.0)
    assert (squares.done, squares.rejected, squares.video_s) == (5, 0, 15.0)
    assert 0 < squares.worker_s < 1


def test_hours_of_video_are_those_of_reserved_cpus_and_gpus():
    tally = progress.Tally(num_cpus=2.0, num_gpus=0.5, done=4, worker_s=10.0, video_s=60.0)
    assert tally.figures()["video_h_per_cpu_h"] == 3.0
    assert tally.figures()["video_h_per_gpu_h"] == 12.0
    assert progress.Tally(num_cpus=1.0, num_gpus=0.0).figures()["video_h_per_gpu_h"] is None


def test_the_last_line_of_the_file_is_the_end_of_the_run(tmp_path):
    shown = Progress(str(tmp_path))
    run(shown)
    line = json.loads((tmp_path / progress.FILE).read_text().splitlines()[-1])
    assert (line["pass"], line["done"], line["total"], line["rejected"], line["eta_s"]) == ("numbers", 10, 10, 5, 0.0)
    assert line["stages"]["halve"]["rejected"] == 5


def test_prometheus_reads_the_same_figures_on_localhost_alone():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shown = Progress(None, port)
    with shown.serving():
        run(shown)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        with pytest.raises(ConfigError, match="metrics_port"), Progress(None, port).serving():
            pass
        outside = socket.socket()
        outside.settimeout(1)
        assert outside.connect_ex(("127.0.0.2", port)) != 0  # bound to one address, not to all
        outside.close()
    found = dict(re.findall(r"^(ex4d_\S+) (\S+)$", text, re.MULTILINE))
    assert found['ex4d_stage_rows_total{outcome="rejected",stage="halve"}'] == "5.0"
    assert found['ex4d_stage_rows_total{outcome="passed",stage="square"}'] == "5.0"
    assert found['ex4d_stage_video_seconds_total{stage="square"}'] == "15.0"
    assert found['ex4d_pass_rows{pass="numbers",state="total"}'] == "10.0"


def test_a_terminal_gets_a_bar_for_the_pass_and_for_each_stage(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(Progress(None))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert "10/10" in last["numbers"]
    assert "5 rejected" in last["numbers"]
    assert "10/10" in last["halve"]
    assert "5/5" in last["square"]
