"""Plan an evaluation: check the settings, and list one row for each clip along each path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ex4d import hub, remote, storage, web
from ex4d.config import fingerprint, installed_versions, to_dict
from ex4d.depth import FOREIGN, DepthRequest, places, weight_folders
from ex4d.errors import BadSample, ConfigError
from ex4d.generate import GenerateConfig
from ex4d.generate_load import lora_files
from ex4d.geometry import camera_path
from ex4d.geometry.camera import intrinsics
from ex4d.geometry.render import choose_backend
from ex4d.models import backbone, experts, fingerprints, provenance, weights
from ex4d.reconstruct_config import ReconstructConfig
from ex4d.synthetic import SyntheticConfig
from pipelines import inputs
from pipelines.evaluate.config import CORPUS_SEED, EvaluateConfig
from pipelines.evaluate.stages import OTHER, Evaluation
from pipelines.runtime.stage import Row, new_row

CODE = 1  # increment when stages change their output, so that older staging is not reused
PACKAGES = (  # packages whose version may change a picture or a figure
    *("ex4d-platform", "torch", "diffusers", "transformers", "peft"),
    *("numpy", "scipy", "numba", "av", "opencv-python-headless"),
)


@dataclass(frozen=True)
class Planned:
    """The plan of an evaluation.

    Args:
        rows: one for each clip along each path, with `artifact` and `refusal_artifact`, one of which will be written.
        rejects: videos that cannot be used, each with `views`, the number of rows that it would have had.
        context: settings that all rows share.
        facts: what is evaluated, and how, for the page.
    """

    rows: list[Row]
    rejects: list[dict[str, Any]]
    context: Evaluation
    facts: dict[str, Any]


def plan(config: EvaluateConfig, sampler: GenerateConfig, world: SyntheticConfig) -> Planned:
    """Return the plan of an evaluation.

    Raises:
        ConfigError: a setting is invalid; raised before any work.
        ContractError: the adapter's file or a file of poses is damaged.
    """
    adapters = experts.read(config.adapter)
    metadata = experts.common(adapters)
    size = config.size or metadata.size
    num_frames = metadata.num_frames if config.num_frames is None else config.num_frames
    choices = _reconstruct_choices(config, metadata, num_frames, size)
    ReconstructConfig(**choices)  # raises if a setting is invalid
    _check_size(num_frames, size)
    if config.videos is None and world.seed == CORPUS_SEED:
        raise ConfigError("synthetic.seed", world.seed, "must be another number: the scenes of evaluate use it")
    world = replace(world, seed=CORPUS_SEED, num_frames=num_frames, size=(size[0], size[1]), num_videos=1)
    base = provenance.base_of(config.adapter, metadata, config.base, "evaluate.base")
    _check_swap(sampler, base)
    at = experts.boundary(*base)
    experts.check_fit(adapters, base[0], at)
    digest = " + ".join(storage.sha256(file) for file, _ in adapters.values())
    components = backbone.COMPONENTS if at is None else (*backbone.COMPONENTS, "transformer_2")
    models = fingerprints.of_components(*base, components, components)
    loras = [storage.sha256(str(file)) for _, file, _ in lora_files(sampler, at is not None)]
    sampler = sampler.for_adapter(metadata)
    context = Evaluation(
        output=config.output,
        adapter=config.adapter,
        base=config.base,
        model=fingerprint(digest, models, *loras),
        sampler=sampler,
        seed=config.seed,
        methods=config.compared,
        world=world if config.videos is None else None,
        reconstruct=choices,
        image_features=config.image_features,
        video_features=config.video_features,
        mask_range=metadata.mask_range,
        source_video=metadata.source_video,
        device="cuda" if config.num_gpus else "cpu",
        source_motion=config.source_motion,
        persistent_frames=config.persistent_frames,
        backend=choose_backend("auto") if config.num_gpus else "cpu",  # here, for all workers
    )
    rejects: list[dict[str, Any]] = []
    cases = _cases(config, rejects)
    facts = {"adapter": hub.name_of(config.adapter), "adapter sha256": digest}
    facts |= _facts(sampler, metadata, base[0], num_frames, size)
    paths = {name: _path(name, chosen, num_frames, size) for name, chosen in config.ranges.items()}
    return Planned(list(_rows(config, cases, paths, _known_by(config, context))), rejects, context, facts)


def _reconstruct_choices(
    config: EvaluateConfig, metadata: weights.AdapterMetadata, num_frames: int, size: tuple[int, int]
) -> dict[str, Any]:
    profile = config.profile or ("released" if metadata.mask_range == "released" else "default")
    chosen = {
        name: getattr(config, name)
        for name in ("depth", "depth_path", "depth_python", "depth_fill_px", "fov_deg", "cameras")
    }
    return chosen | {"size": tuple(size), "num_frames": num_frames, "seed": config.seed, "profile": profile}


def _facts(
    sampler: GenerateConfig, metadata: weights.AdapterMetadata, base: str, num_frames: int, size: tuple[int, int]
) -> dict[str, Any]:
    """Return the facts for the page, besides the adapter's name and hash."""
    return {
        "adapter step": metadata.step,
        "base": hub.name_of(base),
        "trained on": metadata.dataset_fingerprint,
        "frames": f"{num_frames} × {size[0]} × {size[1]}",
        "sampler": ", ".join(f"{name}={value}" for name, value in to_dict(sampler).items()),
        "versions": ", ".join(f"{name} {version}" for name, version in installed_versions(PACKAGES).items()),
    }


def _check_swap(sampler: GenerateConfig, base: tuple[str, str | None]) -> None:
    layers = backbone.transformer_config(*base)["num_layers"]
    if sampler.block_swap > layers:
        raise ConfigError("generate.block_swap", sampler.block_swap, f"0 to {layers}, the number of blocks")


