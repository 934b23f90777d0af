"""Recognise a file by its first bytes, before any demuxer reads it.

FFmpeg opens more than videos: a text file can be a script that makes it read *other* files (ffconcat, HLS), and
pictures and subtitles are streams, too. So the format is determined here, from an allowlist, and passed to FFmpeg.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO

from ex4d.errors import BadSample

# Formats, named like FFmpeg's demuxers; an animated webp is first converted to a mov (`pictures.of_webp`)
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "gif", "apng", "webp")

# Allowed decoders, by FFmpeg's names. FFmpeg has about three hundred, many for games or one vendor's files.
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpegvideo", "mpeg4"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "h263p", "wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "prores", "dnxhd"),
    *("ffv1", "theora", "gif", "webp", "apng", "png", "flv"),
)

# Usual suffixes of video files; whatever its suffix, a file is recognised by its content.
VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg"),
    *(".flv", ".ogv"),
)

_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"uuid", b"moof", b"sidx")
_PICTURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG", "png"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
)
_OTHERS = (
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"%PDF", "pdf"),
    (b"ID3", "mp3"),
    (b"fLaC", "flac"),
    (b"\x93NUMPY", "npy"),
    (b"WEBVTT", "subtitles"),
    (b"[Script Info]", "subtitles"),
)
MAX_SIDE_PX = 8192  # 8K UHD in either orientation; larger sizes are mistakes or attacks
_MAX_MOOV_BYTES = 256 * 2**20


def codecs() -> tuple[str, ...]:
    """Return the allowed decoders: CODECS and those in the comma-separated variable EX4D_CODECS."""
    more = os.environ.get("EX4D_CODECS", "").replace(" ", "").split(",")
    return (*CODECS, *(name for name in more if name))


def container_of(file: IO[bytes]) -> str:
    """Return the demuxer's name, one of CONTAINERS, of a seekable binary file.

    Raises:
        BadSample: `empty_file`, `ffconcat_script`, `playlist`, `html_page`, `lfs_pointer`, `container_not_allowed`
            (another known format, named), `unknown_container`; for mp4 and mov also `no_moov`, `encrypted`,
            `timescale_zero`, `truncated`, `size_limit`.
    """
    file.seek(0)
    head = file.read(4096)
    name = _known_container(head)
    if name is None:
        raise _refusal(head)
    if name == "mov":
        check_mov(file)
    file.seek(0)
    return name


def _known_container(head: bytes) -> str | None:
    if head[4:8] in _MOV_BOXES:
        return None if head[8:12] in (b"avif", b"heic", b"mif1", b"heix", b"msf1") else "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:11] == b"AVI":
        return "avi"
    if head.startswith(b"FLV\x01"):
        return "flv"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"\x89PNG") and b"acTL" in head[: head.find(b"IDAT")]:  # else a still picture
        return "apng"
    if is_animated_webp(head):
        return "webp"
    if head.startswith(b"\x00\x00\x01\xba"):
        return "mpeg"
    for first, packet_size in ((0, 188), (4, 192)):
        if len(head) > first + 4 * packet_size and all(head[first + i * packet_size] == 0x47 for i in range(5)):
            return "mpegts"
    return None


def is_animated_webp(head: bytes) -> bool:
    """Return whether a file that begins with `head` is an animated WebP (RFC 9649)."""
    return head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X" and len(head) > 20 and bool(head[20] & 2)


def _refusal(head: bytes) -> BadSample:
    if not head:
        return BadSample("empty_file", "the file has no bytes")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = text.lower()
    if lower.startswith(b"ffconcat"):
        return BadSample("ffconcat_script", "an ffconcat script would make the decoder read other files")
    if lower.startswith((b"#extm3u", b"[playlist]")) or b"<mpd" in lower[:1024] or b"<smil" in lower[:1024]:
        return BadSample("playlist", "a playlist would make the decoder read other files")
    if lower.startswith((b"<!doctype html", b"<html")):
        return BadSample("html_page", "the file is an HTML page, probably a failed download")
    if text.startswith(b"version https://git-lfs"):
        return BadSample("lfs_pointer", "the file is a Git LFS pointer; fetch the real file")
    for magic, name in (*_PICTURES, *_OTHERS):
        if text.startswith(magic):
            return BadSample("container_not_allowed", f"detected {name}; allowed: {', '.join(CONTAINERS)}")
    if head.startswith(b"RIFF") or head[4:8] in _MOV_BOXES:
        detected = head[8:12].decode("ascii", "replace").strip().lower()
        return BadSample("container_not_allowed", f"detected {detected}; allowed: {', '.join(CONTAINERS)}")
    return BadSample("unknown_container", f"first bytes {head[:8].hex()} are not those of an allowed container")


def check_mov(file: IO[bytes]) -> None:
    """Check that an mp4 or mov has a header that can be decoded (ISO/IEC 14496-12, 23001-7).

    Raises:
        BadSample: `no_moov`, `truncated` (the header ends early), `timescale_zero`, `encrypted` (a sample entry
            `encv` or `drmi`: FFmpeg without a key decodes such a stream to grey noise and reports no error),
            `size_limit` (the sample entry declares more than MAX_SIDE_PX).
    """
    size = file.seek(0, 2)
    for kind, start, end in _boxes_of_file(file, size):
        if kind == b"moov":
            if end > size or end - start > _MAX_MOOV_BYTES:
                raise BadSample("truncated", f"the header says {end - start} bytes, the file ends after {size - start}")
            file.seek(start)
            _check_moov(memoryview(file.read(end - start)))
            return
    raise BadSample("no_moov", "the mp4 has no header (moov): an interrupted recording or download")


def _boxes_of_file(file: IO[bytes], size: int) -> Iterator[tuple[bytes, int, int]]:
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = struct.unpack(">I4s", header[:8])
        skip = 8
        if length == 1 and len(header) == 16:
            length, skip = struct.unpack(">Q", header[8:])[0], 16
        if length == 0:
            length = size - position
        if length < skip:
            return
        yield kind, position + skip, position + length
        position += length


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if length < 8:
            return
        yield kind, data[position + 8 : position + length]
        position += length


def _check_moov(moov: memoryview) -> None:
    for media in (body for track in _find(moov, b"trak") for body in _find(track, b"mdia")):
        for header in _find(media, b"mdhd"):
            clock = header[20:24] if header[:1] == b"\x01" else header[12:16]
            if clock == b"\x00\x00\x00\x00":
                raise BadSample("timescale_zero", "a track's clock has no ticks per second")
        if any(handler[8:12] == b"vide" for handler in _find(media, b"hdlr")):
            for table in (body for info in _find(media, b"minf") for body in _find(info, b"stbl")):
                for description in _find(table, b"stsd"):
                    _check_sample_entries(description[8:])


def _check_sample_entries(entries: memoryview) -> None:
    for kind, body in _boxes(entries):
        if kind in (b"encv", b"drmi"):
            raise BadSample("encrypted", f"the video's sample entry is {kind.decode()}: a key is needed")
        if len(body) >= 28:
            width, height = struct.unpack(">HH", body[24:28])
            if max(width, height) > MAX_SIDE_PX:
                raise BadSample("size_limit", f"declared {width}x{height}, limit {MAX_SIDE_PX} px a side")


def _find(data: memoryview, wanted: bytes) -> Iterator[memoryview]:
    return (body for kind, body in _boxes(data) if kind == wanted)
