"""Videos that crash, hang or exhaust memory cost one row each: in the decoder's child, and in Ray's worker."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import replace

import pytest

from ex4d.data.verify import verify
from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.commands.retry import retry
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig, RayConfig, Stages
from pipelines.preprocess.stages import decode

# What a child process must do instead of decoding.
TABLE = """
import ctypes, time
FUNCTIONS = {name: f"poisoned_table:{name}" for name in ("crash", "hang", "eat")}
def crash(): ctypes.string_at(0)
def hang(): time.sleep(1000)
def eat():
    held = []
    while True: held.append(bytearray(1 << 26))
"""


def make(folder, num_videos, clips_per_video=1):
    """Return the settings for that many synthetic videos with clips of 5 × 32 × 32."""
    frames = 5 * clips_per_video + 2
    corpus = SyntheticConfig(num_videos=num_videos, num_frames=frames, size=(32, 32), supersample=1)
    write_corpus(folder / "in", corpus)
    (folder / "poisoned_table.py").write_text(TABLE)
    return PreprocessConfig(
        output=str(folder / "out"),
        input=str(folder / "in"),
        num_frames=5,
        size=(32, 32),
        clips_per_shot=clips_per_video,
        masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
    )


def stages(folder, kinds):
    """Return the usual stages, but the first clip of each video in {file name: kind} is poison."""

    def poisoned(row, context):
        from ex4d import isolation

        kind = kinds.get(os.path.basename(row["path"])) if row["frame_index"][0] < 5 else None
        if kind == "bug":
            return {"frames": 1 // 0}
        if kind == "worker segfault":
            ctypes.string_at(0)
        if kind == "worker killed":  # as the kernel does when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        if kind is not None:
            sys.path.insert(0, str(folder))
            try:
                limits = isolation.Limits(wall_s=2 if kind == "hang" else 60, cpu_s=60, memory_bytes=1 << 30)
                isolation.run(kind, (), limits, table="poisoned_table")
            finally:
                sys.path.remove(str(folder))
        return decode.decode(row, context)

    changed = replace(decode.STAGE, function=poisoned, reads=(*decode.STAGE.reads, "frame_index"))
    return Stages(clip=tuple(changed if stage is decode.STAGE else stage for stage in Stages().clip))


@pytest.fixture
def by_value(ray_local):
    """Pickle the test's functions by value, since Ray's workers cannot import a test file."""
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray_local
    ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def reasons(result):
    return {row["message"].partition(":")[0]: row["reason"] for row in result.rejects}


@pytest.mark.ray
def test_poison_costs_its_rows_and_no_innocent(tmp_path, by_value):
    config = make(tmp_path, num_videos=4, clips_per_video=3)
    names = sorted(os.path.basename(path) for path in (tmp_path / "in").glob("*.mp4"))
    kinds = dict(zip(names, ("crash", "hang", "eat", "bug"), strict=True))
    result = preprocess.run(config, RayConfig(), stages=stages(tmp_path, kinds))
    expected = ("decode_crash", "decode_timeout", "decode_memory", "bug:ZeroDivisionError")
    assert reasons(result) == dict(zip(names, expected, strict=True))
    assert (result.counts["samples"], result.counts["clips_bad"]) == (8, 4)
    assert (result.exit_code, result.committed) == (1, True)  # because of the bug
    assert "ZeroDivisionError" in (tmp_path / "out" / "run.jsonl").read_text()
    # the bug is tried again, the three others are known
    assert preprocess.run(config, runner_name="inline").worked["clip"] == 1


@pytest.mark.ray
def test_a_row_that_kills_its_worker_is_refused_and_its_neighbours_are_kept(tmp_path, by_value):
    config = replace(make(tmp_path, num_videos=3, clips_per_video=4), max_attempts=2)
    names = sorted(os.path.basename(path) for path in (tmp_path / "in").glob("*.mp4"))
    kinds = {names[0]: "worker segfault", names[2]: "worker killed"}
    result = preprocess.run(config, RayConfig(), stages=stages(tmp_path, kinds))
    assert reasons(result) == dict.fromkeys(kinds, "worker_crash")
    assert (result.counts["samples"], result.counts["clips_bad"], result.exit_code) == (10, 2, 0)
    assert not (tmp_path / "out" / "staging" / "attempts.json").exists()
    again = preprocess.run(config, runner_name="inline")  # known, so not retried: it would kill this process
    assert (again.worked["clip"], again.counts) == (0, result.counts)
    healed = retry(config.output, ["worker_crash"], runner_name="inline")
    assert set(healed.retried.values()) == {("worker_crash", "done")}
    assert healed.counts["samples"] == 12


@pytest.mark.heavy
@pytest.mark.ray
def test_a_hundred_good_videos_survive_three_that_are_poison(tmp_path, by_value):
    config = make(tmp_path, num_videos=103)
    names = sorted(os.path.basename(path) for path in (tmp_path / "in").glob("*.mp4"))
    kinds = {names[17]: "crash", names[50]: "hang", names[90]: "eat"}
    result = preprocess.run(config, RayConfig(), stages=stages(tmp_path, kinds))
    expected = {names[17]: "decode_crash", names[50]: "decode_timeout", names[90]: "decode_memory"}
    assert reasons(result) == expected
    assert (result.counts["videos_in"], result.counts["samples"], result.counts["clips_bad"]) == (103, 100, 3)
    assert result.exit_code == 0
    assert verify(config.output, full=True).ok
