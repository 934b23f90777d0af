"""`ex4d evaluate`: equal figures from any runner, no work done twice, bad videos counted, a results page."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pose_writers import write

from ex4d import config, storage, synthetic, video
from ex4d.errors import ConfigError, ContractError
from ex4d.evaluate.metrics import psnr
from ex4d.generate import GenerateConfig
from ex4d.geometry.pose_file import PoseFile
from pipelines import cli
from pipelines.evaluate import job as evaluate
from pipelines.evaluate.job import EvaluateConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vision_networks import make_dinov2, make_videomae

WORLD = synthetic.SyntheticConfig(num_frames=5, size=(32, 32), seed=17)
SAMPLER = GenerateConfig(num_inference_steps=2, guidance_scale=1.0)
RANGES = {"small": ("orbit", 30.0), "zoomed": ("zoom", 0.0, {"zoom": 1.5})}


def write_adapter(folder: Path, base_folder: Path, scale: float = 0.2, expert: Any = None) -> None:
    """Write an adapter that is not zero."""
    import torch

    from ex4d.models import backbone, weights
    from ex4d.models.adapter import build_model
    from ex4d.models.encoders import base_fingerprint

    base = backbone.load_base(str(base_folder), components=("transformer",), expert=expert)
    model = build_model(base.transformer, backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    told = weights.AdapterMetadata(
        *(str(base_folder), None, base_fingerprint(base.transformer), 2, 2.0, 8),
        num_frames=5,
        size=(32, 32),
        expert=expert,
    )
    weights.save_adapter(folder, model, told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two videos, a base, an adapter that is not zero, feature networks, and an evaluation of it all on two scenes."""
    import tiny

    path = tmp_path_factory.mktemp("evaluate")
    videos = synthetic.write_corpus(path / "videos", replace(WORLD, num_videos=2))
    frames = np.stack([video.read(place)[0] for place in videos])
    codec = tiny.fit_codec(frames, z_dim=8, num_shared=4)
    write_adapter(path / "adapter", tiny.build_tiny(path / "base", codec, tiny.new_transformer(8, num_layers=1)))
    for name, make in (("dinov2", make_dinov2), ("videomae", make_videomae)):
        (path / name).mkdir()
        make(path / name)
    report = scenes(path, path / "scenes")
    assert report.exit_code == 0
    return path


def scenes(folder: Path, output: Path, runner_name: str = "inline", sampler: GenerateConfig = SAMPLER, **changes):
    chosen = {
        "adapter": str(folder / "adapter"),
        "num_scenes": 2,
        "ranges": RANGES,
        "methods": ("adapter", "base", "other", "warp", "codec"),
        "image_features": str(folder / "dinov2"),
        "video_features": str(folder / "videomae"),
        **changes,
    }
    return evaluate.run(EvaluateConfig(output=str(output), **chosen), sampler, WORLD, runner_name=runner_name)


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
        resampled = clip["key"].endswith("zoomed")  # this warp is not rendered from the mesh, with which it is compared
        assert clip["figures"]["warp"]["rotation_deg"] == pytest.approx(0, abs=0.05 if resampled else 1e-6)
    distances = found["ranges"]["small"]["distances"]
    assert set(distances) == {"adapter", "base", "other", "warp", "codec"}
    assert all(row.keys() == {"image", "video"} and min(row.values()) >= 0 for row in distances.values())
    page = (folder / "scenes" / "report" / "index.html").read_text()
    for src in [part.partition('"')[0] for part in page.split('<video src="')[1:]]:
        assert (folder / "scenes" / "report" / src).is_file(), src
    assert page.count("<video") == 4 * 8  # source, depth, condition, four methods that are not the condition, truth


def test_the_base_alone_is_the_base(folder):
    """The baseline of an adapter, compared with a model that never had one."""
    from ex4d.evaluate import views
    from ex4d.generate import generate
    from ex4d.models import backbone
    from ex4d.models.adapter import build_model

    base = backbone.load_base(str(folder / "base"), device="cpu")
    model = build_model(base.transformer, backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=8))
    clip = views.scene_clip(0, replace(WORLD, seed=900_000))
    view = views.along(clip, views.Path("orbit", 30.0, {}))
    frames = generate(base, model.eval(), view.cond_video, view.visible, SAMPLER, 0)
    assert video.encode(frames, 8.0) == (folder / "scenes" / "videos" / "scene-00000-small.base.mp4").read_bytes()


