"""Encode and decode the members of a sample: JSON, masks as packed bits in an npz, video, depth as video."""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ex4d import npy, video
from ex4d.errors import BadSample, ContractError

_UNREADABLE = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
MAX_CAPTION_BYTES = 2**18  # 64 Ki characters
DEPTH_STEPS = 65535  # of the stored disparity
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def caption_of(members: Mapping[str, bytes]) -> str:
    """Return the caption of a sample. Raises ContractError if it is too long for any that `ex4d preprocess` writes."""
    if len(members["txt"]) > MAX_CAPTION_BYTES:
        raise ContractError(f"txt: has more than {MAX_CAPTION_BYTES} bytes")
    return members["txt"].decode("utf-8", "replace")


def hole_share(visible: np.ndarray) -> np.ndarray:
    """Return float32 [S,T], the share of False in bool [S,T,H,W]."""
    num_visible = np.count_nonzero(visible, axis=(2, 3))
    return (1.0 - num_visible / (visible.shape[2] * visible.shape[3])).astype(np.float32)


def pack_bits(visible: np.ndarray) -> np.ndarray:
    """Pack bool [..., W] into uint8 [..., ceil(W/8)]: the first pixel in the highest bit, zeros after the last."""
    return np.packbits(visible, axis=-1, bitorder="big")


def unpack_bits(packed: np.ndarray, width: int) -> np.ndarray:
    """Unpack uint8 [..., ceil(W/8)] into bool [..., W]; inverse of `pack_bits`."""
    return np.unpackbits(packed, axis=-1, count=width, bitorder="big").view(bool)


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Return the mapping as UTF-8 JSON with sorted keys; NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def decode_json(data: bytes, name: str) -> dict[str, Any]:
    """Return the mapping in a JSON member. Raises ContractError, which names the member, if it is not a mapping."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ContractError(f"{name}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ContractError(f"{name}: is not a mapping")
    return value


def plain(value: Any, where: str) -> Any:
    """Convert to JSON-serialisable Python values: numpy numbers become int or float, tuples lists.

    Raises:
        ContractError: null, NaN, infinity, an int over 64 bits, or a type that JSON does not have.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(child, f"{where}.{name}") for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child, where) for child in value]
    raise ContractError(f"{where}: {value!r} ({type(value).__name__}) cannot be stored in a JSON member")


def type_tree(value: Any) -> Any:
    """Return the keys and types of a value without its contents; equal for all samples of a dataset."""
    if isinstance(value, dict):
        return {name: type_tree(child) for name, child in sorted(value.items())}
    if isinstance(value, list):
        return [type_tree(value[0])] if value else []
    return type(value).__name__


MAX_MASKS = 64  # of a sample
_NAMES = ("visible_packed", "kind", "hole_share")


def decode_masks(
    data: bytes, size: tuple[int, int, int], num_masks: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (visible_packed uint8 [S,T,H,ceil(W/8)], kind uint8 [S], hole_share float32 [S,T]) of `masks.npz`.

    No array is allocated before its header was checked: a few megabytes may unpack to many gigabytes.

    Args:
        size: (T, H, W) of the clip.
        num_masks: S; None: up to MAX_MASKS.

    Raises:
        ContractError: unexpected names, types or shapes, a pickled array, or damaged bytes.
    """
    num_frames, height, width = size
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in _NAMES):
                raise ValueError(f"arrays {archive.namelist()[:9]}, wanted {_NAMES}")
            with archive.open("kind.npy") as member:
                shape = npy.header(member).shape
            count = shape[0] if len(shape) == 1 else 0
            if not 1 <= count <= MAX_MASKS or num_masks not in (None, count):
                raise ValueError(f"kind has the shape {shape}; wanted {num_masks or f'1 to {MAX_MASKS}'} masks")
            kind = _array(archive, "kind", np.dtype(np.uint8), (count,))
            share = _array(archive, "hole_share", np.dtype(np.float32), (count, num_frames))
            packed_shape = (count, num_frames, height, -(-width // 8))
            packed = _array(archive, "visible_packed", np.dtype(np.uint8), packed_shape)
    # zipfile raises NotImplementedError for an unknown compression, and RuntimeError for an encrypted member.
    except (*_UNREADABLE, NotImplementedError, RuntimeError) as error:
        raise ContractError(f"masks.npz: cannot be read ({error})") from error
    if width % 8 and (packed[..., -1] & (0xFF >> width % 8)).any():
        raise ContractError(f"masks.npz: bits beyond width {width} are set")
    return packed, kind, share


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        header = npy.header(member)
        if (header.shape, header.dtype) != (shape, dtype) or (header.by_columns and len(shape) > 1):
            raise ValueError(f"{name} is {header}, not {dtype} {[*shape]} in rows")
        array = npy.numbers(member, header)
        if member.read(1):
            raise ValueError(f"{name} has more bytes than its shape says")
    return array


def encode_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the arrays as a compressed npz file; equal arrays give equal bytes, on any date and system."""
    # np.savez leaves date and attributes to zipfile's defaults; here they are fixed, to keep the bytes reproducible.
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_DATE)
            info.create_system, info.external_attr, info.compress_type = 3, 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, buffer.getvalue(), compresslevel=6)
    return out.getvalue()


def encode_depth(z_depth: np.ndarray, fps: float) -> tuple[float, bytes]:
    """Encode z_depth [T,H,W]; return (`disparity_max` for `json`, bytes of `depth.mkv`)."""
    disparity = 1.0 / z_depth.astype(np.float64)
    most = float(disparity.max())
    return most, video.encode(np.rint(disparity / most * DEPTH_STEPS).astype(np.uint16), fps, lossless=True)


def decode_depth(data: bytes, disparity_max: object, limit: tuple[int, int, int] | None = None) -> np.ndarray:
    """Decode `depth.mkv` to z_depth, float32 [T,H,W]; pixels too far for 16 bits get a disparity of half a step.

    Raises:
        ContractError: the video does not decode, or `disparity_max` is not a positive number.
    """
    if not isinstance(disparity_max, float) or not 0 < disparity_max < math.inf:
        raise ContractError(f"json: disparity_max {disparity_max!r}")
    stored = decode_frames(data, "depth.mkv", limit=limit)
    if stored.dtype != np.uint16:
        raise ContractError(f"depth.mkv: is {stored.dtype}, not 16-bit grey")
    return (DEPTH_STEPS / (np.maximum(stored, 0.5) * disparity_max)).astype(np.float32)


def require_members(members: Mapping[str, bytes], wanted: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raise ContractError, which names them, if members are missing or unknown."""
    missing, unknown = set(wanted) - set(members), set(members) - set(wanted) - set(optional)
    if missing or unknown:
        raise ContractError(f"members missing {sorted(missing)}, not known {sorted(unknown)}")


def decode_frames(
    data: bytes, member: str = "mp4", into: np.ndarray | None = None, limit: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Decode a video member to uint8 [T,H,W,3] RGB. Raises ContractError, which names the member, if it cannot.

    Args:
        into: an array of that shape to decode into, which is then returned.
        limit: maximum number of frames, H and W.
    """
    try:
        return video.read(data, into, limit)[0]
    except BadSample as error:
        raise ContractError(f"{member}: {error}") from error
