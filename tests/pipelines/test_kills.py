"""`kill -9` anywhere: the run that follows ends with the bytes of a run that nobody disturbed, and leaves nothing."""

from __future__ import annotations

import json
import logging
import time

import kills
import numpy as np
import pyarrow.parquet as parquet
import pytest

logger = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with kills.bench(tmp_path_factory.mktemp("small"), num_videos=4, clips_per_video=3) as bench:
        yield bench


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """10 videos of 6 clips, and the tree hash of an uninterrupted run."""
    with kills.bench(tmp_path_factory.mktemp("sixty"), num_videos=10, clips_per_video=6) as bench:
        yield bench, bench.finish("whole")


@pytest.mark.ray
def test_a_run_that_lost_a_worker_and_then_its_driver_is_made_up(small):
    whole = small.finish_here("whole")
    killed, code = small.kill("killed", ("worker", "driver"), np.random.default_rng(1))
    assert code in (-9, 1)  # 1: Ray Data could not continue without that worker, and the driver ended itself
    assert killed[-1] < small.num_artifacts
    assert small.finish_here("killed") == whole


def test_a_video_of_eight_clips_killed_after_three_gives_all_eight_once(tmp_path):
    with kills.bench(tmp_path, num_videos=1, clips_per_video=8) as bench:
        run = bench.start("killed", "inline")
        while run.staged() < 1 + 3:
            assert run.process.poll() is None
            time.sleep(0.005)
        run.process.kill()
        assert run.wait() == -9
        before = sorted(path.name for path in run.output.glob("staging/clips/*.tar"))
        assert 3 <= len(before) < 8
        bench.finish_here("killed")
    again = json.loads((run.output / "run.jsonl").read_text().splitlines()[-1])
    assert again["worked"]["clip"] == 8 - len(before)
    keys = parquet.read_table(run.output / "manifest.parquet")["key"].to_pylist()
    assert len(set(keys)) == len(keys) == 8


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("kind", kills.VICTIMS)
def test_killed_anywhere_sixty_clips_end_as_if_nothing_had_happened(sixty, kind, number):
    bench, whole = sixty
    name = f"{kind}-{number}"
    started = time.monotonic()
    killed, code = bench.kill(name, (kind,), np.random.default_rng([kills.VICTIMS.index(kind), number]))
    ended = time.monotonic()
    assert code == -9 if kind == "driver" else code in (0, 1)
    # Every other one is taken up without Ray: the runner makes no difference to the bytes.
    found = bench.checked(name) if code == 0 else bench.finish(name, ("ray", "inline")[number % 2])
    logger.warning(
        "%s %d: after %d of %d artifacts, exit status %d; %.0f s, and %.0f s to make it up",
        *(kind, number, killed[0], bench.num_artifacts, code, ended - started, time.monotonic() - ended),
    )
    assert found == whole
