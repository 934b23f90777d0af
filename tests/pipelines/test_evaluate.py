"""`ex4d evaluate`: the same figures by any runner, nothing done twice, bad videos counted, a page to look at."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ex4d import storage, synthetic, video
from ex4d.errors import ConfigError, ContractError
from ex4d.evaluate.metrics import psnr
from ex4d.generate import GenerateConfig
from pipelines import cli, evaluate
from pipelines.evaluate import EvaluateConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vision_networks import make_dinov2, make_videomae

WORLD = synthetic.SyntheticConfig(num_frames=5, size=(32, 32), seed=17)
SAMPLER = GenerateConfig(num_inference_steps=2, guidance_scale=1.0)
RANGES = {"small": ("orbit", 30.0), "zoomed": ("zoom", 0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two videos, a base, an adapter that is not zero, feature networks, and an evaluation of it all on two scenes."""
    import torch

    from ex4d.models import backbone, linear_codec, tiny, weights
    from ex4d.models.adapter import build_model
    from ex4d.models.encoders import base_fingerprint

    path = tmp_path_factory.mktemp("evaluate")
    videos = synthetic.write_corpus(path / "videos", replace(WORLD, num_videos=2))
    frames = np.stack([video.read(place)[0] for place in videos])
    codec = linear_codec.fit(frames, z_dim=8, num_shared=4)
    base_folder = tiny.build_tiny(path / "base", codec, tiny.new_transformer(8, num_layers=1))
    base = backbone.load_base(str(base_folder), components=("transformer",))
    model = build_model(base.transformer, backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    told = weights.AdapterMetadata(
        str(base_folder), None, base_fingerprint(base.transformer), 2, 2.0, 8, num_frames=5, size=(32, 32)
    )
    weights.save_adapter(path / "adapter", model, told)
    for name, make in (("dinov2", make_dinov2), ("videomae", make_videomae)):
        (path / name).mkdir()
        make(path / name)
    report = scenes(path, path / "scenes")
    assert report.exit_code == 0
    return path


def scenes(folder: Path, output: Path, runner_name: str = "inline", **changes):
    chosen = {
        "num_scenes": 2,
        "ranges": RANGES,
        "methods": ("adapter", "base", "other", "warp", "codec"),
        "image_features": str(folder / "dinov2"),
        "video_features": str(folder / "videomae"),
        **changes,
    }
    config = EvaluateConfig(adapter=str(folder / "adapter"), output=str(output), **chosen)
    return evaluate.run(config, SAMPLER, WORLD, runner_name=runner_name)


def record(output: Path) -> dict:
    return json.loads((output / "evaluation.json").read_text())


def test_figures_videos_and_page_are_those_of_the_methods(folder):
    found = record(folder / "scenes")
    assert [clip["key"] for clip in found["clips"]] == [
        *("scene-00000-small", "scene-00000-zoomed", "scene-00001-small", "scene-00001-zoomed")
    ]
    for clip in found["clips"]:
        paths = {
            name: folder / "scenes" / "videos" / f"{clip['key']}.{name}.mp4" for name in ("truth", "base", "codec")
        }
        shown = {name: video.read(path)[0] for name, path in paths.items()}
        for name in ("base", "codec"):  # through the videos' own loss
            assert clip["figures"][name]["psnr"] == pytest.approx(psnr(shown[name][1:], shown["truth"][1:]), abs=2.0)
        assert clip["figures"]["codec"]["psnr"] > clip["figures"]["base"]["psnr"]
        assert clip["figures"]["adapter"] != clip["figures"]["base"]
        assert clip["figures"]["warp"]["rotation_deg"] == pytest.approx(0, abs=1e-6)
    distances = found["ranges"]["small"]["distances"]
    assert set(distances) == {"adapter", "base", "other", "warp", "codec"}
    assert all(row.keys() == {"image", "video"} and min(row.values()) >= 0 for row in distances.values())
    page = (folder / "scenes" / "report" / "index.html").read_text()
    for src in [part.partition('"')[0] for part in page.split('<video src="')[1:]]:
        assert (folder / "scenes" / "report" / src).is_file(), src
    assert page.count("<video") == 4 * 8  # source, depth, condition, four methods that are not the condition, truth


def test_the_base_alone_is_the_base(folder):
    """What an adapter is compared with, against a model that never had one."""
    from ex4d.evaluate import views
    from ex4d.generate import generate
    from ex4d.models import backbone
    from ex4d.models.adapter import build_model

    base = backbone.load_base(str(folder / "base"), device="cpu")
    model = build_model(base.transformer, backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=8))
    world = replace(WORLD, seed=900_000)
    view = views.of_scene(0, world, "orbit", 30.0)
    frames = generate(base, model.eval(), view.cond_video, view.visible, SAMPLER, 0)
    assert video.encode(frames, 8.0) == (folder / "scenes" / "videos" / "scene-00000-small.base.mp4").read_bytes()


