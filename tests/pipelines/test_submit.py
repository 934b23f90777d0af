"""`ex4d submit` and `ex4d jobs`: what is sent, what is rejected, and a job that is stopped and submitted again."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kills
import pytest
import ray_head

from ex4d import config
from ex4d.config_help import describe
from ex4d.train import checkpoint
from pipelines import cli
from pipelines.commands import package
from pipelines.commands.jobs import JOBS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import make_run
import run_command

SHARED = {
    "preprocess": ("preprocess.output=/data/dataset", "preprocess.input=/data/videos"),
    "encode": ("encode.data=/data/dataset", "encode.output=s3://bucket/latents"),
    "train": ("train.data=/data/dataset", "train.output=/data/run"),
    "sweep": (
        "train.data=/data/dataset",
        "sweep.output=/data/sweep",
        "sweep.space={train.lr: {log_uniform: [1.0e-5, 1.0e-3]}}",
    ),
    "evaluate": ("evaluate.adapter=/data/run/adapter", "evaluate.output=/data/evaluation"),
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with an empty configuration file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("{}\n")
    return tmp_path


def packed(here: Path, job: str, *overrides: str, with_code: bool = False) -> tuple[dict, list[str]]:
    """Return (the settings that are sent, every file that is sent)."""
    tree = package.settings(job, "c.yaml", [*SHARED[job], *overrides])
    folder = here / "package"
    folder.mkdir()
    package.write(tree, package.files(tree), folder, with_code)
    sent = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return config.read_yaml(folder / package.FILE), sent


@pytest.mark.parametrize("job", sorted(package.SHARED))
def test_only_the_settings_are_sent_and_the_job_reads_them_back(here, job):
    (here / "videos").mkdir()
    (here / "checkout.py").write_text("not asked for")
    tree, sent = packed(here, job)
    assert sent == [package.FILE]
    module = importlib.import_module(JOBS[job])
    chosen = config.load(here / "package" / package.FILE, module.SECTIONS, (), getattr(module, "OPTIONAL", ()))
    assert chosen["ray"].address == "auto"
    assert tree[job]["output"] == dict(o.split("=") for o in SHARED[job][:2])[f"{job}.output"]
    if job == "train":
        assert chosen["train"].launcher == "ray"


def test_files_that_settings_name_are_sent_and_nothing_else(here):
    (here / "lists").mkdir()
    (here / "lists" / "videos.txt").write_text("/data/a.mp4\nhttps://example.org/b.mp4\n")
    (here / "lists" / "other.txt").write_text("x")
    tree, sent = packed(here, "preprocess", "preprocess.input=lists/videos.txt")
    assert sent == [package.FILE, "lists/videos.txt"]
    assert tree["preprocess"]["input"] == "lists/videos.txt"


def test_the_code_is_sent_where_it_is_asked_for(here):
    _, sent = packed(here, "train", with_code=True)
    assert {"pipelines/cli.py", "ex4d/errors.py"} <= set(sent)
    assert not [name for name in sent if "__pycache__" in name or name.startswith(("tests", "docs"))]


@pytest.mark.parametrize(
    ("job", "override", "says"),
    [
        ("preprocess", "preprocess.output=out/dataset", "absolute path on storage that all nodes share"),
        ("train", "train.data=out/dataset", "absolute path on storage that all nodes share"),
        ("train", "train.data=[{path: /data/a}, {path: out/dataset}]", "absolute path on storage that all nodes share"),
        ("evaluate", "evaluate.adapter=out/run/adapter", "absolute path on storage that all nodes share"),
        ("preprocess", "preprocess.input=videos", "is a folder of this machine"),
        ("preprocess", "preprocess.input=nowhere/*.mp4", "no file here"),
        ("preprocess", "preprocess.input=clip.mp4", "is a file of this machine"),
        ("preprocess", "preprocess.input=list.txt", "names beside.mp4, beside itself"),
        ("preprocess", "preprocess.input=secret.txt", "with a password, which would be sent"),
        ("train", "train.init_from=videos", "is a folder of this machine"),
        ("train", "train.init_from=../above.safetensors", "lies outside of this folder"),
        ("train", "train.init_from=large.safetensors", "is larger than"),
        ("train", "ray.address=10.0.0.1:6379", "the job runs on the cluster at --address"),
        ("train", "train.data=https://me:hunter2@example.org/data", "must have no password"),
        ("train", "train.no_such_key=1", "no_such_key"),
        ("train", "train.lr=-1", "train.lr"),
        ("train", "preprocess.fps=1", "reads no section"),
    ],
)
def test_what_cannot_run_there_is_refused_with_the_reason(here, capsys, monkeypatch, job, override, says):
    (here / "videos").mkdir()
    (here / "clip.mp4").write_bytes(b"")
    (here / "secret.txt").write_text("https://me:hunter2@example.org/b.mp4\n")
    (here / "list.txt").write_text("beside.mp4\n")
    (here.parent / "above.safetensors").write_bytes(b"")
    with open(here / "large.safetensors", "wb") as file:
        file.truncate((package.MAX_FILE_MB << 20) + 1)
    words = ["submit", "c.yaml", "--job", job, *SHARED[job], "--address", "http://127.0.0.1:9", override]
    assert cli.main(words) == 2
    text = capsys.readouterr().err
    assert says in text
    assert "hunter2" not in text
    assert len(text.splitlines()) == 1


def test_a_list_with_a_shared_root_may_name_relative_files(here):
    (here / "list.txt").write_text("beside.mp4\n")
    _, sent = packed(here, "preprocess", "preprocess.input=list.txt", "preprocess.list_root=/data/videos")
    assert "list.txt" in sent


# Settings whose help mentions files, but which name none that must be sent.
NO_FILES = {
    *("depth", "follow_links", "max_file_mb", "profile", "visibility", "max_angle_deg", "tracker", "output", "data"),
    *("revision", "mask_range", "save_every", "keep_last", "ema_decay", "wandb_mode", "wandb_project", "wandb_group"),
    *("dry_run", "repeat_seeds", "address", "image_fps"),
    *("source_motion", "persistent_frames", "residual_fp32"),
}


def test_every_setting_that_may_name_a_file_is_known():
    unknown = []
    for job in package.SHARED:
        for section, cls in importlib.import_module(JOBS[job]).SECTIONS.items():
            for one in describe(cls, section):
                name = one.key.rpartition(".")[2]
                speaks = re.search(r"(?i)folder|\bfile|\bpath|\burl|\bhub|checkpoint|weights", one.help)
                if speaks and name not in package.NAMES and name not in NO_FILES:
                    unknown.append(one.key)
    assert not unknown, "does it name files? Then package.NAMES, else NO_FILES here"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_without_a_job_server_is_one_sentence(here, capsys, address):
    assert cli.main(["jobs", "--address", address]) == 2
    text = capsys.readouterr().err
    assert "job server" in text
    assert len(text.splitlines()) == 1


JOB = {"type": "SUBMISSION", "submission_id": "a", "status": "RUNNING", "entrypoint": "ex4d"}
ANSWERS = {
    "no JSON": b"<html>",
    "no list": b"7",
    "a list of numbers": b"[1]",
    "a job without a state": json.dumps([{"submission_id": "a"}]).encode(),
    "a job of the year 10^15": json.dumps([JOB | {"start_time": 10**26}]).encode(),
    "a status of 500, with colours": None,
}


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Yield the address of a server that answers each GET by `answer`."""
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_is_not_rays_is_one_sentence(here, capsys, name):
    """The version is valid, the later answers are not."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        body = ANSWERS[name] if "version" not in request.path else b'{"ray_version": "2.50.0", "version": "4"}'
        request.send_response(200 if body is not None else 500)
        request.end_headers()
        request.wfile.write(body if body is not None else b"\x1b[31mred\n" * 1000)

    with answering(answer) as address:
        assert cli.main(["jobs", "--address", address]) == 1
    text = capsys.readouterr().err
    assert "gave no valid answer" in text
    assert len(text.splitlines()) == 1
    assert len(text) < 500
    assert "\x1b" not in text


def test_the_token_follows_no_redirect(here, capsys):
    asked = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        request.send_response(302)
        request.send_header("Location", "/elsewhere")
        request.end_headers()

    with answering(answer) as address:
        assert cli.main(["jobs", "--address", address]) == 2
    assert asked == ["/api/version"]
    assert "job server" in capsys.readouterr().err


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_job_that_is_stopped_and_submitted_again_ends_with_the_same_bytes(tmp_path):
    """Token authentication, the log, Ctrl-C, stop, submit again; no local secret reaches the cluster."""
    planted = {"WANDB_API_KEY": "planted-wandb-key", "AWS_SECRET_ACCESS_KEY": "planted-store-key"}
    with kills.bench(tmp_path, num_videos=6, clips_per_video=8) as bench, ray_head.head() as head:
        whole = bench.finish_here("whole")
        path, output = str(bench.write_config("there")), tmp_path / "there"
        words = ["submit", path, "--job", "preprocess", "--address", head.url]

        code, text = head.run(*words, RAY_AUTH_TOKEN="0" * 64)
        assert (code, len(text.splitlines())) == (2, 1)
        assert "which this one refuses" in text
        code, text = head.run(*words[:-1], "http://127.0.0.1:9")
        assert (code, len(text.splitlines())) == (2, 1)
        assert "none answers there" in text

        command = [str(ray_head.BIN / "ex4d"), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        following = subprocess.Popen(command, env=head.environment | planted, **pipes)
        _wait_for(lambda: len(list(output.glob("staging/clips/*.tar"))) >= 1 or following.poll() is not None)
        following.send_signal(signal.SIGINT)
        text, _ = following.communicate(timeout=60)
        assert following.returncode == 130, text
        assert "Running entrypoint" in text, "the log streams"
        assert "is still running" in text
        job_id = re.search(r"submitted (\S+) to", text)[1]

        code, text = head.run("jobs", job_id, "--stop", "--address", head.url)
        assert (code, text) == (0, f"{job_id} is being stopped\n"), "it was running"
        code, text = head.run("jobs", job_id, "--follow", "--address", head.url)
        assert code == 75, text
        assert "STOPPED" in head.run("jobs", job_id, "--address", head.url)[1]
        finished = len(list(output.glob("staging/clips/*.tar")))
        assert 1 <= finished < 48
        assert not (output / "dataset.json").exists()

        code, text = head.run(*words, timeout_s=600, **planted)
        assert code == 0, text
        assert "48 planned, 48 samples" in text
        assert bench.checked("there") == whole

        script = (
            "from ray.job_submission import JobSubmissionClient as C\nimport sys\nprint(C(sys.argv[1]).list_jobs())"
        )
        python = [str(ray_head.BIN / "python"), "-c", script, head.url]
        told = subprocess.run(python, env=head.environment, capture_output=True, text=True, check=True).stdout
        assert job_id in told
        logs = [log.read_text(errors="replace") for log in head.folder.rglob("*.log") if log.is_file()]
        for secret in (*planted.values(), ray_head.TOKEN):
            assert not [one for one in (text, told, *logs) if secret in one], secret


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_training_that_is_stopped_and_submitted_again_resumes(tmp_path):
    make_run.make_dataset(tmp_path)
    make_run.make_base(tmp_path)
    whole, output = tmp_path / "whole", tmp_path / "there"
    chosen = {"num_steps": 500, "save_every": 10_000, "micro_batch_size": 2, "num_processes": 1, "zero_stage": 0}
    path = make_run.make_config(tmp_path, **chosen, output=str(whole))
    code, text = run_command.finish(run_command.start(path))
    assert code == 0, text
    with ray_head.head() as head:
        words = ["submit", str(path), f"train.output={output}", "--job", "train", "--address", head.url]
        code, text = head.run(*words, "--detach")
        assert code == 0, text
        job_id = re.search(r"submitted (\S+) to", text)[1]
        _wait_for(lambda: len(run_command.steps(output)) >= 5)
        code, text = head.run("jobs", job_id, "--stop", "--address", head.url)
        assert (code, text) == (0, f"{job_id} is being stopped\n"), "it was running"
        code, text = head.run("jobs", job_id, "--follow", "--address", head.url)
        assert code == 75, text
        stopped_at = checkpoint.read_state(checkpoint.latest(str(output))).step
        assert 5 <= stopped_at == len(run_command.steps(output)) < 500
        done = (output / "metrics.jsonl").read_bytes()
        code, text = head.run(*words, timeout_s=600)
        assert code == 0, text
    assert (output / "metrics.jsonl").read_bytes().startswith(done), "no step was done again"
    print(f"stopped at step {stopped_at} of 500")
    assert run_command.losses(output) == run_command.losses(whole)


def _wait_for(what, limit_s: float = 400.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
