"""Open the datasets of a run: one, or several that are mixed by weight; all hold clips or all hold latents."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ex4d.data import decoding, foreign, latents, loader, manifest
from ex4d.data.mixture import MixtureLoader
from ex4d.data.texts import TextStore
from ex4d.data.verify import dataset_fingerprint
from ex4d.errors import ConfigError, ContractError
from ex4d.models import backbone, fingerprints
from ex4d.train import flops
from ex4d.train.config import Place, TrainConfig


def fingerprint(config: TrainConfig) -> str:
    """Return the fingerprint of a run's data: the dataset's tree hash, or the hashes of several with their weights."""
    named = [(dataset_fingerprint(data.path), data.weight) for data in config.datasets]
    return named[0][0] if len(named) == 1 else " + ".join(f"{weight:g} * {digest}" for digest, weight in named)


class Datasets:
    """The datasets that a run trains on, checked against its model before any base is loaded.

    Attributes:
        facts: dataset.json of each. texts: their prompt embeddings; empty for datasets of clips.

    Raises:
        ConfigError: the mask range or prompt differs from that of the latents; a dataset lacks the source videos;
            datasets of clips and of latents are mixed.
        ContractError: a dataset is not finished, or its latents were made with another model.
    """

    def __init__(self, config: TrainConfig, model: backbone.ModelConfig, place: Place):
        self.config, self.source_video, self.place = config, model.source_video, place
        self.paths = [data.path for data in config.datasets]
        self.facts = [manifest.read_dataset(path) for path in self.paths]
        self.fingerprint = fingerprint(config)
        for path, facts in zip(self.paths, self.facts, strict=True):
            if model.source_video and not decoding.has_source(facts):
                # A model whose source is the clip itself would learn to copy it.
                allowed = f"must be false: {path} has no clips from two cameras; see preprocess.members: [source]"
                raise ConfigError("model.source_video", True, allowed)
            if ("latents" in facts) != ("latents" in self.facts[0]):
                allowed = f"must be all clips or all latents: {self.paths[0]} and {path} differ"
                raise ConfigError("train.data", self.paths, allowed)
        self.texts: list[TextStore] = []
        if "latents" in self.facts[0]:
            # This may read gigabytes, so only one rank does it.
            ours = fingerprints.of_components(model.base, model.revision) if place.rank == 0 else {}
            pairs = zip(self.paths, self.facts, strict=True)
            self.texts = [_check_latents(config, model, *pair, ours) for pair in pairs]

    def embeds(self, text: str) -> np.ndarray:
        """Return float32 [text_length, text_dim] from the first dataset that holds the text; see TextStore.embeds."""
        return next((store for store in self.texts if text in store), self.texts[0]).embeds(text)

    def costs(self, base: backbone.Base, model: backbone.ModelConfig) -> list[flops.Cost]:
        """Return the cost of a sample of each dataset. Raises ConfigError if the base cannot take its clips."""
        costs = []
        for facts in self.facts:
            sample = facts["sample"]
            pixels = (sample["num_frames"], *sample["size"], 3)
            f, h, w = (facts["latents"]["shape"] if self.texts else base.latent_shape(pixels))[-3:]
            costs.append(flops.cost(base.shape, (f, h, w), model))
        return costs

    def open(
        self, split: str, samples: int, micro_batch_size: int, accum_steps: int = 1
    ) -> loader.ShardLoader | MixtureLoader:
        """Return endless micro batches for this rank; validation uses the first dataset that has the split.

        Args:
            samples: samples already consumed by all ranks together.
            accum_steps: micro batches per step; all of a step come from one dataset.
        """
        if split != "train" or len(self.paths) == 1:
            count = f"samples_{split}"
            index = next((i for i, facts in enumerate(self.facts) if facts["counts"].get(count)), 0)
            return self._open_one(index, split, micro_batch_size, samples)
        opening = [partial(self._open_one, index, split, micro_batch_size) for index in range(len(self.paths))]
        weights = [data.weight for data in self.config.datasets]
        step_size = micro_batch_size * accum_steps * self.place.world_size
        return MixtureLoader(opening, weights, accum_steps, step_size, samples)

    def _open_one(self, index: int, split: str, micro_batch_size: int, samples: int) -> loader.ShardLoader:
        decode = None
        if self.texts and self.config.prompt is None:
            trust = self.config.loader.trust
            decode = foreign.decoder_of(self.paths[index], self.facts[index], trust, self.source_video)
            decode = _with_texts(self.texts[index], decode)
        # Validation clips and their masks are the same in every run.
        where = (self.paths[index], split, micro_batch_size, self.config.seed if split == "train" else 0)
        ranks = (self.place.rank, self.place.world_size)
        return loader.ShardLoader(*where, *ranks, samples, self.config.loader, decode, with_source=self.source_video)


def _check_latents(
    config: TrainConfig, model: backbone.ModelConfig, path: str, dataset: Mapping[str, Any], ours: Mapping[str, str]
) -> TextStore:
    """Check that a latent dataset was made for this model and return its prompt embeddings; see Datasets for errors.

    Args:
        ours: fingerprints of the base's components; components without one are not compared.
    """
    facts = dataset["latents"]
    latents.LatentSpec.of(dataset)
    if facts["mask_range"] != model.mask_range:
        allowed = f"must be {facts['mask_range']!r}, as in the latents of {path}"
        raise ConfigError("model.mask_range", model.mask_range, allowed)
    for component, theirs in facts["models"].items():
        if ours.get(component, theirs) != theirs:
            raise ContractError(
                f"{path}: the latents belong to another model: their {component} is {theirs} "
                f"({facts['base']}), but that of model.base={model.base} is {ours[component]}"
            )
    texts = TextStore(path, dataset)
    if config.prompt is not None and config.prompt not in texts:
        raise ConfigError("train.prompt", config.prompt, f"must be a text that {path} holds; see encode.prompts")
    if config.prompt is None and not facts["captions"]:
        raise ConfigError("train.prompt", None, f"must be a text, since {path} was encoded with encode.captions=false")
    return texts


def _with_texts(texts: TextStore, decode_latents: loader.Decode) -> loader.Decode:
    """Wrap `decode_latents` so that the loader's thread also reads the embeddings of the captions."""

    def decode(members: Mapping[str, bytes], draw: decoding.Draw) -> dict[str, Any]:
        values = decode_latents(members, draw)
        texts.embeds(values["captions"])
        return values

    return decode
