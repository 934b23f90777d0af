"""The whole path from videos to a dataset folder: equal bytes from any runner, nothing lost, nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_corpus import CORPUS, inline

from ex4d import config as config_file
from ex4d import video
from ex4d.config import setting, to_dict
from ex4d.data.verify import verify
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.masks import MaskConfig
from pipelines.preprocess import fingerprints
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.filters import FilterConfig, ScorerConfig
from pipelines.preprocess.run import PreprocessConfig, RayConfig, Stages
from pipelines.preprocess.settings import CaptionerConfig
from pipelines.preprocess.stages import decode, masks
from pipelines.runtime import pool, worker
from pipelines.runtime.output import exclusive
from pipelines.runtime.stage import chains, pack_row


def tree(config):
    report = verify(config.output, full=True)
    assert report.problems == ()
    return report.tree_sha256


def rejects(result):
    return sorted((row["key"], row["unit"], row["fate"], row["reason"]) for row in result.rejects)


@pytest.mark.ray
def test_inline_and_ray_give_the_same_bytes(config, tmp_path, ray_local):
    result = inline(config)
    assert (result.exit_code, result.counts["samples"], result.committed) == (0, 12, True)
    on_ray = replace(config, output=str(tmp_path / "ray"))
    assert preprocess.run(on_ray, RayConfig()).exit_code == 0
    assert tree(on_ray) == tree(config)


@pytest.mark.heavy
def test_one_and_two_workers_give_the_same_bytes(config, tmp_path):
    found = set()
    for workers in (1, 2):
        output = str(tmp_path / f"workers-{workers}")
        script = (
            "import sys, json; from pipelines.preprocess import run as preprocess; from ex4d import config;"
            "c = config.validate(preprocess.PreprocessConfig, json.loads(sys.argv[1]), 'preprocess');"
            "sys.exit(preprocess.run(c).exit_code)"
        )
        settings = json.dumps({**to_dict(config), "output": output, "num_workers": workers})
        subprocess.run([sys.executable, "-c", script, settings], check=True, timeout=200)
        found.add(tree(replace(config, output=output)))
    assert len(found) == 1


@dataclass(frozen=True)
class LaterMaskConfig(MaskConfig):
    """Masks with a setting that a later version adds."""

    feather_px: int = setting(0, "Soften the edges of masks.")


@dataclass(frozen=True)
class LaterConfig(PreprocessConfig):
    """The settings of a later version."""

    masks: LaterMaskConfig = setting(LaterMaskConfig(), "How masks are simulated.")
    patience_s: float = setting(1.0, "How long to wait.")


def test_work_that_was_staged_before_a_setting_existed_is_taken(config):
    assert inline(config).worked["clip"] == 12
    later = config_file.validate(LaterConfig, config_file.to_dict(config), "preprocess")  # new keys are missing
    assert later.masks.feather_px == 0
    assert inline(later).worked == {"hash": 4, "split": 0, "clip": 0}
    assert inline(replace(later, masks=replace(later.masks, feather_px=2))).worked["clip"] == 12


def test_running_again_does_nothing_and_leaves_the_same_bytes(config):
    inline(config)
    before = tree(config)
    again = inline(config)
    assert again.worked == {"hash": 4, "split": 0, "clip": 0}
    assert tree(config) == before


def test_a_killed_run_resumes_with_all_clips_of_a_video_and_none_twice(config, tmp_path):
    """Fan-out: a run is killed after one of a video's three clips; the resumed run has all three."""
    inline(config)
    whole = tree(config)
    stopped = replace(config, output=str(tmp_path / "stopped"))

    class Killed(BaseException):
        pass

    seen = []

    def dying(row, context):
        seen.append(1)
        if len(seen) == 5:
            raise Killed
        return decode.decode(row, context)

    stages = tuple(replace(s, function=dying) if s is decode.STAGE else s for s in Stages().clip)
    with pytest.raises(Killed):
        inline(stopped, stages=Stages(clip=stages))
    assert not (tmp_path / "stopped" / "dataset.json").exists()
    assert len(list((tmp_path / "stopped" / "staging" / "clips").glob("*.tar"))) == 4
    (tmp_path / "stopped" / "staging" / "clips" / ".tmp-half.tar").write_bytes(b"half a file")
    resumed = inline(stopped)
    assert resumed.worked == {"hash": 4, "split": 2, "clip": 8}
    assert tree(stopped) == whole


