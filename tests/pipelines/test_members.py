"""Optional members: what a warp with wrong depth shows, and the depth itself, from preprocessing to the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ex4d.data.loader import ShardLoader
from ex4d.data.manifest import read_dataset
from ex4d.data.sample import VISIBILITY, decode
from ex4d.data.tar import read_sample
from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from ex4d.geometry.masks import KINDS, MaskConfig
from ex4d.models import backbone
from ex4d.models.backbone import ModelConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from ex4d.train.objective import Encoder
from pipelines.encode import job as encode
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig

CORPUS = SyntheticConfig(num_videos=3, num_frames=9, size=(32, 32), supersample=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A dataset with both members, three masks a clip, of which one, two or none are visibility masks."""
    folder = tmp_path_factory.mktemp("members")
    write_corpus(folder / "corpus", CORPUS)
    made = PreprocessConfig(
        output=str(folder / "dataset"),
        input=str(folder / "corpus"),
        num_frames=5,
        size=(32, 32),
        masks=MaskConfig(num_masks=3, visibility=0.5, tracking=0.2, novel_view=0.3),
        members=("cond", "depth"),
        val_fraction=0.0,
        seed=2,
    )
    result = preprocess.run(made, runner_name="inline")
    assert (result.exit_code, result.counts["samples"]) == (0, 3)
    return made


def samples(output):
    for path in sorted((output / "staging" / "clips").glob("*.tar")):
        key = path.name.partition(".")[0]
        yield decode(read_sample(path.read_bytes(), key))


def test_every_sample_has_both_and_verify_knows_them(config, tmp_path):
    report = verify(config.output, full=True)
    assert report.problems == ()
    assert {"cond.mp4", "depth.mkv"} <= set(read_dataset(config.output)["members"])
    numbers = set()
    for sample in samples(preprocess.storage.local_path(config.output)):
        count = int((sample.kind == KINDS.index(VISIBILITY)).sum())
        numbers.add(count)
        assert len(sample.cond) == max(1, count) * 5
    assert len(numbers) > 1
    assert max(numbers) > 1
    plain = replace(config, output=str(tmp_path / "plain"), members=())
    preprocess.run(plain, runner_name="inline")
    assert read_dataset(plain.output)["members"] == ["camera.json", "json", "masks.npz", "mp4", "txt"]
    for ours, theirs in zip(
        samples(preprocess.storage.local_path(config.output)), samples(tmp_path / "plain"), strict=True
    ):
        assert not (ours.visible & ~theirs.visible).any()  # the wrong warp opens holes and closes none
        other = ours.kind != KINDS.index(VISIBILITY)
        np.testing.assert_array_equal(ours.visible[other], theirs.visible[other])
        torn = [a.sum() < b.sum() for a, b in zip(ours.visible[~other], theirs.visible[~other], strict=True)]
        assert all(torn)


def test_depth_is_kept_to_16_bits_of_disparity(config):
    """The synthetic corpus has exact depth: what comes back differs by no more than half a step."""
    for sample, path in zip(
        sorted(samples(preprocess.storage.local_path(config.output)), key=lambda s: s.provenance["source_path"]),
        sorted(preprocess.storage.local_path(config.input).glob("*.depth.npz")),
        strict=True,
    ):
        with np.load(path, allow_pickle=False) as file:
            exact = file["z_depth"][2:7].astype(np.float64)  # five frames in the middle of nine
        disparity = 1.0 / sample.z_depth.astype(np.float64)
        assert np.abs(disparity - 1.0 / exact).max() <= 0.51 / 65535 * disparity.max()


def test_a_visibility_mask_uncovers_the_warp_and_others_the_clip(config):
    loader = ShardLoader(config.output, "train", 3, 0)
    seen = set()
    for batch in (next(loader) for _ in range(4)):
        for kind, frames, shown, visible in zip(
            batch["kind"], batch["frames"], batch["shown"], batch["visible"], strict=True
        ):
            differs = np.abs(frames.astype(int) - shown)[visible].mean()
            is_visibility = kind == KINDS.index(VISIBILITY)
            assert (differs > 0.5) == is_visibility, differs
            assert is_visibility or differs == 0
            seen.add(bool(is_visibility))
    loader.close()
    assert seen == {True, False}


def test_each_visibility_mask_has_its_own_frames(config):
    by_key = {sample.key: sample for sample in samples(preprocess.storage.local_path(config.output))}
    loader = ShardLoader(config.output, "train", 3, 0)
    places = set()
    for batch in (next(loader) for _ in range(6)):
        for key, index, shown in zip(batch["keys"], batch["mask_index"], batch["shown"], strict=True):
            kinds = by_key[key].kind.tolist()
            if kinds[index] == KINDS.index(VISIBILITY):
                place = kinds[:index].count(KINDS.index(VISIBILITY))
                np.testing.assert_array_equal(shown, by_key[key].cond[5 * place : 5 * place + 5])
                places.add(place)
    loader.close()
    assert {0, 1} <= places


def test_the_condition_is_encoded_from_the_warp_by_trainer_and_encode_alike(config, tmp_path):
    base = backbone.load_base("tiny", components=("vae", "image_encoder"))
    done = encode.run(
        encode.EncodeConfig(config.output, str(tmp_path / "latents"), dtype="float32"),
        ModelConfig(),
        runner_name="inline",
    )
    assert done.exit_code == 0
    pixels, stored = (next(ShardLoader(str(path), "train", 3, 1)) for path in (config.output, tmp_path / "latents"))
    ours = Encoder(base, "unit", None).clips(pixels)
    torch.testing.assert_close(torch.from_numpy(stored["cond_latents"]), ours.cond_latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(stored["hole"]), ours.hole)
    clean = Encoder(base, "unit", None).clips({k: v for k, v in pixels.items() if k != "shown"})
    far = (clean.cond_latents - ours.cond_latents).abs().amax(dim=(1, 2, 3, 4)) > 0.05
    assert far.tolist() == [bool(kind == KINDS.index(VISIBILITY)) for kind in pixels["kind"]]
    assert far.any()


def test_an_unknown_member_is_refused(config):
    with pytest.raises(ConfigError, match=r"preprocess\.members"):
        preprocess.run(replace(config, members=("normals",)), runner_name="inline")