@pytest.mark.parametrize(("num_gpus", "backend"), [(0.0, "cpu"), (0.5, "nvdiffrast")])
def test_all_workers_render_as_the_driver_says(folder, monkeypatch, num_gpus, backend):
    """Workers without a GPU of their own see the machine's all the same, and the driver may run where none is."""
    from ex4d.geometry import render
    from pipelines.evaluate import plan, stages

    monkeypatch.setattr(plan, "choose_backend", lambda name: "nvdiffrast")
    config = EvaluateConfig(str(folder / "adapter"), num_scenes=1, ranges={"small": ("orbit", 30.0)}, num_gpus=num_gpus)
    planned = plan.plan(config, SAMPLER, WORLD)
    assert planned.context.backend == backend
    asked = []
    monkeypatch.setattr(render, "choose_backend", lambda name: asked.append(name) or "cpu")
    row = planned.rows[0]
    view = stages.make_view(row, planned.context)["view"]
    stages.measure({"view": view, "made": {"warp": view.cond_video}, "seen": view.visible}, planned.context)
    assert set(asked) == {backend, "cpu"}


def test_one_expert_of_two_or_both_are_evaluated(folder, tmp_path):
    """Two adapters, each alone and both together: three results, and the base alone is the same in all of them."""
    import tiny

    from ex4d.models import weights

    shutil.copytree(folder / "base", tmp_path / "base")
    tiny.new_transformer(8, num_layers=1).save_pretrained(tmp_path / "base" / "transformer_2")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    for expert, scale in (("high", 0.2), ("low", 0.3)):
        write_adapter(tmp_path / "run" / expert, tmp_path / "base", scale, expert)
    found = {}
    for name in ("run", "run/high", "run/low"):
        output = tmp_path / f"out-{name.replace('/', '-')}"
        chosen = {"adapter": str(tmp_path / name), "num_scenes": 1, "methods": ("adapter", "base")}
        chosen |= {"image_features": None, "video_features": None, "sampler": replace(SAMPLER, num_inference_steps=4)}
        assert scenes(folder, output, **chosen).exit_code == 0
        found[name] = [clip["figures"] for clip in record(output)["clips"]]
    assert len({json.dumps([row["base"] for row in rows]) for rows in found.values()}) == 1
    assert len({json.dumps([row["adapter"] for row in rows]) for rows in found.values()}) == 3
    weights.save_adapter(tmp_path / "run" / "low", *weights.read_adapter(tmp_path / "run" / "high"))
    with pytest.raises(ContractError, match="of the expert high, not of low"):
        scenes(folder, tmp_path / "no", adapter=str(tmp_path / "run"))


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
    # A new range adds its own views, another seed redoes all of them; neither leaves anything behind.
    assert scenes(folder, output, ranges={**RANGES, "large": ("orbit", 60.0)}).result.worked == {"views": 2}
    assert scenes(folder, output, seed=1).result.worked == {"views": 4}
    keys = {f"scene-0000{index}-{name}" for index in (0, 1) for name in RANGES}
    assert {path.name.partition(".")[0] for path in (output / "videos").iterdir()} == keys
    staged = [path.name.partition(".")[0] for path in (output / "staging" / "clips").iterdir()]
    assert sorted(staged) == sorted([*keys, "scene-00000-large", "scene-00001-large"])
    # Where weights are kept while idle does not change the result.
    again = scenes(folder, output, seed=1, sampler=replace(SAMPLER, offload=True))
    assert again.result.worked == {"views": 0}


def test_what_changed_is_not_taken_from_before(folder, tmp_path):
    """The adapter's file, the base's weights, a file of poses: known by content, and read again by the same process."""
    place = tmp_path / "place"
    place.mkdir()
    shutil.copytree(folder / "adapter", place / "adapter")
    shutil.copytree(folder / "base", place / "base")
    poses = np.tile(np.eye(4), (5, 1, 1))
    chosen = {
        **{"adapter": str(place / "adapter"), "base": str(place / "base"), "methods": ("adapter", "warp")},
        "ranges": {"path": (str(place / "path.txt"), 0.0)},
        **{"image_features": None, "video_features": None},
    }

    def looked_at() -> tuple[int, dict]:
        report = scenes(folder, tmp_path / "out", **chosen)
        assert report.exit_code == 0
        return report.result.worked["views"], record(tmp_path / "out")["clips"][0]

    write(place / "path.txt", PoseFile(poses), "tum")
    before = looked_at()
    assert (before[0], looked_at()[0]) == (2, 0)
    poses[:, 0, 3] = np.linspace(0, 0.4, 5)
    write(place / "path.txt", PoseFile(poses), "tum")
    moved = looked_at()
    assert moved[0] == 2
    assert moved[1]["visible_share"] < before[1]["visible_share"]
    write_adapter(place / "adapter", place / "base", scale=0.5)
    other = looked_at()
    assert other[0] == 2
    assert other[1]["figures"]["adapter"] != moved[1]["figures"]["adapter"]
    assert other[1]["figures"]["warp"] == moved[1]["figures"]["warp"]
    weights = place / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    assert looked_at()[0] == 2