def test_damage_in_the_ledger_costs_the_damaged_rows_alone(config, caplog):
    inline(config)
    whole = tree(config)
    staging = Path(config.output, "staging")
    part = min((staging / "records").iterdir())
    lines = part.read_bytes().splitlines(keepends=True)
    videos = [number for number, line in enumerate(lines) if b" videos/" in line]
    lines[videos[0]], lines[videos[1]] = b'{"a":1}\n', lines[videos[1]][:-9] + b"\n"
    part.write_bytes(b"".join(lines))
    sample = min((staging / "clips").glob("*.tar"))
    sample.write_bytes(sample.read_bytes()[:1000])
    again = inline(config)
    assert (again.exit_code, again.worked["split"], again.worked["clip"]) == (0, 2, 1)
    assert tree(config) == whole
    assert sample.name in caplog.text
    assert len(list((staging / "damaged").iterdir())) == 2  # the part, and the sample


def test_every_end_of_a_run_leaves_a_line(config):
    def lines():
        return [json.loads(line) for line in Path(config.output, "run.jsonl").read_text().splitlines()]

    def ending(error):
        def stop(row, context):
            raise error

        stages = tuple(replace(s, function=stop) if s is decode.STAGE else s for s in Stages().clip)
        with pytest.raises(type(error)):
            inline(config, stages=Stages(clip=stages))

    ending(KeyboardInterrupt())
    ending(OSError(28, "No space left on device", "/data/out/staging/clips/a.tar"))
    inline(config)
    interrupted, full, done = lines()
    assert "interrupted" in interrupted["problems"][0]
    assert full["problems"] == ["No space left on device: /data/out/staging/clips/a.tar"]
    assert (done["problems"], done["committed"]) == ([], True)


def test_a_changed_setting_redoes_only_what_depends_on_it(config):
    inline(config)
    assert inline(replace(config, val_fraction=1.0)).worked["clip"] == 0
    assert inline(replace(config, clips_per_shot=2)).worked["clip"] == 8  # other spans, other clips
    assert inline(replace(config, seed=1)).worked == {"hash": 4, "split": 0, "clip": 12}
    assert inline(config).worked["clip"] == 0


def test_one_bad_row_costs_one_row(config):
    def unlucky(row, context):
        if row["pts"][0] == min(row["pts"]) and row["path"].endswith("00002.mp4") and row["pts"][0] < 1024:
            raise BadSample("decode_timeout", "decode took more than 1 s")
        return decode.decode(row, context)

    stages = tuple(replace(s, function=unlucky) if s is decode.STAGE else s for s in Stages().clip)
    result = inline(config, stages=Stages(clip=stages))
    assert result.counts["samples"] + result.counts["clips_bad"] == 12
    assert {row["reason"] for row in result.rejects} == {"decode_timeout"}
    bad = result.counts["clips_bad"]
    assert 1 <= bad <= 3
    assert inline(config).worked["clip"] == 0  # rejected rows stay rejected


