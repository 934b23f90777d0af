"""One tree hash for one corpus, wherever and however it is processed: the demo's videos, and real clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray_head
import yaml

from ex4d import config as config_file
from ex4d.data.verify import verify
from ex4d.synthetic import write_corpus
from pipelines.commands import demo

SCRIPT = """
import sys
from pipelines.runtime.cluster import require_token
require_token()
from ray.cluster_utils import Cluster
from ex4d import config
from pipelines.preprocess import run as preprocess
from pipelines.runtime.runner import RayConfig

path, where = sys.argv[1:]
section = config.load(path, preprocess.SECTIONS)["preprocess"]
if where == "inline":
    sys.exit(preprocess.run(section, runner_name="inline").exit_code)
if where == "one node":
    sys.exit(preprocess.run(section).exit_code)
node = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
cluster.wait_for_nodes()
code = preprocess.run(section, RayConfig(address=cluster.address)).exit_code
cluster.shutdown()
sys.exit(code)
"""
ROOT = Path(__file__).resolve().parents[2]
WAYS = (
    {"where": "inline", "num_workers": 1, "keep_staging": "all"},
    {"where": "one node", "num_workers": 1, "keep_staging": "none"},
    {"where": "one node", "num_workers": 2, "keep_staging": "current"},
    {"where": "two nodes", "num_workers": 2, "keep_staging": "none"},
)


def demo_corpus(folder: Path, media: Path | None) -> dict[str, object]:
    """Write the videos of the demo; return its settings."""
    sections = config_file.load(str(ROOT / demo.CONFIG), demo.sections())
    write_corpus(folder, sections["synthetic"])
    chosen = sections["preprocess"]
    return {"input": str(folder), "num_frames": chosen.num_frames, "size": [*chosen.size], "depth": "sidecar"}


def real_corpus(folder: Path, media: Path | None) -> dict[str, object]:
    """Return settings that cut over 60 clips from real videos; depth comes from their motion, or they are rejected."""
    assert media is not None
    places = [str(media / name) for name in ("vipe_examples", "pyscenedetect_cuts", "sam2_gallery", "torchcodec_nasa")]
    clip = {"num_frames": 5, "size": [64, 96], "fps": 8.0, "clips_per_shot": 12, "clips_per_video": 12}
    return {"input": places, **clip, "depth": "parallax", "max_bad_fraction": 1.0}


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("corpus", [demo_corpus, real_corpus])
def test_the_tree_hash_is_the_same_in_every_way_of_running(corpus, tmp_path, request):
    media = request.getfixturevalue("media") if corpus is real_corpus else None
    section = corpus(tmp_path / "in", media)
    found = {}
    for number, way in enumerate(WAYS):
        output = tmp_path / f"out-{number}"
        chosen = {**section, "output": str(output), "masks": {"num_masks": 1}, "shard_size_mb": 1}
        chosen |= {name: way[name] for name in ("num_workers", "keep_staging")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"preprocess": chosen}))
        done = ray_head.run_script(SCRIPT, str(tmp_path / "run.yaml"), way["where"])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        report = verify(str(output), full=True)
        assert report.problems == ()
        counts = json.loads((output / "run.jsonl").read_text().splitlines()[-1])["counts"]
        found[json.dumps(way)] = (counts["clips_planned"], counts["samples"], report.tree_sha256)
    assert len(set(found.values())) == 1, found
    assert counts["clips_planned"] >= (48 if corpus is demo_corpus else 60), found
    assert counts["samples"] >= (48 if corpus is demo_corpus else 10), found
