"""Build and pre-train the small real model: `python benchmarks/pretrain_tiny.py --output FOLDER`.

Renders synthetic clips (training seeds only), fits the linear codec on some of them, and trains the transformer as an
image-to-video model that also accepts given key frames and regions, as Wan's start/end-frame and inpainting models do.
Writes the contents of `ex4d/models/assets/tiny`, and a log with one JSON object every hundred steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import tiny
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ex4d import flow
from ex4d.models.encoders import TEXT_LENGTH, Base
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

CORPUS_SEED = 20_001  # the demo's corpus and every evaluation use other seeds
MOTIONS = ("static", "gentle", "strong", "gentle", "strong")
SHORT_TEXT = 28  # longer than any caption of the corpus


class ShortTextProcessor(WanAttnProcessor):
    """Equivalent attention for text with a single padding token, weighted by its number among the 512 tokens."""

    def __init__(self, num_image: int):
        super().__init__()
        self.num_image = num_image
        self.bias = torch.zeros(1, 1, 1, SHORT_TEXT + 1)
        self.bias[..., -1] = math.log(TEXT_LENGTH - SHORT_TEXT)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if attn.add_k_proj is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        image, text = encoder_hidden_states.split([self.num_image, SHORT_TEXT + 1], dim=1)
        split = lambda tensor: tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query = split(attn.norm_q(attn.to_q(hidden_states)))
        from_text = scaled_dot_product_attention(
            query, split(attn.norm_k(attn.to_k(text))), split(attn.to_v(text)), attn_mask=self.bias.to(query.dtype)
        )
        from_image = scaled_dot_product_attention(
            query, split(attn.norm_added_k(attn.add_k_proj(image))), split(attn.add_v_proj(image))
        )
        return attn.to_out[0]((from_text + from_image).transpose(1, 2).flatten(2))


def short_text(prompt_embeds: Tensor) -> Tensor:
    """Return [B, 29, text_dim] of padded prompt embeddings [B, 512, text_dim]: the text, and one padding token."""
    return torch.cat([prompt_embeds[:, :SHORT_TEXT], prompt_embeds[:, -1:]], dim=1)


def render_corpus(path: Path, num_clips: int, num_frames: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Return (frames uint8 [N,T,H,W,3], captions) from `path`, after rendering them if they are not there yet."""
    captions_path = path.with_suffix(".txt")
    if not captions_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        clips = np.lib.format.open_memmap(path, "w+", np.uint8, (num_clips, num_frames, size, size, 3))
        captions = []
        for index in range(num_clips):
            config = SyntheticConfig(
                num_frames=num_frames, size=(size, size), seed=CORPUS_SEED, camera_motion=MOTIONS[index % len(MOTIONS)]
            )
            scene, cameras = clip_scene(config, index)
            clips[index] = render_clip(scene, cameras, config.fps)[0]
            captions.append(scene.caption)
        clips.flush()
        captions_path.write_text("\n".join(captions), encoding="utf-8")
    return np.load(path, mmap_mode="r"), captions_path.read_text(encoding="utf-8").split("\n")