@pytest.mark.parametrize(("num_gpus", "num_chains"), [(0.0, 1), (0.25, 3)])
def test_only_depth_takes_the_gpu_and_memory_is_reserved(config, num_gpus, num_chains):
    stages = preprocess.stages_of(replace(config, depth_num_gpus=num_gpus, num_frames=49, size=(512, 512)))
    made = list(chains(stages.clip, (), propagate=False))
    assert len(made) == num_chains
    assert [stage.name for chain in made for stage in chain.stages] == [stage.name for stage in Stages().clip]
    assert "frames" not in made[-1].keep
    for stage in stages.clip:
        assert stage.num_gpus == (num_gpus if stage.name == "depth" else 0)
        assert 700 < stage.memory_mb < 1200
    assert {stage.memory_mb for stage in stages.find_shots} == {512}


@pytest.mark.parametrize(
    ("choice", "in_actor"),
    [
        ({"depth": "depth-pro", "depth_num_gpus": 0.25}, ["depth"]),
        ({"depth": "parallax", "captioner": CaptionerConfig("any", num_gpus=0.5)}, ["caption"]),
        ({"depth": "depth-pro", "captioner": CaptionerConfig("any", num_gpus=0.5)}, ["depth", "caption"]),
        ({"depth": "sidecar", "scorer": ScorerConfig("any.py", num_gpus=0.5)}, ["own_score"]),
        (
            {"captioner": CaptionerConfig("any"), "scorer": ScorerConfig("any.py", num_gpus=0.5)},
            ["own_score", "depth", "caption"],
        ),
        (
            {"depth": "zoedepth", "depth_num_gpus": 0.5, "masks": MaskConfig(tracker="cotracker3")},
            ["depth", "caption", "depth_quality", "masks"],
        ),
        ({"depth": "zoedepth", "masks": MaskConfig(tracker="cotracker3")}, []),
    ],
)
def test_the_actors_of_the_gpu_hold_the_networks_and_nothing_before_or_after(config, choice, in_actor):
    """One run of stages, so that a clip travels once, and so that two pools never wait for each other's GPU."""
    stages = preprocess.stages_of(replace(config, **choice)).clip
    assert [stage.name for stage in stages if stage.num_gpus] == in_actor


def test_what_a_gpu_computed_is_not_taken_for_what_a_cpu_computed(config, monkeypatch):
    """Networks work in half precision on a GPU, so that their depth differs in its last digits; files do not."""
    monkeypatch.setattr(fingerprints, "_depth_weights", lambda depth, path: "weights")
    monkeypatch.setattr(fingerprints, "_caption_weights", lambda model: "weights")

    def settings(num_gpus: float, **choice) -> dict:
        return fingerprints.sample_settings(replace(config, depth_num_gpus=num_gpus, **choice))

    assert settings(0.25, depth="depth-pro") == settings(1.0, depth="depth-pro") != settings(0.0, depth="depth-pro")
    assert settings(0.25) == settings(0.0)
    assert "on_gpu" not in settings(0.0, depth="depth-pro")  # so that no work of earlier versions is lost
    captioner = CaptionerConfig("any")
    assert settings(0.0, captioner=captioner) != settings(0.0, captioner=replace(captioner, num_gpus=1.0))


@pytest.mark.parametrize("num_gpus", [0.0, 0.5])
def test_a_tracker_works_on_the_gpu_only_where_one_is_reserved(config, monkeypatch, num_gpus):
    """Tasks that reserve no GPU see all of them, and each would take the first."""
    import torch

    from ex4d.geometry import cotracker

    asked = []

    def track(frames, points, folder, device=None):
        asked.append(device)
        return np.repeat(points[None].astype(np.float32), len(frames), 0), np.ones((len(frames), len(points)), bool)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cotracker, "track", track)
    chosen = MaskConfig(num_masks=1, visibility=0, tracking=1, novel_view=0, tracker="cotracker3", generation=())
    row = {
        "frames": np.zeros((3, 32, 32, 3), np.uint8),
        "z_depth": np.full((3, 32, 32), 2.0, np.float32),
        "K": np.eye(3),
    }
    row |= dict.fromkeys(("valid", "source_w2c", "dynamic_mask")) | {"seed": 0, "fps": 8.0}
    masks.masks(row, replace(config, masks=chosen, depth_num_gpus=num_gpus))
    assert set(asked) == {"cuda" if num_gpus else "cpu"}


