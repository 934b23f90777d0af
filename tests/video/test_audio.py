"""Sound in results: the packets of the same time span are copied, or there is none, with a reason."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ex4d import isolation, video
from ex4d.errors import BadSample
from ex4d.reconstruct import reconstruct
from ex4d.video import audio
from pipelines import cli

RATE, FPS, SIZE = 48000, 24, (48, 64)
DEPTH = np.linspace(3, 5, 48 * SIZE[0] * SIZE[1], dtype=np.float32).reshape(48, *SIZE)


def pictures(count: int = 48) -> np.ndarray:
    return np.stack([np.full((*SIZE, 3), 40 + 3 * index, np.uint8) for index in range(count)])


def tone(seconds: float, codec_format: str = "fltp") -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(RATE * seconds)) / RATE)
    wave[: RATE // 2] = 0  # half a second of silence: says where the sound lies
    return (wave[None] * (1 if codec_format == "fltp" else 32767)).astype(
        np.float32 if codec_format == "fltp" else "i2"
    )


def write(path: Path, codec: str = "aac", seconds: float = 2.0, times: list[int] | None = None, **options) -> Path:
    """Write 48 frames at 24 a second, or at `times` in 1/24 s, with a tone that begins after half a second."""
    with av.open(str(path), "w", **options) as container:
        shown = container.add_stream("libx264", rate=FPS)
        shown.height, shown.width = SIZE
        shown.pix_fmt = "yuv420p"
        heard = container.add_stream(codec, rate=RATE, layout="mono")
        for index, image in enumerate(pictures()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (times or range(48))[index], Fraction(1, FPS)
            container.mux(shown.encode(frame))
        kind = "s16" if codec.startswith("pcm") else "fltp"
        sound = av.AudioFrame.from_ndarray(tone(seconds, kind), format=kind, layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(heard.encode(sound))
        container.mux(shown.encode(None))
        container.mux(heard.encode(None))
    return path


def heard(data: bytes | Path) -> np.ndarray:
    """Return the samples that a player plays, mono."""
    import io

    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as container:
        frames = list(container.decode(audio=0)) if container.streams.audio else []
    return np.concatenate([frame.to_ndarray()[0] for frame in frames]) if frames else np.empty(0)


def added(path: Path, count: int = 48, fps: float = FPS) -> bytes | None:
    return isolation.run("with_audio", (isolation.File(str(path)), video.encode(pictures(count), fps)))


def refusal(path: Path, count: int = 48, fps: float = FPS) -> str:
    with pytest.raises(BadSample) as caught:
        added(path, count, fps)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.mkv", "ac3"), ("a.mov", "aac")]
)
def test_the_sound_is_copied_in_its_place(tmp_path, name, codec):
    path = write(tmp_path / name, codec)
    data = added(path)
    assert data == added(path)
    assert data.index(b"moov") < data.index(b"mdat")
    np.testing.assert_array_equal(video.read(data)[0], video.read(video.encode(pictures(), FPS))[0])
    source, copy = heard(path), heard(data)
    began = [np.flatnonzero(np.abs(samples) > 0.1)[0] / RATE for samples in (source, copy)]
    assert began == pytest.approx([0.5, 0.5], abs=0.06)
    assert len(copy) / RATE == pytest.approx(2.0, abs=0.06)


def test_a_part_has_its_part_of_the_sound(tmp_path):
    copy = heard(added(write(tmp_path / "a.mp4"), count=24))
    assert len(copy) / RATE == pytest.approx(1.0, abs=0.06)
    assert np.flatnonzero(np.abs(copy) > 0.1)[0] / RATE == pytest.approx(0.5, abs=0.03)


def test_a_late_video_takes_the_sound_of_its_time(tmp_path):
    # the pictures begin half a second after the sound: so does what is heard
    copy = heard(added(write(tmp_path / "a.mkv", times=[index + 12 for index in range(48)], seconds=2.5)))
    assert np.flatnonzero(np.abs(copy) > 0.1)[0] / RATE == pytest.approx(0.0, abs=0.06)


def test_another_time_than_the_source_s_has_no_sound(tmp_path):
    assert refusal(write(tmp_path / "a.mp4"), fps=12) == "audio_span"
    gaps = [index + (24 if index > 20 else 0) for index in range(48)]
    assert refusal(write(tmp_path / "b.mkv", times=gaps)) == "audio_span"


def test_what_mp4_does_not_hold_is_named(tmp_path):
    assert refusal(write(tmp_path / "a.mkv", "pcm_s16le")) == "audio_codec"
    assert refusal(write(tmp_path / "a.ts")) == "audio_codec"
    video.write(tmp_path / "b.mp4", pictures(), FPS)
    assert added(tmp_path / "b.mp4") is None


def test_a_huge_sound_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(audio, "MAX_BYTES", 1000)
    with pytest.raises(BadSample) as caught:
        audio.with_audio(path, video.encode(pictures(), FPS))
    assert caught.value.reason == "audio_limit"


def test_fuzzed_sound_costs_only_the_sound(tmp_path):
    whole = write(tmp_path / "a.mp4").read_bytes()
    first = whole.index(b"mp4a")  # the sample entry, and the tables after it
    rng = np.random.default_rng(5)
    for number in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(first, first + 400, 3):
            damaged[place] = rng.integers(256)
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(damaged)
        try:
            result = added(path)
        except BadSample:
            continue
        assert result is None or len(video.read(result)[0]) == 48


def test_reconstruct_keeps_the_sound_or_says_why_not(tmp_path, caplog):
    flags = ["--num-frames", "9", "--size", "48x64"]
    for name, codec, lines in (("a.mp4", "aac", 0), ("b.mkv", "pcm_s16le", 1)):
        write(tmp_path / name, codec)
        np.savez(tmp_path / f"{name[0]}.depth.npz", z_depth=DEPTH)
        caplog.clear()
        assert cli.main(["reconstruct", str(tmp_path / name), "--output", str(tmp_path / name[0]), *flags]) == 0
        assert sum("the result has no audio" in record.message for record in caplog.records) == lines
        assert (len(heard(tmp_path / name[0] / "cond.mp4")) > 0) == (lines == 0)
        assert len(heard(tmp_path / name[0] / "mask.mp4")) == 0


def test_a_source_whose_sound_is_lost_is_reconstructed_all_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    np.savez(tmp_path / "a.depth.npz", z_depth=DEPTH)
    view = reconstruct(path, num_frames=5, size=SIZE)
    run = isolation.run
    monkeypatch.setattr(isolation, "run", lambda name, args: run(name, args, isolation.Limits(wall_s=1e-6)))
    from ex4d.reconstruct_files import sounding

    assert sounding(view, view.cond_video) == video.encode(view.cond_video, view.fps)
