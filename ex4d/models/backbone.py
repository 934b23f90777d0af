"""Load the frozen base model by component: Wan's transformer, VAE, text encoder and image encoder.

All use the classes of diffusers and transformers; the tiny model stands in for them on a CPU.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ex4d import hub
from ex4d.config import checked, setting
from ex4d.errors import ConfigError, ContractError
from ex4d.models import families, lora, sharing, streaming
from ex4d.models.encoders import Base

log = logging.getLogger(__name__)

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny"
COMPONENTS = ("transformer", "vae", "text_encoder", "image_encoder")
# Sub-folders of the diffusers layout that a component needs; only safetensors and text are ever fetched or read.
FOLDERS = {
    "transformer": ("transformer",),
    "transformer_2": ("transformer_2",),
    "vae": ("vae",),
    "text_encoder": ("text_encoder", "tokenizer"),
    "image_encoder": ("image_encoder", "image_processor"),
}
Expert = Literal["high", "low"]  # the noise levels that a transformer of a two-expert base handles; see experts.py
TRANSFORMERS: dict[Expert | None, str] = {None: "transformer", "high": "transformer", "low": "transformer_2"}
FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the base model and of the weights that are trained on top of it."""

    base: str = setting(TINY, "Base model: tiny, a folder in diffusers layout, or a hub id.")
    revision: str | None = setting(
        None, "Commit or tag of a hub id; null: the newest. The adapter file records the commit."
    )
    family: str | None = setting(None, "Family that the base must belong to; null: any.", choices=families.FAMILIES)
    lora_rank: int = setting(16, "Rank of the LoRA.", ge=1)
    lora_alpha: float = setting(16.0, "Scale of the LoRA: its output is multiplied by alpha / rank.")
    lora_dropout: float = setting(0.0, "Dropout on the input of the LoRA in training.", ge=0, lt=1)
    lora_rslora: bool = setting(False, "Multiply by alpha / sqrt(rank) instead, for high ranks (rank-stabilised LoRA).")
    lora_targets: tuple[str, ...] = setting(
        lora.TARGETS, "Layers of each block that get a LoRA.", choices=lora.TARGETS, not_empty=True
    )
    adapter_hidden: int = setting(1024, "Channels inside the geometry adapter.", ge=1)
    mask_range: Literal["unit", "released"] = setting(
        "unit", "Mask values before the VAE: unit is -1 and +1; released is -3 and +1, as the published weights expect."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Data type of transformer and text encoder; auto: bfloat16 on an accelerator, float32 on a CPU."
    )
    quantize: Literal["int8", "fp8", "nf4"] | None = setting(
        None, "Store the frozen blocks as int8, fp8 (1 byte per weight) or nf4 (half a byte); null: as dtype."
    )
    vae_dtype: Literal["float32", "bfloat16"] = setting("float32", "Data type of the VAE.")
    residual_fp32: bool = setting(
        False, "Keep the residual stream in float32 with a bfloat16 base, as the published weights expect."
    )
    source_video: bool = setting(False, "Give the source video to the model as a second condition (beyond the paper).")

    def __post_init__(self) -> None:
        checked(self, "model")


def load_base(
    base: str = TINY,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    components: Sequence[str] = COMPONENTS,
    vae_dtype: str | torch.dtype = "float32",
    quantize: str | None = None,
    transformer_device: str | torch.device | None = None,
    offload: bool = False,
    shared: bool = False,
    expert: Expert | None = None,
) -> Base:
    """Return the frozen base in eval mode, with the requested components on `device` and None for the others.

    Args:
        components: names of COMPONENTS; the image encoder is None where the base has none. quantize: see ModelConfig.
        transformer_device: where to put the transformer instead, for swap.swap_blocks; None: `device`.
        offload: keep each component in host memory until it is used; see Base.
        shared: only rank 0 reads the weights and broadcasts them; every rank of the process group must call.
        expert: which of a base's two transformers to load; None for a base with one.

    Raises:
        ConfigError: the base is missing and cannot be fetched.
        ContractError: the folder exists but its files are missing, damaged or of the wrong kind.
    """
    if unknown := set(components) - set(COMPONENTS):
        raise ConfigError("components", sorted(unknown), f"allowed: {', '.join(COMPONENTS)}")
    transformer = TRANSFORMERS[expert]
    folder = resolve(base, revision, [transformer if name == "transformer" else name for name in components])
    device = _numbered(device)
    main, vae = dtype_of(dtype, device), dtype_of(vae_dtype, device)
    home = torch.device("cpu") if offload else device
    loaded = {}
    if "transformer" in components:  # quantised on the device, a layer at a time
        place = device if quantize else torch.device(transformer_device or home)
        loaded["transformer"] = _load_transformer(folder / transformer, main, device, place, quantize, shared)
    others = [name for name in components if name != "transformer"]
    loaded |= {name: _load(name, folder, vae if name == "vae" else main, home, shared) for name in others}
    return Base(
        name=base,
        revision=hub.revision_of(folder) if not _is_local(base) else revision,
        device=device,
        shape=read_config(folder, "transformer"),
        tokenizer=_tokenizer(folder) if "text_encoder" in components else None,
        image_settings=_image_settings(folder) if loaded.get("image_encoder") is not None else None,
        offload=offload,
        **{name: loaded.get(name) for name in COMPONENTS},
    )


