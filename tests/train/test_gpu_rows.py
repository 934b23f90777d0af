"""The runner of the GPU measurements: whatever happens to one row or to the runner, other rows are kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU), str(GPU.parent)]
import rows  # noqa: E402

RECORD = f"import sys; sys.path.insert(0, {str(GPU)!r}); import rows, time, os, subprocess; "


def row(name: str, code: str, limit_s: float = 60.0, skip: str | None = None) -> rows.Row:
    return rows.Row(name, [sys.executable, "-c", RECORD + code], limit_s, skip)


def test_a_row_that_fails_costs_itself(tmp_path: Path) -> None:
    planned = [
        row("first", "rows.record('first', value=1)"),
        row("crashes", "rows.record('crashes', part='before'); raise MemoryError('CUDA out of memory')"),
        row("is killed", "os.kill(os.getpid(), 9)"),
        row("hangs", "subprocess.Popen(['sleep', '60.125']); time.sleep(60)", limit_s=1.0),
        row("too large", "rows.record('too large')", skip="skipped: 93 GB by estimate"),
        row("last", "rows.record('last', value=2); rows.record('last', value=3)"),
    ]
    found = rows.run_rows(planned, tmp_path, budget_s=100)
    assert [(f["row"], f.get("value", f.get("failed", f.get("part")))) for f in found] == [
        ("first", 1),
        ("crashes", "before"),
        ("crashes", "ended with 1: MemoryError: CUDA out of memory"),
        ("is killed", "ended with -9: no message"),
        ("hangs", "stopped after 1 s"),
        ("too large", "skipped: 93 GB by estimate"),
        ("last", 2),
        ("last", 3),
    ]
    assert "60.125" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    page = rows.table(found, {"value": "{value:.1f}", "other": "{other}"})
    assert page[2] == "| first | 1.0 | – |"
    assert "| is killed | ended with -9: no message | |" in page


def test_the_rows_that_count_fit_one_run_together() -> None:
    import system
    import train_14b

    budget_s = 570 - 20  # less the installation of the wheels
    assert sum(limit_s for _, limit_s in system.ROWS.values()) <= budget_s
    names = list(train_14b.ROWS)
    first = [train_14b.ROWS[name].limit_s for name in names[: names.index("bf16+swap") + 1]]
    assert sum(train_14b.KERNELS.values()) + sum(first) <= budget_s


def test_the_source_of_nvdiffrast_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """A folder of that name beside the scripts would be: then nothing would be built, and its row could only fail."""
    clone, here = tmp_path / "nvdiffrast", tmp_path / "gpu"
    for folder in (clone / "csrc", clone / "nvdiffrast", here):
        folder.mkdir(parents=True)
    (here / "collect.py").write_text((GPU / "collect.py").read_text())
    code = (
        f"import sys; sys.path.insert(0, {str(here)!r}); import collect, importlib.util; from pathlib import Path; "
        f"collect.copy_nvdiffrast(Path({str(clone)!r})); assert (collect.NVDIFFRAST / 'csrc').is_dir(); "
        "found = importlib.util.find_spec('nvdiffrast'); print(found is not None and found.origin is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert done.stdout.strip() == "False"


def test_rows_end_with_their_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LEAST_S", 1.0)
    start = time.monotonic()
    planned = [row("slow", "time.sleep(60)"), row("next", "rows.record('next')")]
    found = rows.run_rows(planned, tmp_path, budget_s=2)
    assert [f["failed"] for f in found] == ["stopped after 2 s", "skipped: the time was used up"]
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_is_killed_leaves_its_rows_and_no_process(with_signal: signal.Signals, tmp_path: Path) -> None:
    code = RECORD + (
        "from pathlib import Path; child = 'import sys; sys.path.insert(0, sys.argv[1]); import rows, time; "
        'rows.record(sys.argv[2], pid=__import__("os").getpid()); time.sleep(float(sys.argv[3]))\'; '
        "rows.run_rows([rows.Row(n, [sys.executable, '-c', child, sys.argv[1], n, s], 60) "
        "for n, s in (('a', '0'), ('b', '60'))], Path(sys.argv[2]), 100)"
    )
    runner = subprocess.Popen([sys.executable, "-c", code, str(GPU), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while len(rows.read(tmp_path / "rows.jsonl")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        runner.send_signal(with_signal)
        assert runner.wait(10) == -with_signal
    finally:
        runner.kill()
    found = rows.read(tmp_path / "rows.jsonl")
    assert [f["row"] for f in found] == ["a", "b"]
    deadline = time.monotonic() + 10
    while Path(f"/proc/{found[1]['pid']}").exists() and not _is_zombie(found[1]["pid"]):
        assert time.monotonic() < deadline, "the row's process lives on"
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
