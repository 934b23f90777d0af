"""Clips are made where a video's files are, while others are still hashed; wrong guesses change no byte."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import flaky_store
import pytest
import test_stream
from small_corpus import choices, inline

from ex4d import storage
from ex4d.data.verify import verify
from ex4d.errors import BadSample
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess.run import Stages
from pipelines.preprocess.stages import decode, identify, shots
from pipelines.runtime import runner

TRACKS = """
from collections import deque
from pipelines.runtime import backlog
from pipelines.runtime.stage import Track

backlog.TASK_S = 0.05  # a row a task

def work(row, context):
    time.sleep(0.05)
    mark(row["kind"], row["key"])
    return {"node": node_of()}

STAGE = Stage("work", work, reads=("key", "kind"), writes=("node",))
videos = Track("video", (STAGE,), ("number", "node"))
clips = Track("clip", (Stage("clip", work, reads=("key", "kind"), writes=("node",)),), ("video", "home", "node"))
"""


@pytest.mark.ray
def test_clips_are_made_while_later_videos_are_not_yet_read(tmp_path):
    facts = test_stream.run(
        tmp_path,
        TRACKS
        + """
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
ahead = []

def source():
    for number in range(60):
        ahead.append(2 * number - len(lines("clip")))
        yield new_row(f"video-{number}", kind="video", number=number)

added, done = deque(), collections.Counter()
execute = runner.OnRay(runner.RayConfig(), None)
for name, row in execute((videos, clips), source(), None, added):
    done[name] += 1
    if name == "video":
        rows = (new_row(f"clip-{row['number']}-{part}", kind="clip", video=row["number"], home="") for part in range(2))
        added.extend(("clip", clip) for clip in rows)
print(json.dumps({"done": done, "ahead": max(ahead)}), flush=True)
ray.shutdown()
os._exit(0)
""",
    )
    assert facts["done"] == {"video": 60, "clip": 120}
    assert facts["ahead"] < 40  # with a barrier all 120 would wait


@pytest.mark.heavy
@pytest.mark.ray
def test_six_nodes_read_a_remote_video_once(tmp_path, monkeypatch):
    """Each node has its own cache, as separate machines do; nothing else distinguishes the nodes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    write_corpus(tmp_path / "in", SyntheticConfig(num_videos=72, num_frames=17, size=(96, 96), supersample=1))
    with flaky_store.object_store(share=0.0) as (address, store):
        flaky_store.use(monkeypatch, address)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        for path in (tmp_path / "in").iterdir():
            storage.write_bytes(f"s3://bucket/in/{path.name}", path.read_bytes())
        store.delay_s = 0.02
        store.read.clear()
        monkeypatch.setenv("EX4D_TESTS", str(Path(__file__).parent))
        facts = test_stream.run(
            tmp_path,
            """
from pathlib import Path
sys.path.insert(0, os.environ["EX4D_TESTS"])
from small_corpus import choices
from pipelines.preprocess import run as preprocess

def caching(number):
    place = Path(folder) / f"node{number}"
    place.mkdir()
    return {"num_cpus": 1, "env_vars": {"TMPDIR": str(place)}, "object_store_memory": 80 * 2**20}

cluster = Cluster(initialize_head=True, head_node_args=caching(0) | {"include_dashboard": False})
for number in range(1, 6):
    cluster.add_node(**caching(number))
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
config = choices("s3://bucket/in", "s3://bucket/out", size=(96, 96))
result = preprocess.run(config, runner.RayConfig(address=cluster.address))
used = sum(any(Path(folder).glob(f"node{number}/ex4d-cache-*/*/video")) for number in range(6))
print(json.dumps({"counts": result.counts, "committed": result.committed, "nodes": used}), flush=True)
ray.shutdown()
os._exit(0)
""",
        )
        reads = Counter(path for path in store.read if path.startswith("/bucket/in/"))
    assert facts["committed"]
    assert (facts["counts"]["samples"], facts["nodes"]) == (216, 6)
    by_kind = {kind: [n for path, n in reads.items() if path.endswith(kind)] for kind in (".mp4", ".npz")}
    means = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
    print("\nreads of a file:", means)
    assert {kind: len(found) for kind, found in by_kind.items()} == {".mp4": 72, ".npz": 72}
    assert max(means.values()) <= 1.2


@pytest.fixture
def backwards(monkeypatch):
    """The inline runner gets the videos in reverse order, as if the last were hashed first."""
    forwards = runner.Inline.__call__

    def call(self, tracks, rows, context, added):
        return forwards(self, tracks, reversed(list(rows)), context, added)

    monkeypatch.setattr(runner.Inline, "__call__", call)


@pytest.mark.parametrize("near", ["group", "filter", "off"])
def test_what_other_videos_decide_is_the_same_in_any_order(corpus, tmp_path, request, near):
    """An exact copy under an earlier name replaces the one that was seen first."""
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    for path in corpus.glob("*0.*"):
        shutil.copy(path, folder / f"a-copy{path.name[path.name.index('.') :]}")
    usual = choices(folder, tmp_path / "usual", near_duplicates=near)
    first = inline(usual)
    request.getfixturevalue("backwards")
    other = replace(usual, output=str(tmp_path / "other"))
    second = inline(other)
    assert second.worked["clip"] == first.worked["clip"] + 3  # those of the copy that was seen first
    assert (second.counts, list(second.rejects)) == (first.counts, list(first.rejects))
    assert verify(other.output).tree_sha256 == verify(usual.output).tree_sha256
    assert inline(other).worked == {"hash": 5, "split": 0, "clip": 0}


