"""Record the released network's outputs, and compare both directions: `python record_released.py CHECKOUT [--write]`.

CHECKOUT is a clone of tau-yihouxiang/EX-4D. Nothing of it is kept but three arrays of outputs (see test_parity.py).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import released_numbers as numbers
import torch
from torch import Tensor

from ex4d.models import weights

OUTPUT = Path(__file__).parent / "data" / "released_outputs.npz"


def load_module(checkout: Path, name: str) -> Any:
    """Load one of the released modules without importing its package."""
    if "released" not in sys.modules:
        sys.modules["released"] = package = types.ModuleType("released")
        package.__path__ = []
        sys.modules["released.utils"] = utils = types.ModuleType("released.utils")
        utils.hash_state_dict_keys = lambda state: ""  # type: ignore[attr-defined]
    path = checkout / "diffsynth" / "models" / f"{name}.py"
    module = types.ModuleType(f"released.{name}")
    module.__package__ = "released"
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def plain_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any) -> Tensor:
    """Attention in the inputs' dtype for q, k, v [B, L, heads, C], where the released kernel wants CUDA."""
    if k_lens is not None and int(k_lens.min()) != k.shape[1]:
        raise ValueError("padded keys are not covered")
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


class Released:
    """The released network and camera encoder with LoRA added as its generate.py does."""

    def __init__(self, checkout: Path):
        dit, camera = load_module(checkout, "wan_video_dit"), load_module(checkout, "camera")
        dit.flash_attention = plain_attention
        shape = numbers.CONFIG
        self.network = dit.WanModel(
            model_type="i2v",
            in_dim=shape["in_channels"],
            dim=numbers.WIDTH,
            ffn_dim=shape["ffn_dim"],
            freq_dim=shape["freq_dim"],
            text_dim=shape["text_dim"],
            out_dim=shape["out_channels"],
            num_heads=shape["num_attention_heads"],
            num_layers=shape["num_layers"],
            cross_attn_norm=True,
        ).eval()
        shapes = {name: tuple(value.shape) for name, value in self.network.named_parameters()}
        self.network.load_state_dict(numbers.base_weights(shapes), strict=True)
        self.encoder = camera.CamVidEncoder(shape["out_channels"], numbers.HIDDEN, numbers.WIDTH)

    def load(self, checkpoint: dict[str, Tensor]) -> None:
        missing, unexpected = self.network.load_state_dict(checkpoint, strict=False)
        if len(unexpected) != 8 or any("lora" in name for name in missing):
            raise ValueError(f"the network did not take the checkpoint: {unexpected}, {missing}")
        if self.encoder.load_state_dict(checkpoint, strict=False).missing_keys:
            raise ValueError("the encoder did not take the checkpoint")

    def add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=numbers.RANK, lora_alpha=numbers.RANK, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"]
        )
        inject_adapter_in_model(config, self.network)

    def residual(self, x: dict[str, Tensor]) -> Tensor:
        return self.encoder.latent_patch_embedding(self.encoder.latent_encoder(x["cond_latents"]))

    def run(self, x: dict[str, Tensor], residual: Tensor | None = None) -> Tensor:
        return self.network(
            x["noisy_latents"],
            timestep=x["timestep"],
            context=list(x["prompt_embeds"]),
            seq_len=x["noisy_latents"][0, 0].numel() // 4,
            clip_fea=x["image_embeds"],
            y=x["first_frame"],
            **({} if residual is None else {"ray_latent": residual}),
        )


def released_vae(checkout: Path) -> Any:
    """Return (network, scale) of the released VAE at our size, with the weights of `released_numbers`."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    module = load_module(checkout, "wan_video_vae")
    network = module.VideoVAE_(dim=numbers.VAE_DIM, z_dim=16).eval()
    # The converter maps names one to one: learn ours by sending the released names through it.
    ours = convert_wan_vae_to_diffusers({name: name for name in network.state_dict()})
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    network.load_state_dict({theirs: numbers.vae_weight(name, shapes[theirs]) for name, theirs in ours.items()})
    full_size = module.WanVideoVAE()
    return network, full_size.scale


def record_vae(checkout: Path) -> dict[str, Tensor]:
    """Return latents of the colour, of the mask as the release feeds it, of the first frame, and pixels decoded."""
    network, scale = released_vae(checkout)
    pixels, visible = numbers.clip()
    mask = visible.float().unsqueeze(1).expand(-1, 3, -1, -1, -1) * 2 - 1  # generate.py
    first = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
    colour = network.encode(pixels, scale)
    return {
        "vae_colour": colour,
        "vae_mask": network.encode(mask * 2 - 1, scale),  # camera.py
        "vae_first": network.encode(first, scale),
        "vae_decoded": network.decode(colour, scale)[:, :, ::4, ::4, ::4].clamp(-1, 1),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT.name}")
    args = parser.parse_args()
    x, ours, theirs = numbers.inputs(), numbers.our_model(), Released(args.checkout)
    recorded = {"base": theirs.run(x)}
    without = ours(**(x | {"cond_latents": None}))
    print(f"base:     {float((without - recorded['base']).abs().max()):.2e}")
    theirs.add_lora()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ex4d.ckpt"
        torch.save(numbers.released_checkpoint(), path)
        theirs.load(torch.load(path, weights_only=True))
        weights.load_adapter(path, ours)
        recorded["residual"] = theirs.residual(x)
        recorded["adapted"] = theirs.run(x, recorded["residual"])
        print(f"adapted:  {float((ours(**x) - recorded['adapted']).abs().max()):.2e}")
        generator = torch.Generator().manual_seed(3)
        for value in ours.trainable_parameters().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        weights.write_released(path, weights.adapter_state(ours))
        theirs.load(torch.load(path, weights_only=True))
        print(f"back:     {float((theirs.run(x, theirs.residual(x)) - ours(**x)).abs().max()):.2e}")
    recorded |= record_vae(args.checkout)
    condition = numbers.our_base().encode_condition(*numbers.clip(), "released")
    both = torch.cat([recorded["vae_colour"], recorded["vae_mask"]], dim=1)
    print(f"vae:      {float((condition - both).abs().max()):.2e}")
    if args.write:
        np.savez(OUTPUT, **{name: value.numpy() for name, value in recorded.items()})


if __name__ == "__main__":
    main()
