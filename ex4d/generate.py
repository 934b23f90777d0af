"""Generate a novel view from a video, a trajectory and an adapter: all of inference in one file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ex4d import depth, flow, storage, video
from ex4d.generate_config import GenerateConfig
from ex4d.generate_load import device_of, load, lora_files
from ex4d.geometry import masks
from ex4d.geometry.render import nvdiffrast
from ex4d.models import backbone, encoders, experts, provenance, weights, windows
from ex4d.models.adapter import Ex4dModel
from ex4d.reconstruct import Reconstruction, along, read
from ex4d.reconstruct_config import ReconstructConfig
from ex4d.reconstruct_files import sounding, white

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NovelView:
    """A generated video, the reconstruction it started from, and a record from which to repeat it."""

    reconstruction: Reconstruction
    frames: np.ndarray
    record: dict

    def write(self, output: str | Path) -> list[Path]:
        """Write the video and, beside it, its condition, mask and record; return the paths."""
        output = Path(output)
        source = self.reconstruction
        paths = [output] + [output.with_name(f"{output.stem}{end}") for end in (".cond.mp4", ".mask.mp4", ".json")]
        storage.write_bytes(paths[0], sounding(source, self.frames))
        video.write(paths[1], source.cond_video, source.fps)
        video.write(paths[2], white(source.visible), source.fps)
        paths[3].write_text(json.dumps(self.record, indent=2, default=str) + "\n", encoding="utf-8")
        return paths


def to_pixels(frames: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """Convert frames uint8 [T, H, W, 3] to pixels float32 [1, 3, T, H, W] in [-1, 1]."""
    return encoders.to_pixels(torch.from_numpy(np.ascontiguousarray(frames))[None].to(device))


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """Convert pixels [1, 3, T, H, W] in [-1, 1] to frames uint8 [T, H, W, 3], rounded, not truncated."""
    array = ((pixels[0].float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return array.permute(1, 2, 3, 0).cpu().numpy()


@torch.inference_mode()
def generate(
    base: backbone.Base,
    model: Ex4dModel | experts.Experts,
    cond_video: np.ndarray,
    visible: np.ndarray,
    config: GenerateConfig,
    seed: int,
    mask_range: Literal["unit", "released"] = "unit",
    first_frame: np.ndarray | None = None,
    source: np.ndarray | None = None,
    on_step: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Generate a video, uint8 [T, H, W, 3], from its condition and mask.

    Args:
        cond_video: uint8 [T, H, W, 3], zero where not visible; in training its frame 0 is the clean first frame.
        visible: bool [T, H, W]; eroded here by config.erosion_px, except frame 0.
        seed: of the initial noise; the same seed, steps and weights give the same video.
        mask_range: as the adapter was trained with; see ModelConfig.
        first_frame: uint8 [H, W, 3], the base model's first-frame condition; default: frame 0 of cond_video.
        source: uint8 [T, H, W, 3], the video itself, for an adapter that was trained with it (`source_video`).
        on_step: called with the number of steps done.
    """
    visible = masks.erode(visible, config.erosion_px)
    cond_video = cond_video * visible[..., None]
    pixels = to_pixels(cond_video, base.device)
    start = to_pixels(first_frame[None], base.device)[:, :, 0] if first_frame is not None else pixels[:, :, 0]
    image_condition = base.first_frame_condition(start, num_frames=len(cond_video))
    cond_latents = base.encode_condition(pixels, torch.from_numpy(visible).to(base.device)[None], mask_range)
    image_embeds = base.encode_image(start)
    source_latents = None if source is None else base.encode_video(to_pixels(source, base.device)).float()
    conditions = (image_condition, cond_latents, source_latents)
    noise = torch.randn(base.latent_shape(cond_video.shape), generator=flow.generator_for(seed, "generate"))
    # With equal prompts both passes predict the same, so the scale has no effect.
    texts = [config.prompt or "", config.negative_prompt or ""]
    guided = config.guidance_scale != 1.0 and texts[0] != texts[1]
    if config.guidance_scale != 1.0 and not guided:
        log.warning("prompt and negative_prompt are equal: guidance_scale=%g has no effect", config.guidance_scale)
    positive = _velocity(base, model, config, texts[0], image_embeds, conditions)
    negative = _velocity(base, model, config, texts[1], image_embeds, conditions) if guided else None
    base.bring("transformer")
    latents = flow.sample(
        positive,
        noise.to(base.device),
        flow.sigmas(config.num_inference_steps, config.shift or flow.DEFAULT_SHIFT),
        guidance_scale=config.guidance_scale if guided else 1.0,
        negative_velocity_fn=negative,
        on_step=on_step,
    )
    return to_frames(base.decode_latents(latents))