def test_a_refusal_is_kept_and_a_bad_neighbour_costs_only_its_own(folder, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(folder / "videos", videos)
    short = synthetic.write_corpus(tmp_path / "short", replace(WORLD, num_frames=3, num_videos=1))[0]
    (videos / "a.mp4").write_bytes(short.read_bytes())
    (videos / "a.depth.npz").write_bytes(short.with_suffix(".depth.npz").read_bytes())
    os.mkfifo(videos / "pipe.mp4")
    chosen = {"videos": str(videos), "ranges": {"small": ("orbit", 30.0)}, "max_bad_fraction": 0.5}
    chosen["methods"] = ("adapter", "other")
    report = scenes(folder, tmp_path / "out", **chosen)
    assert (report.exit_code, report.result.worked) == (0, {"views": 3})
    assert sorted((row["name"], row["reason"]) for row in report.result.rejects) == [
        ("a.mp4", "too_short"),
        ("pipe.mp4", "not_a_file"),
    ]
    figures = [clip["figures"] for clip in record(tmp_path / "out")["clips"]]
    assert len(figures) == 2
    assert [each["adapter"]["psnr_seen"] is None for each in figures] == [False, False]
    assert sorted(each["other"]["psnr_seen"] is None for each in figures) == [False, True]
    assert "(of 1)" in report.table()
    assert scenes(folder, tmp_path / "out", **chosen).result.worked == {"views": 0}


def test_a_video_that_hangs_its_decoder_costs_its_own_view(folder, tmp_path, monkeypatch):
    from ex4d import isolation

    hanging = sorted((folder / "videos").glob("*.mp4"))[1]
    calls, run = [], isolation.run

    def watched(function, args, limits=None):
        calls.append((function, args[0]))
        is_hanging = calls[-1] == ("decode", isolation.File(str(hanging)))
        return run(function, args, isolation.Limits(wall_s=1e-6) if is_hanging else limits)

    monkeypatch.setattr(isolation, "run", watched)
    chosen = {"videos": str(folder / "videos"), "ranges": RANGES, "methods": ("warp",), "max_bad_fraction": 0.5}
    report = scenes(folder, tmp_path / "out", **chosen)
    assert report.result.counts == {"views_planned": 4, "views": 2, "views_bad": 2}
    assert {(row["name"], row["reason"]) for row in report.result.rejects} == {(hanging.name, "decode_timeout")}
    decoded = Counter(Path(file.path).name for function, file in calls if function == "decode")
    assert decoded.pop(hanging.name) == 2, "a failure is tried again for each path"
    assert list(decoded.values()) == [1], "a clip is decoded once for all its paths"


def test_nothing_is_committed_while_results_change(folder, tmp_path, monkeypatch):
    from ex4d.viewer import page

    shutil.copytree(folder / "scenes", tmp_path / "out")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        scenes(folder, tmp_path / "out", ranges={"small": ("orbit", 30.0)})
    assert not (tmp_path / "out" / "evaluation.json").exists()


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
    reasons = sorted(row["reason"] for row in report.result.rejects)
    assert reasons == ["depth_missing", "duplicate", "unknown_container"]
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
        ({"ranges": {"wide": ("orbit", 120.0)}}, r"evaluate\.ranges\.wide.*angle_deg"),
        ({"ranges": {"odd": ("sideways", 30.0)}}, r"evaluate\.ranges\.odd.*trajectory"),
        ({"ranges": {"odd": ("zoom", 0.0, {"size": 3.0})}}, r"evaluate\.ranges\.odd"),
        ({"num_frames": 1}, r"evaluate\.num_frames"),
        ({"num_frames": 8}, r"evaluate\.num_frames"),
        ({"size": (40, 32)}, r"evaluate\.size"),
        ({"sampler": replace(SAMPLER, block_swap=9)}, r"generate\.block_swap"),
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


@pytest.mark.ray
def test_a_gpu_that_is_not_there_is_not_waited_for(folder, tmp_path):
    with pytest.raises(ConfigError, match="num_gpus"):
        scenes(folder, tmp_path / "out", "ray", num_gpus=1.0)


def test_lists_with_spans_and_secrets(folder, tmp_path):
    video_path = sorted((folder / "videos").glob("*.mp4"))[0]
    (tmp_path / "list.csv").write_text(f"path,start_s,end_s\n{video_path},0.1,0.4\n")
    with pytest.raises(ConfigError, match="cut out the spans"):
        scenes(folder, tmp_path / "out", videos=str(tmp_path / "list.csv"), methods=None)
    report = scenes(folder, "memory://user:hunter2@there/out", methods=("warp",), ranges={"a": ("orbit", 5.0)})
    assert report.exit_code == 0
    text = storage.read_bytes("memory://user:hunter2@there/out/evaluation.json").decode()
    page = storage.read_bytes("memory://user:hunter2@there/out/report/index.html").decode()
    assert "hunter2" not in text + page


def test_a_removed_setting_is_answered():
    with pytest.raises(ConfigError, match=r"evaluate\.corpus_seed.*always have the seed 900000"):
        config.validate(EvaluateConfig, {"corpus_seed": 17}, "evaluate")