@pytest.mark.ray
def test_ray_finds_the_same(folder, tmp_path):
    report = scenes(folder, tmp_path / "out", "ray")
    assert report.exit_code == 0
    ours, theirs = record(tmp_path / "out"), record(folder / "scenes")
    assert ours["clips"] == theirs["clips"]
    assert ours["ranges"] == theirs["ranges"]
    for path in (folder / "scenes" / "videos").iterdir():
        assert (tmp_path / "out" / "videos" / path.name).read_bytes() == path.read_bytes()


def test_only_what_is_missing_is_done_again(folder, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(folder / "scenes", output)
    before = record(output)
    assert scenes(folder, output).result.worked == {"views": 0}
    gone = next((output / "staging" / "clips").glob("scene-00001-small.*"))
    gone.unlink()
    (output / "evaluation.json").unlink()
    assert scenes(folder, output).result.worked == {"views": 1}
    after = record(output)
    assert (after["clips"], after["ranges"]) == (before["clips"], before["ranges"])
    # A new range adds its own views, another seed makes all of them again.
    assert scenes(folder, output, ranges={**RANGES, "large": ("orbit", 60.0)}).result.worked == {"views": 2}
    assert scenes(folder, output, seed=1).result.worked == {"views": 4}


def test_videos_of_ones_own_and_what_cannot_be_one(folder, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(folder / "videos", videos)
    first, second = sorted(videos.glob("*.mp4"))
    (videos / "again.mp4").write_bytes(first.read_bytes())
    (videos / "again.depth.npz").write_bytes(first.with_suffix(".depth.npz").read_bytes())
    (videos / "alone.mp4").write_bytes(second.read_bytes() + b"\0")  # another file without depth
    (videos / "broken.mp4").write_bytes(b"\0" * 5000)
    (videos / "broken.depth.npz").write_bytes(first.with_suffix(".depth.npz").read_bytes())
    chosen = {"videos": str(videos), "methods": None, "max_bad_fraction": 0.5, "ranges": {"small": ("orbit", 30.0)}}
    report = scenes(folder, tmp_path / "out", **chosen)
    assert report.exit_code == 0
    assert report.result.counts == {"views_planned": 4, "views": 2, "views_bad": 2}
    assert sorted(row["reason"] for row in report.result.rejects) == ["depth_missing", "unknown_container"]
    found = record(tmp_path / "out")
    assert {clip["video"] for clip in found["clips"]} <= {first.name, second.name, "again.mp4"}
    assert set(found["clips"][0]["figures"]) == {"adapter", "base", "warp", "inpaint"}
    assert all(clip["figures"]["adapter"]["psnr"] is None for clip in found["clips"])
    assert found["clips"][0]["figures"]["adapter"]["psnr_seen"] > 0
    assert "PSNR, dB" not in report.tables["small"][0]
    assert "broken.mp4: unknown_container" in report.table()
    # Fewer may be bad: the run fails, and says so.
    strict = scenes(folder, tmp_path / "out", **{**chosen, "max_bad_fraction": 0.1})
    assert strict.exit_code == 1
    assert "2 of 4 views are bad" in strict.table()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ("magic",)}, r"evaluate\.methods"),
        ({"ranges": {}}, r"evaluate\.ranges"),
        ({"ranges": {"A b": ("orbit", 30.0)}}, r"evaluate\.ranges"),
        ({"ranges": {"wide": ("orbit", 120.0)}}, "angle_deg"),
        ({"ranges": {"odd": ("sideways", 30.0)}}, "trajectory"),
        ({"corpus_seed": 17}, r"evaluate\.corpus_seed"),
        ({"num_scenes": 1}, r"evaluate\.methods.*two clips"),
        ({"videos": "/nowhere/at/all", "methods": ("adapter",)}, r"evaluate\.videos"),
        ({"videos": "/nowhere", "methods": ("codec",)}, r"evaluate\.methods"),
        ({"image_features": "/nowhere"}, r"evaluate\.image_features"),
        ({"size": (33, 32)}, "size"),
        ({"num_gpus": -1}, r"evaluate\.num_gpus"),
    ],
)
def test_a_wrong_choice_is_refused_before_any_work(folder, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        scenes(folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "staging").exists()


def test_a_damaged_result_is_not_taken(folder, tmp_path):
    shutil.copytree(folder / "scenes", tmp_path / "out")
    path = next((tmp_path / "out" / "staging" / "clips").iterdir())
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ContractError):
        scenes(folder, tmp_path / "out")


def test_the_command_says_what_it_found(folder, tmp_path, capsys):
    config = {
        "evaluate": {
            "adapter": str(folder / "adapter"),
            "output": str(tmp_path / "out"),
            "num_scenes": 1,
            "ranges": {"small": ["orbit", 30]},
            "methods": ["adapter", "warp"],
        },
        "generate": {"num_inference_steps": 2, "guidance_scale": 1},
        "synthetic": {"num_frames": 5, "size": [32, 32]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["evaluate", str(tmp_path / "c.yaml"), "evaluate.adapter=/nowhere"]) == 2
    shutil.copytree(folder / "scenes", tmp_path / "other")
    assert cli.main(["evaluate", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "points off, px" in said
    assert "1 planned, 1 done, 0 bad" in said
    assert storage.exists(tmp_path / "out" / "evaluation.json")
