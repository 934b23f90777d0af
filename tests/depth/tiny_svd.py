"""Write a folder of DepthCrafter's weights with the real classes, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

DOWN, UP = "CrossAttnDownBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"


def save(folder: Path, factor: int = 8) -> str:
    """Write unet, vae (one latent for `factor` × `factor` px), image_encoder, feature_extractor, scheduler."""
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    levels = factor.bit_length()
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=(DOWN, "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", UP),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * levels, down_block_types=("DownEncoderBlock2D",) * levels, layers_per_block=1
    )
    clip = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    scheduler = EulerDiscreteScheduler(  # the published SVD's settings
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
        use_karras_sigmas=True,
    )
    unet.save_pretrained(folder / "unet")
    path = folder / "unet" / "config.json"  # the published network names a class of its own
    config = {**json.loads(path.read_text()), "_class_name": "DiffusersUNetSpatioTemporalConditionModelDepthCrafter"}
    path.write_text(json.dumps(config))
    vae.save_pretrained(folder / "vae", variant="fp16")
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "feature_extractor").mkdir(exist_ok=True)
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)