def failing(ending: str, error: Exception, stage, tries: list[str]) -> Stages:
    """Return stages, one of which fails for the videos whose path ends so."""

    def function(row, context):
        tries.append(row["path"][-len(ending) :])
        if row["path"].endswith(ending):
            raise error
        return stage.function(row, context)

    def changed(stages):
        return tuple(replace(one, function=function) if one is stage else one for one in stages)

    usual = Stages()
    return replace(usual, find_shots=changed(usual.find_shots), clip=changed(usual.clip), score=changed(usual.score))


@pytest.mark.parametrize("stage", [shots.STAGE, decode.STAGE], ids=lambda stage: stage.name)
def test_what_fails_for_now_is_tried_once_in_a_run_and_again_in_the_next(config, stage):
    """If a store does not answer, the row is rejected but not recorded, and the next run completes it."""
    lost, tries = {"shots": 1, "decode": 3}[stage.name], []
    stages = failing("0.mp4", BadSample("unreadable", "the store does not answer"), stage, tries)
    result = inline(replace(config, max_bad_fraction=0.5), stages=stages)
    assert tries.count("0.mp4") == lost
    assert [row["reason"] for row in result.rejects] == ["unreadable"] * lost
    assert result.counts["samples"] == 9
    again = inline(config)
    assert (again.worked["split"], again.worked["clip"], again.counts["samples"]) == (int(lost == 1), 3, 12)


@pytest.fixture
def bugs_reject(monkeypatch):
    """Behave like a worker: a bug rejects its row."""
    chain = runner.Chain
    monkeypatch.setattr(runner, "Chain", lambda stages, keep, propagate: chain(stages, keep, False))


@pytest.mark.parametrize("stage", [shots.STAGE, decode.STAGE], ids=lambda stage: stage.name)
def test_a_bug_is_counted_once(config, bugs_reject, stage):
    lost, tries = {"shots": 1, "decode": 3}[stage.name], []
    stages = failing("0.mp4", ZeroDivisionError("division by zero"), stage, tries)
    result = inline(replace(config, max_bad_fraction=0.5, max_bugs=lost), stages=stages)
    assert result.committed
    assert [row["reason"] for row in result.rejects] == ["bug:ZeroDivisionError"] * lost
    assert tries.count("0.mp4") == lost
    assert result.exit_code == 1  # bugs fail a run, after its commit


@pytest.mark.parametrize(("near", "bugs"), [("group", 3), ("filter", 0), ("off", 3)])
def test_a_bug_counts_once_where_another_video_decides(corpus, tmp_path, bugs_reject, near, bugs):
    """A near duplicate, here the same file with an empty box at its end, changes the names of clips, or drops them."""
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    video = next(folder.glob("*0.mp4"))
    for path in corpus.glob(f"{video.stem}.*"):
        shutil.copy(path, folder / f"zz{path.name[path.name.index('.') :]}")
    with open(folder / "zz.mp4", "ab") as file:
        file.write((8).to_bytes(4, "big") + b"free")
    names = sorted([video, folder / "zz.mp4"], key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    stages = failing(names[-1].name, ZeroDivisionError("x"), decode.STAGE, [])
    result = inline(choices(folder, tmp_path / "out", near_duplicates=near, max_bad_fraction=1.0), stages=stages)
    assert sum("bug" in row["reason"] for row in result.rejects) == bugs
    assert [problem.split()[0] for problem in result.problems] == ["3"] * bool(bugs)
    assert result.exit_code == int(bool(bugs))


@pytest.mark.parametrize("score_only", [False, True])
@pytest.mark.parametrize("stage", [shots.STAGE, decode.STAGE], ids=lambda stage: stage.name)
def test_a_copy_that_cannot_be_read_does_not_cost_the_video(corpus, tmp_path, backwards, stage, score_only):
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    for path in corpus.glob("*0.*"):
        shutil.copy(path, folder / f"zz{path.name[path.name.index('.') :]}")
    stages = failing("zz.mp4", BadSample("unreadable", "gone"), stage, [])
    result = inline(choices(folder, tmp_path / "out", score_only=score_only, max_bad_fraction=1.0), stages=stages)
    assert [row["reason"] for row in result.rejects] == ["duplicate"]
    assert (result.scored if score_only else result.counts["samples"]) == 12


@pytest.mark.parametrize("stage", [shots.STAGE, decode.STAGE], ids=lambda stage: stage.name)
def test_what_is_rejected_in_this_run_is_not_retried_in_it(config, stage):
    lost, tries = {"shots": 1, "decode": 3}[stage.name], []
    stages = failing("0.mp4", BadSample("decode_error", "broken"), stage, tries)
    chosen = replace(config, max_bad_fraction=1.0)
    first = inline(chosen, stages=stages, retry=["decode_error"])
    assert (tries.count("0.mp4"), first.retried) == (lost, {})
    again = inline(chosen, stages=stages, retry=["decode_error"])
    assert (tries.count("0.mp4"), len(again.retried)) == (2 * lost, lost)


def test_in_one_process_the_clips_of_a_video_come_before_the_next_video(config):
    """Three videos have their clips when the last one is hashed."""
    order = []

    def noting(stage):
        def function(row, context):
            order.append((stage.name, Path(row["path"]).stem[-1]))
            return stage.function(row, context)

        return replace(stage, function=function)

    usual = Stages()
    stages = replace(
        usual,
        hash=tuple(map(noting, usual.hash)),
        clip=tuple(noting(stage) if stage is decode.STAGE else stage for stage in usual.clip),
    )
    inline(config, stages=stages)
    assert order[0] == (identify.STAGE.name, "0")
    last_hash = max(place for place, (name, _) in enumerate(order) if name == identify.STAGE.name)
    assert [name for name, _ in order[:last_hash]].count(decode.STAGE.name) == 9  # of the first three videos
