"""The whole way on a small scale: videos, shards, adapter, new view; and the same across two Ray nodes, and a sweep.

The base is the tiny model's classes with random weights: what is proved here is that the rooms fit together. How good
the trained one is, `ex4d demo` measures.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from ex4d import config, synthetic, video
from pipelines import cli

SIZE, NUM_FRAMES = [32, 32], 5


def write_base(folder: Path, corpus: list[Path]) -> Path:
    """Write an untrained one-block base whose codec is fitted to the corpus."""
    import tiny

    frames = [video.decode(p, video.frame_pts(p)[0][:NUM_FRAMES], size=(32, 32)) for p in corpus]
    codec = tiny.fit_codec(np.stack(frames), z_dim=8, num_shared=4)
    return tiny.build_tiny(folder, codec, tiny.new_transformer(8, num_layers=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with videos, a base, and a configuration over both."""
    folder = tmp_path_factory.mktemp("way")
    world = synthetic.SyntheticConfig(num_videos=6, num_frames=NUM_FRAMES, size=(32, 32), seed=17)
    corpus = synthetic.write_corpus(folder / "videos", world)
    write_base(folder / "base", corpus)
    sections = {
        "preprocess": {
            "input": str(folder / "videos"),
            "output": str(folder / "dataset"),
            "num_frames": NUM_FRAMES,
            "size": SIZE,
            "masks": {"num_masks": 3},
        },
        "model": {"base": str(folder / "base"), "lora_rank": 2, "adapter_hidden": 8},
        "train": {
            "data": str(folder / "dataset"),
            "output": str(folder / "train"),
            "num_steps": 4,
            "save_every": 2,
            "micro_batch_size": 2,
            "num_processes": 2,
            "lr": 1e-3,
            "wandb_mode": "disabled",
        },
        "sweep": {"output": str(folder / "sweep"), "num_trials": 4, "grace_steps": 2, "metric": "mse"},
    }
    sections["sweep"] |= {"window": 2, "repeat_seeds": 1}
    sections["sweep"]["space"] = {"train.lr": {"log_uniform": [1e-4, 1e-2]}, "model.lora_rank": {"choice": [1, 2]}}
    (folder / "all.yaml").write_text(yaml.safe_dump(sections))
    return folder


@pytest.mark.ray
def test_videos_become_a_new_view(place, capfd):
    settings = str(place / "all.yaml")
    assert cli.main(["preprocess", settings]) == 0
    assert cli.main(["verify", str(place / "dataset")]) == 0
    assert cli.main(["train", settings]) == 0
    metrics = [json.loads(line) for line in (place / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(m["loss"]) for m in metrics)
    source = sorted((place / "videos").glob("*.mp4"))[0]
    argv = ["generate", "--video", str(source), "--adapter", str(place / "train" / "adapter"), "--angle-deg", "40"]
    argv += ["--num-inference-steps", "2", "--guidance-scale", "1", "--seed", "3", "--output"]
    made = []
    for name in ("a.mp4", "b.mp4"):
        assert cli.main([*argv, str(place / name)]) == 0
        made.append((place / name).read_bytes())
    assert made[0] == made[1], "the same seed must give the same video"
    frames, _ = video.read(place / "a.mp4")
    assert frames.shape == (NUM_FRAMES, *SIZE, 3)
    record = json.loads((place / "a.json").read_text())
    assert record["axes"] == "opencv"
    assert 0 < record["visible_share"] < 1
    assert "dataset" in capfd.readouterr().out


@pytest.mark.heavy
@pytest.mark.ray
def test_a_sweep_ends_with_a_table_and_a_configuration_that_trains(place, capfd):
    settings = str(place / "all.yaml")
    assert cli.main(["preprocess", settings]) == 0
    assert cli.main(["sweep", settings, "train.num_processes=1"]) == 0
    rows = json.loads((place / "sweep" / "sweep.json").read_text())["trials"]
    assert len(rows) == 4
    assert {row["state"] for row in rows} <= {"finished", "stopped"}
    order = [(-row["step"], row["value"]) for row in rows]
    assert order == sorted(order)
    best = place / "sweep" / "best.yaml"
    assert str(best) in capfd.readouterr().out
    assert config.read_yaml(best)["train"]["lr"] == rows[0]["point"]["train.lr"]
    assert cli.main(["train", str(best), "train.num_steps=2"]) == 0


@pytest.mark.heavy
@pytest.mark.ray
def test_two_ray_nodes_give_the_bytes_and_losses_of_one_machine(place):
    import ray
    from ray.cluster_utils import Cluster

    settings = str(place / "all.yaml")
    assert cli.main(["preprocess", settings]) == 0
    assert cli.main(["train", settings]) == 0
    if ray.is_initialized():
        ray.shutdown()
    node = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        address = f"ray.address={cluster.address}"
        two = [f"preprocess.output={place / 'dataset2'}", address]
        assert cli.main(["preprocess", settings, *two]) == 0
        more = [f"train.output={place / 'train2'}", "train.launcher=ray", address]
        assert cli.main(["train", settings, *more]) == 0
    finally:
        ray.shutdown()
        cluster.shutdown()

    from ex4d.data.verify import verify

    assert verify(str(place / "dataset2")).tree_sha256 == verify(str(place / "dataset")).tree_sha256

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (place / name / "metrics.jsonl").read_text().splitlines()]

    np.testing.assert_allclose(losses("train2"), losses("train"), rtol=1e-6)
