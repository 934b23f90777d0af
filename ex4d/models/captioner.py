"""Captions of clips by a BLIP checkpoint of the transformers library, for videos without captions.

The middle frame stands for the clip. The words are the likeliest ones, so equal frames give equal captions.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.errors import ConfigError, ContractError

FILES = ("*.json", "*.txt", "*.safetensors")
MODEL_TYPE = "blip"
KEY = "preprocess.captioner.model"
ADVICE = "for example Salesforce/blip-image-captioning-base (BSD-3-Clause, 0.99 GB in safetensors)"


def caption(
    frames: np.ndarray, weights: str, prompt: str = "", max_new_tokens: int = 40, device: str = "cpu"
) -> tuple[str, dict[str, str]]:
    """Return (a caption, what made it: `model`, `revision`, `weights_sha256`) of a clip.

    Args:
        frames: uint8 [T,H,W,3] RGB.
        weights: a local folder or `hub-id[@revision]`.
        prompt: what the caption begins with; "" for nothing.
        max_new_tokens: its greatest length.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: the weights are not here and cannot be fetched, or are of another family.
        ContractError: the folder does not hold what its config says.
    """
    import torch

    folder = folder_of(weights)
    model, processor, tokenizer, digest = _load(str(folder), device)
    pixels = processor(images=frames[len(frames) // 2], return_tensors="pt")["pixel_values"].to(device, model.dtype)
    inputs = tokenizer(prompt, return_tensors="pt").to(device) if prompt else {}
    fields = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    with torch.inference_mode():
        tokens = model.generate(
            pixel_values=pixels, **fields, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
    ids = model.config.text_config
    marks = {ids.bos_token_id, ids.eos_token_id, ids.sep_token_id, ids.pad_token_id}  # unknown to some tokenizers
    words = [token for token in tokens[0].tolist() if token not in marks]
    text = tokenizer.decode(words, skip_special_tokens=True).strip()
    facts = {"model": hub.name_of(weights), "revision": hub.revision_of(folder) or "", "weights_sha256": digest}
    return text, facts


def folder_of(weights: str) -> Path:
    """Return the local folder of the weights. Raises ConfigError, which names what to get, or what the folder holds."""
    folder = hub.resolve(weights, FILES, KEY, f"get them with `hf download` and give their folder; {ADVICE}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(KEY, weights, f"holds no config.json of a model; {ADVICE}") from error
    if kind != MODEL_TYPE:
        raise ConfigError(KEY, weights, f"holds a {kind}; allowed: {MODEL_TYPE}, {ADVICE}")
    return folder


@lru_cache(maxsize=1)
def _load(folder: str, device: str) -> tuple[Any, Any, Any, str]:
    """Return (model in eval mode, image processor, tokenizer, sha256 of the weights); kept from clip to clip."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        model = BlipForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContractError(f"{folder} cannot be loaded as BlipForConditionalGeneration: {error}") from error
    model.eval().to(device=device)
    return model, processor, tokenizer, hub.fingerprint([Path(folder)], ("*.safetensors",))