def _velocity(
    base: backbone.Base,
    model: Ex4dModel | experts.Experts,
    config: GenerateConfig,
    prompt: str,
    image_embeds: torch.Tensor | None,
    conditions: Sequence[torch.Tensor | None],
) -> flow.VelocityFn:
    """Return the model's velocity function for a prompt; a window takes its part of `conditions` [B, C, F, h, w]."""
    prompt_embeds = base.encode_text([prompt])

    def velocity(latents: torch.Tensor, timestep: torch.Tensor, part: torch.Tensor | None = None) -> torch.Tensor:
        parts = [x if x is None or part is None else x[:, :, part] for x in conditions]
        return model(latents, timestep, prompt_embeds, image_embeds, *parts)

    if config.window_frames is None:
        return velocity
    stride = base.stride[0]
    return windows.joined(velocity, (config.window_frames - 1) // stride + 1, config.window_overlap // stride)


def _view_config(metadata: weights.AdapterMetadata, device: str, view: Mapping[str, Any]) -> ReconstructConfig:
    """Return the settings of a view; those that `view` does not set are the adapter's."""
    own = {
        "size": metadata.size,
        "num_frames": metadata.num_frames,
        "profile": "released" if metadata.mask_range == "released" else "default",
    }
    return ReconstructConfig(**{**own, **{name: x for name, x in view.items() if x is not None}}, device=device)


def novel_view(video_path: str | Path, adapter_path: str | Path, **choices: Any) -> NovelView:
    """Generate a video along one camera path; `choices` are the keyword arguments of `novel_views`."""
    return next(novel_views(video_path, adapter_path, **choices))


def novel_views(
    video_path: str | Path,
    adapter_path: str | Path,
    paths: Sequence[Mapping[str, Any]] = ({},),
    *,
    base: str | None = None,
    config: GenerateConfig = GenerateConfig(),
    device: str | None = None,
    on_step: Callable[[int], None] | None = None,
    **view: Any,
) -> Iterator[NovelView]:
    """Generate a video along each camera path; depth is estimated once, and the model is loaded once, after all warps.

    Args:
        paths: for each path, the settings of ReconstructConfig that differ from `view`: `trajectory`, `angle_deg`,
            `trajectory_options`.
        view: settings of ReconstructConfig; `size`, `num_frames` and `profile` default to those used in training.
            num_frames is 4k+1, the sides are multiples of the latent patch.
    """
    metadata = experts.common(experts.read(adapter_path))
    # All checks, and depth, come before gigabytes of weights are loaded.
    configs = [_view_config(metadata, device_of(device), {**view, **path}) for path in paths]
    view_config = configs[0]
    which = provenance.base_of(adapter_path, metadata, base)
    lora_files(config, experts.boundary(*which) is not None)
    config = config.for_adapter(metadata)
    stride = backbone.clip_stride(*which)
    encoders.check_clip((view_config.num_frames or 0, *(view_config.size or metadata.size), 3), stride)
    clip = read(video_path, view_config)
    sources = [along(clip, path, str(video_path)) for path in configs]
    nvdiffrast.release()
    depth.release()
    loaded, model = load(adapter_path, base, view_config.device, config)
    for source in sources:
        if not source.starts_at_source:
            log.warning("the path does not start at the source camera, so the base starts from a frame with holes")
        frames = generate(
            loaded,
            model,
            source.cond_video,
            source.visible,
            config,
            view_config.seed,
            metadata.mask_range,
            first_frame=source.frames[0] if source.starts_at_source else None,
            source=source.frames if metadata.source_video else None,
            on_step=on_step,
        )
        record = {"video": Path(video_path).name, **_record(source), "base": base or metadata.base, **asdict(config)}
        yield NovelView(source, frames, record)


def _record(source: Reconstruction) -> dict[str, Any]:
    """Return the facts from which a reconstruction can be repeated, JSON-serialisable."""
    return {
        **source.choices,
        "depth": source.provenance,
        "K": source.view_K.tolist(),
        "w2c": source.w2c.tolist(),
        "source_w2c": None if source.source_w2c is None else source.source_w2c.tolist(),
        "axes": "opencv",
        "visible_share": float(source.visible.mean()),
    }
