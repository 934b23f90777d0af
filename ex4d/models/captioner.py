"""Caption clips with a vision-language model of the transformers library, for videos without captions.

It takes any checkpoint that the library lists as image-text-to-text: BLIP, LLaVA, Qwen-VL, SmolVLM and others. BLIP
sees the middle frame and continues a prompt; the others see NUM_FRAMES frames, spread over the clip, and answer a
question. Decoding is greedy, so equal frames give equal captions.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.errors import ConfigError, ContractError

FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
BLIP = "blip"
QUESTION = "These are frames of one video. Describe in one or two sentences what is there and what happens."
NUM_FRAMES = 4
KEY = "preprocess.captioner.model"
ADVICE = "for example Salesforce/blip-image-captioning-base (BSD-3-Clause, 0.99 GB in safetensors)"


def caption(
    frames: np.ndarray, weights: str, prompt: str = "", max_new_tokens: int = 40, device: str = "cpu"
) -> tuple[str, dict[str, str]]:
    """Return (caption of a clip, provenance with `model`, `revision` and `weights_sha256`).

    Args:
        frames: uint8 [T,H,W,3] RGB.
        weights: a local folder or `hub-id[@revision]`.
        prompt: BLIP: the beginning of the caption; others: the question, "" for QUESTION.
        max_new_tokens: maximum length of the caption.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: the weights are missing and cannot be fetched, or are not of a supported family.
        ContractError: the folder does not hold what its config says.
    """
    folder = folder_of(weights)
    describe = _continued if _kind(folder) == BLIP else _answered
    text, digest = describe(frames, str(folder), prompt, max_new_tokens, device)
    return text, {"model": hub.name_of(weights), "revision": hub.revision_of(folder) or "", "weights_sha256": digest}


def _continued(frames: np.ndarray, folder: str, prompt: str, max_new_tokens: int, device: str) -> tuple[str, str]:
    """Return (caption by a BLIP model, sha256 of its weights)."""
    import torch

    model, processor, tokenizer, digest = _blip(folder, device)
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
    return tokenizer.decode(words, skip_special_tokens=True).strip(), digest


def _answered(frames: np.ndarray, folder: str, prompt: str, max_new_tokens: int, device: str) -> tuple[str, str]:
    """Return (a chat model's answer to a question about frames, sha256 of its weights)."""
    import torch
    from PIL import Image

    model, processor, digest = _chat(folder, device)
    index = (np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * len(frames)
    pictures = [{"type": "image", "image": Image.fromarray(frames[int(number)])} for number in index]
    question = {"type": "text", "text": prompt or QUESTION}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*pictures, question]}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    ).to(device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip(), digest


def folder_of(weights: str) -> Path:
    """Return the local folder of the weights. Raises ConfigError, which says what to download or what it found."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    folder = hub.resolve(weights, FILES, KEY, f"get them with `hf download` and give their folder; {ADVICE}")
    try:
        kind = _kind(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(KEY, weights, f"holds no config.json of a model; {ADVICE}") from error
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        what = "allowed: what transformers knows as image-text-to-text"
        raise ConfigError(KEY, weights, f"holds a {kind}; {what}, {ADVICE}")
    return folder


def _kind(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


@lru_cache(maxsize=1)
def _blip(folder: str, device: str) -> tuple[Any, Any, Any, str]:
    """Return (model in eval mode, image processor, tokenizer, sha256 of the weights), cached between clips."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
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


@lru_cache(maxsize=1)
def _chat(folder: str, device: str) -> tuple[Any, Any, str]:
    """Return (model in eval mode, processor, sha256 of the weights), cached between clips."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **local)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype="auto" if device.startswith("cuda") else "float32", use_safetensors=True, **local
        )
    except ImportError as error:
        raise ConfigError(KEY, folder, f"its processor needs a package that is not installed: {error}"[:300]) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContractError(f"{folder} cannot be loaded as a vision-language model: {error}") from error
    if not getattr(processor, "chat_template", None):
        raise ConfigError(KEY, folder, "has no chat template, so it cannot be asked a question; take an instruct model")
    model.eval().to(device=device)
    return model, processor, hub.fingerprint([Path(folder)], ("*.safetensors",))
