"""Files that are not videos, or exceed the limits, are rejected with a reason; fuzzed ones always terminate."""

from __future__ import annotations

import os
from pathlib import Path

import barcode
import numpy as np
import pytest

from ex4d import video
from ex4d.errors import BadSample
from ex4d.isolation import File, Isolated, Limits


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(BadSample) as caught:
        call(*args, **kwargs)
    return caught.value.reason


REFUSED = {
    "derived_hostile/bomb_30000x30000.png": "container_not_allowed",
    "derived_hostile/concat_relative.mp4": "ffconcat_script",
    "derived_hostile/concat_script.mp4": "ffconcat_script",
    "derived_hostile/declared_65535x65535.mp4": "size_limit",
    "derived_hostile/html_404.mp4": "html_page",
    "derived_hostile/jpeg_named.mp4": "container_not_allowed",
    "derived_hostile/lfs_pointer.mp4": "lfs_pointer",
    "derived_hostile/no_mdat.mp4": "truncated",
    "derived_hostile/no_moov.mp4": "no_moov",
    "derived_hostile/offsets_past_eof.mp4": "truncated",
    "derived_hostile/playlist.mp4": "playlist",
    "derived_hostile/timescale_zero.mp4": "timescale_zero",
    "derived_hostile/truncated_60pct.mp4": "no_moov",
    "derived_hostile/truncated_faststart_40pct.mp4": "truncated",
    "derived_hostile/zero_byte.mp4": "empty_file",
    "derived_hostile/bitflips_40.mp4": "decode_corrupt",
    "decord_broken/corrupted.mp4": "decode_error",
    "libwebm/invalid/invalid_vp9_bitstream-bug_1416.webm": "size_limit",
    "mp4ff_edge/mp4/testdata/init.mp4": "no_frames",
    "mp4ff_edge/mp4/testdata/init_truncated.mp4": "truncated",
    "mp4ff_edge/mp4/testdata/opus.mp4": "no_video_stream",
    "mp4ff_edge/mp4/testdata/prog_8s_enc_dashinit.mp4": "encrypted",
}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".png", ".libwebm")


def saturated(num_frames: int = 6) -> np.ndarray:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    return np.stack([np.full((64, 96, 3), colours[i % 6], np.uint8) for i in range(num_frames)])


def test_scripts_and_texts_are_refused_by_name(tmp_path):
    secret = barcode.write(tmp_path / "other.mp4", barcode.RECIPES["h264"], num_frames=4)
    texts = {
        "ffconcat_script": f"ffconcat version 1.0\nfile '{secret.name}'\n",
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{secret.name}\n",
        "html_page": "<!DOCTYPE html><html></html>",
        "lfs_pointer": "version https://git-lfs.github.com/spec/v1\n",
        "empty_file": "",
        "unknown_container": "just words",
    }
    for reason, text in texts.items():
        path = tmp_path / "text.mp4"
        path.write_text(text)
        assert reason_of(video.probe, path) == reason


def test_a_hostile_file_name_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-i concat:x.mp4", "%03d.mp4", "a\nb'\";$(x).mp4", "http:x.mp4"):
        barcode.write(tmp_path / "plain.mp4", barcode.RECIPES["h264"], num_frames=2).rename(tmp_path / name)
        assert video.probe(name).codec == "h264"


def test_an_encrypted_sample_entry_is_refused():
    data = video.encode(saturated(), 10)
    assert reason_of(video.probe, data.replace(b"avc1\x00\x00\x00\x00", b"encv\x00\x00\x00\x00")) == "encrypted"


def test_a_file_cut_short_is_refused():
    data = video.encode(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3)).astype(np.uint8), 10)
    assert reason_of(video.frame_pts, data[: len(data) * 2 // 3]) == "truncated"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadSample, match="pipe"):
        video.probe(tmp_path / "pipe.mp4")


def use(child: Isolated, path: str) -> str:
    """Decode the first and last frame of a file as a pipeline does; return "ok" or the reason of the rejection."""
    try:
        child.call("probe", File(path))
        pts, _ = child.call("frame_pts", File(path))
        child.call("decode", File(path), pts[[0, -1]], (32, 32))
    except BadSample as error:
        return error.reason if error.message else "no message"
    return "ok"


@pytest.fixture(scope="module")
def child():
    isolated = Isolated(Limits(wall_s=20, cpu_s=20))
    yield isolated
    isolated.close()


def test_fuzzed_files_are_used_or_refused(child, tmp_path):
    check_fuzzed(child, tmp_path, num_variants=40)


@pytest.mark.heavy
def test_two_hundred_fuzzed_files_are_used_or_refused(child, tmp_path):
    check_fuzzed(child, tmp_path, num_variants=200)


def check_fuzzed(child: Isolated, folder: Path, num_variants: int) -> None:
    rng = np.random.default_rng(7)
    recipes = [barcode.RECIPES[name] for name in ("h264", "vp9_vfr", "av1", "hevc_open_gop", "h264_ts")]
    originals = [barcode.write(folder / f"{i}{r.suffix}", r, num_frames=24) for i, r in enumerate(recipes)]
    fates = []
    for index in range(num_variants):
        original = originals[index % len(originals)]
        data = bytearray(original.read_bytes())
        if index % 4 == 3:
            del data[int(rng.integers(1, len(data))) :]
        else:
            for position in rng.integers(0, len(data), 1 + index % 30):
                data[position] ^= int(rng.integers(1, 256))
        path = folder / f"fuzzed{original.suffix}"
        path.write_bytes(data)
        fates.append(use(child, str(path)))
    assert len(fates) == num_variants
    lost = {"decode_crash", "decode_timeout", "decode_cpu", "decode_memory"} & set(fates)
    assert not lost, "no variant should need the isolation; if one does, it was contained"
    assert "ok" in fates
    assert len(set(fates)) > 3


def test_every_file_of_the_media_is_used_or_refused_with_its_reason(media, child):
    files = sorted(path for path in media.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    fates = {str(path.relative_to(media)): use(child, str(path)) for path in files}
    assert {name: fates[name] for name in REFUSED} == REFUSED
    good = [
        name
        for name in fates
        if not name.startswith(("derived_hostile", "decord_broken", "found_in_use", "libwebm", "mp4ff", "rgbd"))
    ]
    assert {fates[name] for name in good} == {"ok"}
    assert fates["mp4ff_edge/examples/resegmenter/testdata/outV300.mp4"] == "ok"