def _numbered(device: str | torch.device) -> torch.device:
    """Return the device with an explicit index, as tensors on it report it."""
    chosen = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if chosen == torch.device("cuda") else chosen


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve a dtype setting for a device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError("model.dtype", dtype, f"allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _is_local(base: str) -> bool:
    return base == TINY or Path(base).is_dir()


def resolve(base: str, revision: str | None = None, components: Sequence[str] = COMPONENTS) -> Path:
    """Return the local folder of a base, fetching the requested components of a hub id that are not cached.

    Raises:
        ConfigError: the base is missing and cannot be fetched; says what to download and where to put it.
    """
    if _is_local(base):
        folder = TINY_FOLDER if base == TINY else Path(base)
        if not (folder / "transformer" / "config.json").is_file():
            raise ConfigError(
                "model.base", base, f"{folder} is not a diffusers folder: transformer/config.json is missing"
            )
        return folder
    patterns = [f"{sub}/{file}" for name in components for sub in FOLDERS[name] for file in FILES]
    at = f"@{revision}" if revision else ""
    return hub.resolve(f"{base}{at}", [*patterns, "transformer/config.json", "model_index.json"], "model.base")


def read_config(folder: Path, component: str) -> dict[str, Any]:
    """Return the config.json of a component. Raises ContractError if it is missing or not a JSON object."""
    path = folder / component / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ContractError(f"{path} is not a mapping")
    return config


def _load_transformer(
    folder: Path, dtype: torch.dtype, device: torch.device, place: torch.device, style: str | None, shared: bool
) -> Any:
    """Return the frozen transformer in eval mode; see streaming.load_transformer."""
    from diffusers import WanTransformer3DModel

    config = read_config(folder.parent, folder.name)
    model = streaming.load_transformer(WanTransformer3DModel, config, folder, dtype, device, place, style, shared)
    log.info("loaded %s in %s", folder.name, style or dtype)
    return model.eval().requires_grad_(False)


def _load(component: str, folder: Path, dtype: torch.dtype, device: torch.device, shared: bool) -> Any:
    """Return one frozen component in eval mode; None for an image encoder that the base does not have."""
    if component == "image_encoder" and not (folder / component / "config.json").is_file():
        return None
    config = read_config(folder, component)
    cls = _class_of(component, config)
    kwargs: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "device_map": {"": device}}
    if component == "vae":
        kwargs["torch_dtype"] = dtype
    else:  # transformers only: diffusers never runs code from a folder and rejects trust_remote_code
        kwargs |= {"dtype": dtype, "trust_remote_code": False}

    def read() -> Any:
        try:
            return cls.from_pretrained(folder / component, **kwargs).to(device)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ContractError(f"{folder / component} cannot be loaded as {cls.__name__}: {error}") from error

    def empty() -> Any:
        if component == "vae":
            return cls.from_config(config)
        return cls(cls.config_class.from_pretrained(folder / component, local_files_only=True))

    model: Any = sharing.loaded_once(read, empty, device) if shared else read()
    if hasattr(model, "enable_slicing"):
        model.enable_slicing()  # one clip at a time: less memory, and latents that do not depend on the batch
    log.info("loaded %s as %s in %s", component, cls.__name__, dtype)
    return model.eval().requires_grad_(False)


def _class_of(component: str, config: Mapping[str, Any]) -> Any:
    """Return the class of a component; that of the VAE is `_class_name` in its config.json."""
    if component == "text_encoder":
        from transformers import UMT5EncoderModel

        return UMT5EncoderModel
    if component == "image_encoder":
        from transformers import CLIPVisionModel

        return CLIPVisionModel
    name = config.get("_class_name")
    if name == "AutoencoderKLWan":
        from diffusers import AutoencoderKLWan

        return AutoencoderKLWan
    if name == "LinearVideoCodec":
        from ex4d.models.linear_codec import LinearVideoCodec

        return LinearVideoCodec
    raise ContractError(f"vae/config.json has _class_name {name!r}; known: AutoencoderKLWan, LinearVideoCodec")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ContractError(f"{folder / 'tokenizer'} cannot be loaded: {error}") from error


def _image_settings(folder: Path) -> dict[str, Any]:
    path = folder / "image_processor" / "preprocessor_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return {"mean": settings["image_mean"], "std": settings["image_std"]}
    except (OSError, ValueError, KeyError) as error:
        raise ContractError(f"{path} has no image_mean and image_std: {error}") from error


def transformer_config(base: str, revision: str | None = None, family: str | None = None) -> dict[str, Any]:
    """Return the configuration of a base's transformer without loading it; known hub ids need no network access.

    Raises:
        ConfigError: the base is missing, or is not of the requested family.
    """
    known = families.family_of_hub_id(base)
    if family is not None and family not in families.FAMILIES:
        raise ConfigError("model.family", family, f"allowed: {', '.join(families.FAMILIES)} or null")
    if known is not None and not _is_local(base):
        config = dict(families.FAMILIES[known].transformer)
    else:
        config = read_config(resolve(base, revision, ("transformer",)), "transformer")
    if family is not None and families.family_of(config) != family:
        raise ConfigError("model.family", family, f"{base} is of the family {families.family_of(config)}")
    return config


def clip_stride(base: str, revision: str | None = None) -> tuple[int, int, int]:
    """Return the pixels per latent in (T, H, W) without loading the base; known hub ids need no network access.

    Raises:
        ConfigError: the base is missing.
    """
    known = families.family_of_hub_id(base)
    if known is not None and not _is_local(base):
        return families.FAMILIES[known].stride
    config = read_config(resolve(base, revision, ("vae",)), "vae")
    down = config.get("scale_factor_spatial", 8)
    return config.get("scale_factor_temporal", 4), down, down


def meta_transformer(config: Mapping[str, Any]) -> Any:
    """Return a WanTransformer3DModel of a configuration on the meta device: shapes without weights or memory."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        return WanTransformer3DModel.from_config(dict(config))
