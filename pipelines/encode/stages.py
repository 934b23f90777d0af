"""Encode finished samples and texts with the frozen base model, which stays loaded between rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import storage
from ex4d.errors import BadSample, ContractError
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from ex4d.models.backbone import ModelConfig
    from ex4d.models.encoders import Base

VIDEO_MODELS, TEXT_MODELS = ("vae", "image_encoder"), ("text_encoder",)


@dataclass(frozen=True)
class Encoding:
    """The settings that all rows are encoded with.

    Args:
        data, output: the dataset to read and the dataset to write.
        model: the base and its dtypes.
        dtype: dtype of the stored tensors.
        device: cuda or cpu.
        mask_kinds: names of mask kinds in the input dataset.
        trust: see EncodeConfig.
    """

    data: str
    output: str
    model: ModelConfig
    dtype: str
    device: str
    mask_kinds: tuple[str, ...]
    trust: str = "auto"


@lru_cache(maxsize=1)
def _dataset(folder: str) -> dict[str, Any]:
    from ex4d.data import manifest

    return manifest.read_dataset(folder)


@lru_cache(maxsize=1)
def loaded(model: ModelConfig, device: str, components: tuple[str, ...]) -> Base:
    """Load the base with these components; this process caches it until other components are requested."""
    import torch

    from ex4d.models.backbone import load_base

    if device == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads, but the output bytes must not
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return load_base(model.base, model.revision, model.dtype, device, components, model.vae_dtype)


def read_sample(row: Row, context: Encoding) -> dict[str, Any]:
    """Return the sample's frames and masks, and the text members that are copied unchanged.

    `first_shown` uint8 [U,H,W,3]: distinct first frames under the masks. `first_index` uint8 [S]: index into it per
    mask.

    Raises:
        BadSample: damaged_sample: its bytes differ from the manifest, or are not a valid sample.
    """
    import hashlib

    from ex4d.data import decoding, foreign, sample
    from ex4d.data.members import pack_bits
    from ex4d.data.tar import read_sample as members_of

    blob = storage.read_bytes(storage.join(context.data, row["shard"]), row["offset"], row["length"])
    try:
        if hashlib.sha256(blob).hexdigest() != row["sha256"]:
            raise ContractError("sha256 is not the one in the manifest")
        members = members_of(blob, row["key"])
        clip = foreign.sample_of(_dataset(context.data), members, foreign.is_foreign(context.data, context.trust))
    except ContractError as error:
        raise BadSample("damaged_sample", f"{row['shard']}: {error}; `ex4d verify` names the member") from None
    is_visibility = np.array([context.mask_kinds[kind] == sample.VISIBILITY for kind in clip.kind])
    firsts: dict[bytes, int] = {}
    first_index = []
    for index, visible in enumerate(clip.visible):
        colours = decoding.shown(clip.frames, clip.cond, is_visibility, index)
        pixels = (colours[0] * visible[0, ..., None]).tobytes()
        first_index.append(firsts.setdefault(pixels, len(firsts)))
    size = clip.frames.shape[1:]
    return {
        "frames": clip.frames,
        "packed": pack_bits(clip.visible),
        "cond": clip.cond,
        "source_frames": clip.source,
        "is_visibility": is_visibility,
        "kind": clip.kind,
        "first_shown": np.stack([np.frombuffer(first, np.uint8).reshape(size) for first in firsts]),
        "first_index": np.array(first_index, np.uint8),
        "kept": {name: members[name].decode("utf-8") for name in ("camera.json", "json", "txt")},
    }


def load_models(components: tuple[str, ...], row: Row, context: Encoding) -> dict[str, Any]:
    """Load models, once per process; a stage of its own, so that the time is not attributed to a clip or text."""
    loaded(context.model, context.device, components)
    return {}


def encode_video(row: Row, context: Encoding) -> dict[str, Any]:
    """Return `target`, `condition`, `hole`, `first_frame` and `source`, float32, as described in data.latents.

    Raises:
        ConfigError: the base cannot take clips of this size or length.
        BadSample: not_finite.
    """
    import torch

    from ex4d.data.decoding import shown
    from ex4d.data.members import unpack_bits
    from ex4d.models.encoders import holes_in_latents, to_pixels

    base = loaded(context.model, context.device, VIDEO_MODELS)
    frames, width = row["frames"], row["frames"].shape[2]
    target = base.encode_video(_pixels(frames, base))
    condition, hole = [], []
    for index, packed in enumerate(row["packed"]):
        visible = unpack_bits(packed, width)
        colours = shown(frames, row["cond"], row["is_visibility"], index) * visible[..., None]
        mask = torch.from_numpy(visible)[None].to(base.device)
        condition.append(base.encode_condition(_pixels(colours, base), mask, context.model.mask_range))
        hole.append(holes_in_latents(mask, (target.shape[2], target.shape[3], target.shape[4])))
    written = {"target": target[0], "condition": torch.cat(condition), "hole": torch.cat(hole)}
    if base.has_first_frame:
        firsts = to_pixels(torch.from_numpy(row["first_shown"])[:, None].to(base.device))[:, :, 0]
        whole: list[Any] = [base.first_frame_condition(first[None], len(frames)) for first in firsts]
        written["first_frame"] = torch.cat(whole)[:, base.first_frame_channels :]  # the loader recomputes the mask
    if row["source_frames"] is not None:
        written["source"] = base.encode_video(_pixels(row["source_frames"], base))[0]
    arrays = {name: value.float().cpu().numpy() for name, value in written.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise BadSample("not_finite", "the base returned values that are not finite")
    return {"first_frame": None, "source": None, **arrays}


def encode_image(row: Row, context: Encoding) -> dict[str, Any]:
    """Return `image` float32 [U,n,d], features of each first frame; None if the base has no image encoder."""
    import torch

    from ex4d.models.encoders import to_pixels

    base = loaded(context.model, context.device, VIDEO_MODELS)
    if base.image_encoder is None:
        return {"image": None}
    firsts = to_pixels(torch.from_numpy(row["first_shown"])[:, None].to(base.device))[:, :, 0]
    features: list[Any] = [base.encode_image(first[None]) for first in firsts]
    return {"image": torch.cat(features).cpu().numpy()}


def write_latents(row: Row, context: Encoding) -> dict[str, Any]:
    """Write the finished latent sample to staging atomically."""
    from ex4d.data import latents
    from ex4d.data.tar import sample_tar

    names = ("target", "condition", "hole", "kind", "first_index", "first_frame", "source", "image")
    tensors = {name: row[name] for name in names if row[name] is not None}
    pixel_members = {name: text.encode("utf-8") for name, text in row["kept"].items()}
    members = latents.encode(tensors, pixel_members, row["fingerprint"], context.dtype)
    Ledger(context.output).write_sample(row["artifact"], sample_tar(row["key"], members))
    return {}


def encode_text(row: Row, context: Encoding) -> dict[str, Any]:
    """Return `text`, read from the dataset unless the row holds it, and `embeds` float32 [n, d].

    Raises:
        ContractError: the text in the dataset differs from its sha256 in the manifest.
    """
    from ex4d.data.texts import text_key, trimmed

    text = row["text"]
    if text is None:
        place = row["place"]
        data = storage.read_bytes(storage.join(context.data, place["shard"]), place["offset"], place["length"])
        text = data.decode("utf-8", "replace")
    if text_key(text) != row["key"]:
        raise ContractError(f"{context.data}: the caption {row['key']} is damaged; `ex4d verify` names the sample")
    base = loaded(context.model, context.device, TEXT_MODELS)
    return {"text": text, "embeds": trimmed(base.encode_text([text])[0].cpu().numpy())}


def write_text(row: Row, context: Encoding) -> dict[str, Any]:
    """Write the embeddings to staging atomically."""
    from ex4d.data.tensors import encode_tensors, store_as

    written = np.frombuffer(row["text"].encode("utf-8"), np.uint8)
    tensors = store_as(context.dtype, {"embeds": row["embeds"], "text": written})
    Ledger(context.output).write_sample(row["artifact"], encode_tensors(tensors))
    return {}


def _pixels(frames: np.ndarray, base: Base) -> Any:
    import torch

    from ex4d.models.encoders import to_pixels

    return to_pixels(torch.from_numpy(frames)[None].to(base.device))


READ = Stage(
    "read_sample",
    read_sample,
    reads=("key", "shard", "offset", "length", "sha256"),
    writes=("frames", "packed", "cond", "source_frames", "is_visibility", "kind", "first_shown", "first_index", "kept"),
)
LOAD_MODELS = Stage("load_models", partial(load_models, VIDEO_MODELS), reads=(), writes=())
LOAD_TEXT_MODEL = Stage("load_text_model", partial(load_models, TEXT_MODELS), reads=(), writes=())
ENCODE_VIDEO = Stage(
    "encode_video",
    encode_video,
    reads=("frames", "packed", "cond", "source_frames", "is_visibility", "first_shown"),
    writes=("target", "condition", "hole", "first_frame", "source"),
)
ENCODE_IMAGE = Stage("encode_image", encode_image, reads=("first_shown",), writes=("image",))
WRITE_LATENTS = Stage(
    "write_latents",
    write_latents,
    reads=(
        *("target", "condition", "hole", "kind", "first_index", "first_frame", "source", "image"),
        *("key", "kept", "fingerprint", "artifact"),
    ),
    writes=(),
)
ENCODE_TEXT = Stage("encode_text", encode_text, reads=("key", "text", "place"), writes=("text", "embeds"))
WRITE_TEXT = Stage("write_text", write_text, reads=("text", "embeds", "artifact"), writes=())


def with_gpu(stages: tuple[Stage, ...], num_gpus: float) -> tuple[Stage, ...]:
    """Return the stages; from the first that loads a model on, all share one GPU actor: frames are sent only once."""
    first = next(index for index, stage in enumerate(stages) if stage in (LOAD_MODELS, LOAD_TEXT_MODEL))
    return (*stages[:first], *(replace(stage, num_gpus=num_gpus) for stage in stages[first:]))
