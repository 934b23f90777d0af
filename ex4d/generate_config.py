"""The settings of sampling (section `generate`, and flags of `ex4d generate`). Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ex4d.config import checked, setting

if TYPE_CHECKING:
    from ex4d.models.weights import AdapterMetadata


@dataclass(frozen=True)
class GenerateConfig:
    """How a video is sampled."""

    num_inference_steps: int = setting(25, "Sampling steps; the published code uses 25.", ge=1)
    guidance_scale: float = setting(
        5.0, "Classifier-free guidance, as in the published code; 1: off, which halves the time."
    )
    shift: float | None = setting(None, "Shift of the noise schedule; null: what the adapter was trained with.", gt=0)
    erosion_px: int = setting(
        5, "Erode the visible region by a square of this side, px at 512; training uses 2 to 8.", ge=0
    )
    prompt: str | None = setting(
        None, "Text that describes the video; null: the one text that the adapter was trained or released with."
    )
    negative_prompt: str | None = setting(
        None,
        "Text that describes what to avoid, where guidance_scale is above 1; null: the one that the adapter was "
        "released with.",
    )
    quantize: Literal["int8", "fp8", "nf4"] | None = setting(
        None, "Store the base's blocks in 1 byte (int8, fp8) or half a byte (nf4) per weight, for small GPUs."
    )
    block_swap: int = setting(0, "Keep N blocks in CPU memory and copy each to the GPU when it runs.", ge=0)
    lora: tuple[str, ...] = setting(
        (),
        "Additional LoRA files for the base, FILE or FILE:SCALE, e.g. one distilled to few steps; high:FILE or "
        "low:FILE for one of two experts.",
    )
    window_frames: int | None = setting(
        None, "Sample a long video in overlapping windows of this many frames (4k+1); null: all frames at once.", ge=5
    )
    window_overlap: int = setting(16, "Frames that two windows share, a multiple of 4.", ge=4)
    vae_tiling: bool = setting(
        False,
        "Encode and decode in overlapping tiles of 256 px: less memory for large videos, slightly different pixels.",
    )
    offload: bool = setting(False, "Keep on the GPU only the network that is running (base, encoder or VAE); slower.")

    def __post_init__(self) -> None:
        need = checked(self, "generate")
        need(self.window_overlap % 4 == 0, "window_overlap", "must be a multiple of 4")
        if self.window_frames is not None:
            need(self.window_frames % 4 == 1, "window_frames", "must be 4k + 1, e.g. 49")
            allowed = "must be less than generate.window_frames - 1: a window also holds the first frame"
            need(self.window_overlap < self.window_frames - 1, "window_overlap", allowed)

    def for_adapter(self, metadata: AdapterMetadata) -> GenerateConfig:
        """Return these settings, with the adapter's values for those that are null."""
        names = ("shift", "prompt", "negative_prompt")
        return replace(self, **{name: getattr(metadata, name) for name in names if getattr(self, name) is None})