@pytest.mark.parametrize(("gpus", "each", "size"), [(8, 0.3, 24), (8, 0.6, 8), (3, 1 / 3, 9), (8, 0.1, 80), (8, 2, 4)])
def test_a_share_lies_on_one_gpu(gpus, each, size):
    """Actors that no GPU has room for would wait for ever, and keep the CPUs that they were to take."""
    assert pool.room(1000, gpus, [], {"num_cpus": 1.0}, each)[0] == size


@pytest.mark.parametrize(
    ("cpus", "gpus", "memory", "taken"),
    [
        (2, 1, [50], (1, 1, 10)),
        (16, 1, [50], (4, 1, 10)),
        (16, 8, [500], (15, 1, 10)),
        (1, 1, [50], (1, 0, 10)),
        (16, 4, [35, 9, 19], (3, 1, 10)),
        (16, 4, [19], (1, 1, None)),
    ],
)
def test_actors_of_a_gpu_leave_room_to_what_feeds_them(cpus, gpus, memory, taken):
    size, each = pool.room(cpus, gpus, memory, {"num_cpus": 1.0, "memory": 10}, each=0.25)
    assert (size, each["num_cpus"], each["memory"]) == taken


def test_what_may_pass_is_refused_now_and_tried_again_by_the_next_run(config, monkeypatch):
    down = {"on": True}
    real = decode.STAGE.function

    def flaky(row, chosen):
        if down["on"]:
            raise BadSample("unreadable", "the store does not answer")
        return real(row, chosen)

    stages = preprocess.stages_of(config)
    clip = tuple(replace(stage, function=flaky) if stage.name == "decode" else stage for stage in stages.clip)
    stages = replace(stages, clip=clip)
    assert inline(config, stages=stages).counts["clips_bad"] == 12
    down["on"] = False
    assert inline(config, stages=stages).counts["samples"] == 12


def test_an_invalid_choice_that_a_worker_finds_passes_through_the_stages_after_it(config):
    row = {
        "key": "a",
        "refusal": {"fate": "stop", "reason": "ConfigError", "arguments": ["k", "v", "w"]},
        "seconds": {},
    }
    last = list(chains(preprocess.stages_of(config).clip, (), propagate=False))[-1]
    packed = pack_row(row)
    assert worker.Work(last, config, ".")(packed) == packed