def _known_by(config: EvaluateConfig, context: Evaluation) -> list[Any]:
    """Return everything that a view's result depends on besides its clip and its path."""
    # Where idle weights are kept does not change the result.
    how = to_dict(replace(context.sampler, offload=False, block_swap=0))
    known_by = [CODE, installed_versions(PACKAGES), context.model, how, config.seed, context.device, config.compared]
    known_by += [config.source_motion, config.persistent_frames]
    known_by += [context.reconstruct, to_dict(context.world) if context.world else None, context.backend]
    return [*known_by, _networks(config)]


def _check_size(num_frames: int, size: tuple[int, int]) -> None:
    """Raise ConfigError for sizes that no base can take; a family with larger cells raises when it is loaded."""
    if num_frames < 5 or num_frames % 4 != 1:
        raise ConfigError("evaluate.num_frames", num_frames, "4k + 1, at least 5")
    if any(side % 16 for side in size):
        raise ConfigError("evaluate.size", size, "multiples of 16")


def _path(name: str, chosen: tuple, num_frames: int, size: tuple[int, int]) -> dict[str, Any]:
    """Check a range's path; return its `name`, `angle_deg`, `options`, and `content`, the hash of a pose file or ""."""
    trajectory, angle_deg = chosen[:2]
    options = dict(chosen[2]) if len(chosen) > 2 else {}
    K = intrinsics(size)
    try:
        camera_path.build(trajectory, num_frames, angle_deg, 1.0, K, options)
    except ConfigError as error:
        raise ConfigError(f"evaluate.ranges.{name}", list(chosen), f"{error.key}: {error.allowed}") from None
    content = storage.sha256(trajectory) if Path(trajectory).is_file() else ""
    return {"name": trajectory, "angle_deg": angle_deg, "options": options, "content": content}


def _rows(
    config: EvaluateConfig, cases: list[dict[str, Any]], paths: Mapping[str, dict[str, Any]], known_by: list[Any]
) -> Iterator[Row]:
    for index, case in enumerate(cases):
        other = cases[(index + 1) % len(cases)]
        for name, path in paths.items():
            contents = [case["content"], *([other["content"]] if OTHER in config.compared else [])]
            digest = fingerprint(known_by, path, contents)
            key = f"{case['name']}-{name}"
            stem = f"clips/{key}.{digest}"
            places = {"artifact": f"{stem}.tar", "refusal_artifact": f"{stem}.json"}
            yield new_row(key, case=case, other=other, path=path, range=name, **places)


def _cases(config: EvaluateConfig, rejects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scenes, or the readable videos; append the others to `rejects`."""
    if config.videos is None:
        numbers = range(config.num_scenes)
        cases = [{"name": f"scene-{i:05d}", "index": i, "content": str(i), "video": f"scene {i}"} for i in numbers]
    else:
        cases = list(_videos(config, rejects))
    if OTHER in config.compared and len(cases) < 2:
        raise ConfigError("evaluate.methods", OTHER, "needs at least two clips")
    return cases


def _videos(config: EvaluateConfig, rejects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a case for each readable video; append the others to `rejects`."""
    try:
        with web.rules(private="none"):  # a list may name remote hosts
            listed = inputs.expand(str(config.videos), exclude=config.output)
    except ConfigError as error:
        raise ConfigError("evaluate.videos", error.value, error.allowed) from None
    sources = [source for source in listed if source.reason != "not_a_video"]
    if not sources:
        raise ConfigError("evaluate.videos", config.videos, "no videos found there")
    known = set()
    for source in sources:
        try:
            case = _video(config, source)
            if case["name"] in known:
                raise BadSample("duplicate", "has the same content and depth as another video")
        except BadSample as error:
            origin = {"key": source.name, "name": source.name, "stage": "plan"}
            views = len(config.ranges) if error.reason != "duplicate" else 0
            rejects.append({**origin, "reason": error.reason, "message": error.message, "views": views})
            continue
        known.add(case["name"])
        yield case


def _video(config: EvaluateConfig, source: inputs.Source) -> dict[str, Any]:
    if source.reason:
        raise BadSample(source.reason, source.message)
    if not storage.is_local(source.path):
        raise ConfigError("evaluate.videos", remote.redacted(source.path), "must be files on this machine")
    if source.spans and any(span.start_s or span.end_s is not None for span in source.spans):
        raise ConfigError("evaluate.videos", source.name, "must be whole files: cut out the spans of the list first")
    if not Path(source.path).is_file():
        raise BadSample("not_a_file", "")
    try:
        content = [storage.sha256(source.path)]
        if config.depth == "sidecar":
            request = DepthRequest(source.path, config.depth_path, twin=source.twin)
            content.append(places.sha256(places.find(request)))
    except OSError as error:
        raise BadSample("unreadable", error.strerror or type(error).__name__) from None
    return {"name": fingerprint(content), "path": source.path, "video": source.name, "content": content}


def _networks(config: EvaluateConfig) -> list[str]:
    """Return content hashes of the weights of depth and feature networks."""
    from ex4d.models import features

    chosen = [(config.image_features, False), (config.video_features, True)]
    digests = [hub.fingerprint([features.folder_of(network, kind)]) if network else "" for network, kind in chosen]
    if config.videos is not None and config.depth in FOREIGN:
        from ex4d.depth import foreign

        return [*digests, foreign.identity(config.depth, config.depth_path)]
    folders = weight_folders(config.depth, config.depth_path) if config.videos is not None else []
    return [*digests, hub.fingerprint(folders) if folders else ""]