def draw_pixels(clips: np.ndarray, index: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """Return (pixels [B,3,T,H,W], bool [B]: colours were swapped), mirrored, reversed and recoloured at random."""
    batch, swapped = [], rng.random(len(index)) < 0.5
    for number, swap in zip(index, swapped, strict=True):
        clip = clips[number]
        clip = clip[:, :, ::-1] if rng.random() < 0.5 else clip
        clip = clip[::-1] if rng.random() < 0.5 else clip
        batch.append(clip[..., rng.permutation(3)] if swap else clip)
    return torch.from_numpy(np.stack(batch)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1, swapped


def draw_given(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Return the given cells, float [B,1,f,h,w] of 0 and 1: the first frame, perhaps also key frames or regions."""
    batch, _, frames, height, width = shape
    given = np.zeros((batch, frames, height, width), dtype=np.float32)
    for one in given:
        task = rng.random()
        if 0.35 < task < 0.55:
            one[rng.random(frames) < 0.5] = 1
        elif task >= 0.55:
            keep = rng.random() < 0.5
            one[:] = 0 if keep else 1
            for _ in range(int(rng.integers(1, 6))):
                rows, columns = (np.sort(rng.integers(0, side + 1, 2)) for side in (height, width))
                start = int(rng.integers(0, frames))
                one[start:, rows[0] : rows[1], columns[0] : columns[1]] = keep
    given[:, 0] = 1
    return torch.from_numpy(given).unsqueeze(1)


def make_batch(base: Base, pixels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (latents [B,z,f,h,w], first-frame channels [B,4+z,f,h,w], image features) of pixels."""
    latents = base.encode_video(pixels)
    given = draw_given(tuple(latents.shape), rng)
    frames = torch.cat([given[:, :, :1], given[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)
    side = base.stride[1]
    dense = frames.repeat_interleave(side, dim=3).repeat_interleave(side, dim=4)
    condition = torch.cat([given.expand(-1, 4, -1, -1, -1), base.encode_video(pixels * dense)], dim=1)
    return latents, condition, base.encode_image(pixels[:, :, 0])


def train(base: Base, clips: np.ndarray, captions: list[str], args: argparse.Namespace) -> None:
    """Train base.transformer in place for a time or a number of steps; it ends with the moving average of weights."""
    model = base.transformer.train().requires_grad_(True)
    num_image = base.encode_image(torch.zeros(1, 3, 96, 96)).shape[1]
    for block in model.blocks:
        block.attn2.set_processor(ShortTextProcessor(num_image))
    unique = sorted({*captions, ""})
    texts = dict(zip(unique, torch.cat([short_text(base.encode_text([text])) for text in unique]), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    start, step, losses = time.monotonic(), 0, []
    with open(args.log, "w", encoding="utf-8") as log:
        while (progress := max((time.monotonic() - start) / (60 * args.minutes), step / args.num_steps)) < 1:
            rate = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
            index = rng.integers(0, len(clips), args.batch_size)
            pixels, swapped = draw_pixels(clips, index, rng)
            latents, condition, image = make_batch(base, pixels, rng)
            silent = swapped | (rng.random(len(index)) < 0.2)
            text = torch.stack([texts["" if quiet else captions[i]] for i, quiet in zip(index, silent, strict=True)])
            sigma = flow.shift_sigmas(torch.rand(len(index), generator=generator), tiny.SHIFT)
            noise = torch.randn(latents.shape, generator=generator)
            noisy = torch.cat([flow.add_noise(latents, noise, sigma), condition], dim=1)
            predicted = model(noisy, sigma * 1000, text, image, return_dict=False)[0]
            loss = (predicted - (noise - latents)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in model.named_parameters():
                    average[name].lerp_(value, 1 - decay)
            losses.append(loss.item())
            if step % 100 == 0:
                elapsed = round(time.monotonic() - start, 1)
                log.write(json.dumps({"step": step, "loss": float(np.mean(losses[-100:])), "seconds": elapsed}) + "\n")
                log.flush()
            if args.save_every and step % args.save_every == 0:
                torch.save(average, Path(args.log).with_suffix(".pt"))
    model.load_state_dict(average, strict=False)
    for block in model.blocks:
        block.attn2.set_processor(WanAttnProcessor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--cache", type=Path, required=True, help="file NAME.npy that keeps the rendered clips")
    parser.add_argument("--log", type=Path, required=True, help="file for the losses, one JSON object a line")
    parser.add_argument("--init", type=Path, help="go on from this folder: its codec and its transformer")
    parser.add_argument("--num-clips", type=int, default=4000)
    parser.add_argument("--num-steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=38.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="also keep the moving average, every so many steps")
    args = parser.parse_args()
    from ex4d.models.backbone import load_base

    clips, captions = render_corpus(args.cache, args.num_clips, num_frames=9, size=96)
    if args.init is None:
        codec = tiny.fit_codec(np.asarray(clips[:300]))
        transformer = tiny.new_transformer(codec.config.z_dim, seed=args.seed)
    else:
        before = load_base(str(args.init), dtype="float32")
        codec, transformer = before.vae, before.transformer
    tiny.build_tiny(args.output, codec, transformer, seed=args.seed, half=False)
    base = load_base(str(args.output), dtype="float32")
    train(base, clips, captions, args)
    tiny.build_tiny(args.output, codec, base.transformer, seed=args.seed)


if __name__ == "__main__":
    main()