def test_every_input_is_accounted_for(config, corpus, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    first = min(folder.glob("*.mp4"))
    shutil.copy(first, folder / "zz copy of the first\n.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "html.mp4").write_bytes(b"<!doctype html><html>404</html>")
    (folder / "script.mp4").write_bytes(b"ffconcat version 1.0\nfile other.mp4\n")
    (folder / "notes.md").write_text("notes")
    with open(os.path.join(os.fsencode(folder), b"\xff\xfe.mp4"), "wb") as file:
        file.write(b"nothing")
    video.write(folder / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    os.mkfifo(folder / "pipe.mp4")
    result = inline(replace(config, input=str(folder)))
    assert rejects(result) == [
        ("\\xff\\xfe.mp4", "video", "bad", "unknown_container"),
        ("empty.mp4", "video", "bad", "empty_file"),
        ("html.mp4", "video", "bad", "html_page"),
        ("notes.md", "video", "filtered", "not_a_video"),
        ("pipe.mp4", "video", "bad", "not_a_file"),
        ("script.mp4", "video", "bad", "ffconcat_script"),
        ("short.mp4", "video", "filtered", "shot_length"),
        ("zz copy of the first\n.mp4", "video", "filtered", "duplicate"),
    ]
    counts = result.counts
    assert counts["videos_in"] == 12 == counts["videos_split"] + counts["videos_rejected"]
    assert counts["clips_planned"] == counts["samples"] + counts["clips_filtered"] + counts["clips_bad"] == 12
    assert str(tmp_path) not in json.dumps(list(result.rejects))


def test_too_many_bad_fail_without_a_commit_and_a_higher_limit_takes_the_finished_work(config, corpus, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    for number in range(5):
        (folder / f"bad{number}.mp4").write_bytes(b"no video %d" % number)
    config = replace(config, input=str(folder))
    result = inline(config)
    assert (result.exit_code, result.committed) == (1, False)
    assert "max_bad_fraction=0.5" in result.table()
    assert "unknown_container" in result.table()
    assert not (tmp_path / "out" / "dataset.json").exists()
    allowed = inline(replace(config, max_bad_fraction=1.0))
    assert (allowed.exit_code, allowed.worked["clip"], allowed.counts["samples"]) == (0, 0, 12)


def test_filters_decide_by_threshold_and_again_without_new_work(config):
    everything = inline(config)
    motions = sorted(pq.read_table(f"{config.output}/manifest.parquet")["score_motion"].to_pylist())
    strict = inline(replace(config, filters=FilterConfig(min_motion=motions[6])))
    assert (strict.counts["clips_filtered"], strict.worked["clip"], strict.exit_code) == (6, 0, 0)
    assert {(row["stage"], row["reason"]) for row in strict.rejects} == {("score", "motion")}
    assert f"threshold {motions[6]:.6g}" in strict.rejects[0]["message"]
    assert inline(config).counts == everything.counts


def test_where_nothing_is_left_the_run_fails_and_the_dataset_of_before_stays(config):
    before = tree(config) if inline(config).committed else ""
    nothing = inline(replace(config, filters=FilterConfig(min_motion=1.0)))
    assert (nothing.exit_code, nothing.committed, nothing.counts["clips_filtered"]) == (1, False, 12)
    assert "none of the clips is left" in nothing.table()
    assert "12 filtered" in nothing.table()
    assert tree(config) == before


def test_the_synthetic_corpus_stands_in_for_no_input(config):
    result = inline(replace(config, input=None), synthetic_config=replace(CORPUS, num_videos=1))
    assert (result.counts["videos_in"], result.counts["samples"]) == (1, 3)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"size": (33, 32)}, "size"),
        ({"depth": "magic"}, "depth"),
        ({"fps": 8.0, "stride": 2}, "stride"),
        ({"num_frames": 1}, "num_frames"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction"),
        ({"input": "nowhere.mp4"}, "input"),
    ],
)
def test_an_invalid_choice_is_refused_before_any_work(config, tmp_path, change, key):
    with pytest.raises(ConfigError, match=f"preprocess.{key}"):
        inline(replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time(config):
    with exclusive(config.output), pytest.raises(ConfigError, match="another run"):
        inline(config)


@pytest.mark.heavy
def test_every_real_and_hostile_file_ends_as_a_sample_or_a_reason(media, tmp_path):
    """All real media: videos in all formats, and all files that have crashed a decoder."""
    config = PreprocessConfig(
        output=str(tmp_path / "out"),
        input=str(media),
        num_frames=9,
        size=(96, 96),
        depth="parallax",
        max_bad_fraction=1.0,
        masks=MaskConfig(num_masks=1),
    )
    result = inline(config)
    assert result.exit_code == 0
    keys = {row["key"]: row["reason"] for row in result.rejects}
    assert keys["derived_hostile/concat_script.mp4"] == "ffconcat_script"
    assert keys["derived_hostile/concat_relative.mp4"] == "ffconcat_script"
    assert keys["derived_hostile/playlist.mp4"] == "playlist"
    assert keys["mp4ff_edge/mp4/testdata/prog_8s_enc_dashinit.mp4"] == "encrypted"
    failed = replace(config, max_bad_fraction=0.5)
    assert (inline(failed).exit_code, inline(failed).worked["clip"]) == (1, 0)
