"""Damaged and oddly named files: each becomes a sample that decodes or a counted reject, in bounded time."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import barcode
import numpy as np
import pytest

from ex4d import storage
from ex4d.data import sample
from ex4d.data.tar import read_sample
from ex4d.data.verify import verify
from ex4d.geometry.camera import intrinsics
from ex4d.geometry.masks import MaskConfig
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.preprocess.settings import DecodeLimits

LIMIT_S = 20.0
RECIPES = ("h264", "vp9_vfr", "av1", "hevc_open_gop", "h264_ts")
# Each is a good video: as an option, a pattern, a script, a URL, a path, a key that would break a tar, a name in bytes.
NAMES = (
    *(
        b"-i.mp4",
        b"%03d*?[a].mp4",
        b"$(touch pwned);'\"`id`.mp4",
        b"http:x.mp4",
        b"a%2f..%2fetc.mp4",
        b"new\nline.mp4",
    ),
    *(
        b"a.b.c..mp4",
        "Ünï \U0001f3ac\u202e4pm.mp4".encode(),
        b"\xff\xfe\x80.mp4",
        b"n" * 200 + b".mp4",
        b"rate=1,2.mp4",
    ),
)


def damaged(data: bytes, number: int, rng: np.random.Generator) -> bytes:
    """Return the bytes with a few flipped, or, every fourth time, cut off."""
    changed = bytearray(data)
    if number % 4 == 3:
        del changed[int(rng.integers(1, len(changed))) :]
    else:
        for position in rng.integers(0, len(changed), 1 + number % 30):
            changed[position] ^= int(rng.integers(1, 256))
    return bytes(changed)


def write_corpus(folder: Path, num_variants: int) -> None:
    """Write damaged videos of five kinds and good ones under hostile names, a depth file beside each."""
    folder.mkdir()
    work = folder.parent
    depth = work / "depth.npz"
    z_depth = np.broadcast_to(np.linspace(2, 3, barcode.SIZE[1], dtype=np.float32), (24, *barcode.SIZE))
    np.savez_compressed(depth, z_depth=z_depth, K=intrinsics(barcode.SIZE))
    rng = np.random.default_rng(7)
    originals = []
    for name in RECIPES:
        recipe = barcode.RECIPES[name]
        originals.append((recipe.suffix, barcode.write(work / f"{name}{recipe.suffix}", recipe, 24).read_bytes()))
    for number in range(num_variants):
        suffix, data = originals[number % len(originals)]
        path = folder / f"fuzzed-{number:03d}{suffix}"
        path.write_bytes(damaged(data, number, rng))
        os.link(depth, path.with_suffix(".depth.npz"))
    for number, name in enumerate(NAMES):
        path = os.path.join(os.fsencode(folder), name)
        barcode.write(work / "good.mp4", barcode.RECIPES["h264"], 24)
        with open(path, "wb") as file:  # a free box at the end makes each file's content unique
            file.write((work / "good.mp4").read_bytes() + (8 + number).to_bytes(4, "big") + b"free" + bytes(number))
        os.link(os.fsencode(depth), os.path.splitext(path)[0] + b".depth.npz")


def check(config: PreprocessConfig, num_files: int) -> dict[str, str]:
    """Return {name: "sample", or the reason} of all files; each must end, in time, as one or the other."""
    started = time.monotonic()
    result = preprocess.run(config, runner_name="inline")
    assert time.monotonic() - started < num_files * LIMIT_S
    assert (result.exit_code, result.committed) == (0, True)
    assert result.counts["videos_in"] == num_files
    fates = {row["key"]: row["reason"] for row in result.rejects if row["unit"] == "video"}
    fates |= {row["message"].partition(": ")[0]: row["reason"] for row in result.rejects if row["unit"] == "clip"}
    for path in Path(config.output).glob("staging/clips/*.tar"):
        clip = sample.decode(read_sample(storage.read_bytes(path), path.name.partition(".")[0]))
        assert clip.frames[[0, -1]].any()
        fates[clip.provenance["source_path"]] = "sample"
    assert len(fates) == num_files
    contained = {"decode_crash", "decode_timeout", "decode_cpu", "decode_memory", "worker_crash"}
    assert not contained & set(fates.values()), "no file needs the isolation; if one does, it was contained"
    assert not any(reason.startswith("bug:") for reason in fates.values())
    assert verify(config.output, full=True).ok
    return fates


def fuzz(folder: Path, num_variants: int) -> None:
    write_corpus(folder / "in", num_variants)
    config = PreprocessConfig(
        output=str(folder / "out"),
        input=str(folder / "in"),
        num_frames=9,
        size=barcode.SIZE,
        max_bad_fraction=1.0,
        limits=DecodeLimits(timeout_s=LIMIT_S, cpu_s=LIMIT_S),
        masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
    )
    fates = check(config, num_variants + len(NAMES))
    named = {name.decode("utf-8", "backslashreplace") for name in NAMES}
    assert {name: fates[name] for name in named} == dict.fromkeys(named, "sample")
    found = Counter(fate for name, fate in fates.items() if name not in named)
    assert found["sample"] > 0
    assert len(found) > 3
    assert not (folder / "pwned").exists()
    assert not Path("pwned").exists()


def test_two_hundred_fuzzed_files_and_hostile_names_are_samples_or_counted_rejects(tmp_path):
    fuzz(tmp_path, num_variants=200)


@pytest.mark.heavy
def test_every_file_of_the_media_is_a_sample_or_a_counted_reject(media, tmp_path):
    config = PreprocessConfig(
        output=str(tmp_path / "out"),
        input=[str(media)],
        num_frames=9,
        size=(96, 96),
        depth="parallax",
        max_bad_fraction=1.0,
        limits=DecodeLimits(timeout_s=60.0, cpu_s=60.0),
        masks=MaskConfig(num_masks=1),
    )
    num_files = preprocess.find_sources(config, preprocess.SyntheticConfig())
    fates = check(config, len(num_files))
    assert fates["derived_hostile/concat_script.mp4"] == "ffconcat_script"
    assert fates["derived_hostile/playlist.mp4"] == "playlist"
    assert fates["mp4ff_edge/mp4/testdata/prog_8s_enc_dashinit.mp4"] == "encrypted"
    assert "sample" in fates.values()
