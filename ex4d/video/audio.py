"""Copy the source's sound into a written mp4, packet by packet, without decoding or encoding it.

All of this runs in the decoding child (`ex4d.isolation`): the parent passes the source and the mp4 that it encoded, and
gets back the mp4 with sound, or a reason.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

from ex4d.errors import BadSample
from ex4d.video import frames
from ex4d.video.source import Source, ffmpeg_errors, opened

# FFmpeg's names of the codecs that mp4 can hold and that browsers or players read from it.
CODECS = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")
MAX_BYTES = 256 * 2**20  # of sound in a result: 23 minutes of uncompressed stereo
MAX_PACKETS = 2**20  # six hours of AAC
TOLERANCE_S = Fraction(1, 10)  # largest offset between the pictures of a result and its sound
INDEX_BYTES = 64  # of the mp4's index for each packet, an upper bound


def with_audio(source: Source, data: bytes) -> bytes | None:
    """Add the sound of its source to an mp4; return its bytes, or None if the source has no sound.

    Args:
        source: the video whose first frames were used.
        data: an mp4 made by `encode`, with one frame for each frame used, in order.

    Raises:
        BadSample: audio_codec (mp4 cannot hold it), audio_span (the result plays its frames at other times than the
            source), audio_damaged, audio_limit (MAX_BYTES, MAX_PACKETS), and the reasons of `source.opened`.
    """
    import av

    with opened(source) as (container, _, _):
        streams = container.streams.audio
        if not streams:
            return None
        _check_codec(streams[0])
    with opened(data) as (container, stream, _):
        base, packets = stream.time_base, container.demux(stream)
        pictures = sorted((packet.pts * base, (packet.duration or 0) * base) for packet in packets if packet.size)
    start, seconds = _span(source, pictures)
    with opened(source) as (container, _, _), opened(data) as (own, shown, _):
        sound = container.streams.audio[0]
        sound_packets = _packets_within(container, sound, start, seconds)
        if not sound_packets:
            return None
        num_packets = len(pictures) + len(sound_packets)
        out = io.BytesIO()
        options = {"fflags": "+bitexact", "moov_size": str(4096 + INDEX_BYTES * num_packets)}
        copying = ffmpeg_errors("audio_damaged", "copying the sound")
        with copying, av.open(out, "w", format="mp4", options=options) as result:
            places = [result.add_stream_from_template(stream) for stream in (shown, sound)]
            packets = [(packet, places[0]) for packet in own.demux(shown) if packet.size]
            packets += [(packet, places[1]) for packet in sound_packets]
            for packet, place in sorted(packets, key=lambda pair: pair[0].dts * pair[0].time_base):
                packet.stream = place
                result.mux(packet)
        return out.getvalue()


def _check_codec(stream: Any) -> None:
    name = stream.codec_context.codec.canonical_name if stream.codec_context else "of an unknown kind"
    if name not in CODECS:
        raise BadSample("audio_codec", f"sound {name} cannot be copied into mp4 ({', '.join(CODECS)} can)")
    if stream.codec_context.codec_tag in ("enca", "drms") or "enc_key_id" in stream.metadata:
        raise BadSample("audio_codec", "the sound is encrypted")
    if not stream.codec_context.sample_rate:  # MPEG-TS leaves it to the decoder, which is not opened
        raise BadSample("audio_codec", "its container does not say the sound's sample rate")


def _span(source: Source, pictures: list[tuple[Fraction, Fraction]]) -> tuple[Fraction, Fraction]:
    """Return (start in the source, length) in s of the result. Raises BadSample if a frame is shown at another time."""
    pts, time_base = frames.frame_pts(source)
    if len(pts) < len(pictures):
        raise BadSample("audio_span", f"the result has {len(pictures)} frames, the source {len(pts)}")
    first = int(pts[0])
    off = max(
        abs((int(tick) - first) * time_base - (at - pictures[0][0]))
        for tick, (at, _) in zip(pts, pictures, strict=False)
    )
    if off > TOLERANCE_S:
        raise BadSample("audio_span", f"the result shows frames up to {float(off):.2f} s off their time in the source")
    return first * time_base, pictures[-1][0] + pictures[-1][1] - pictures[0][0]


def _packets_within(container: Any, stream: Any, start: Fraction, seconds: Fraction) -> list[Any]:
    """Return the packets of the span and the one before, which primes the decoder; times relative to its start."""
    packets: list[Any] = []
    num_bytes, base = 0, stream.time_base
    shift, end = round(start / base), round(seconds / base)
    with ffmpeg_errors("audio_damaged", "reading the sound"):
        for packet in container.demux(stream):
            if not packet.size or packet.pts is None or packet.pts - shift >= end:
                break
            at = packet.pts - shift
            if at + (packet.duration or 0) < 0:
                continue
            if packet.is_corrupt or (packets and at <= packets[-1].pts):
                raise BadSample("audio_damaged", f"the sound is cut short or goes back in time at pts {packet.pts}")
            packet.pts = packet.dts = at
            packets.append(packet)
            num_bytes += packet.size
            if num_bytes > MAX_BYTES or len(packets) > MAX_PACKETS:
                raise BadSample("audio_limit", f"the sound has more than {MAX_BYTES} bytes or {MAX_PACKETS} packets")
    return packets
