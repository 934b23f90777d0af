"""`ex4d encode`: turn a dataset of clips into a dataset of latents, with the same keys and the same guarantees.

There are two passes, each over what the ledger lacks: the samples, then each distinct caption of the encoded samples.
A staged file is named by its key and a fingerprint of everything that it depends on, including the encoders' weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ex4d import config as config_file
from ex4d import storage
from ex4d.config import checked, fingerprint, installed_versions, setting
from ex4d.data import foreign, latents, manifest, shards, tensors, texts
from ex4d.data.tar import read_sample
from ex4d.data.verify import dataset_fingerprint
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig, transformer_config
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.models.fingerprints import ENCODERS, of_components
from pipelines.encode import stages
from pipelines.encode.stages import Encoding
from pipelines.runtime.cluster import check_output
from pipelines.runtime.job import complete, opened
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.output import outside_datasets
from pipelines.runtime.passes import Passes
from pipelines.runtime.result import Result
from pipelines.runtime.runner import RayConfig
from pipelines.runtime.stage import Row, Stage, new_row

CODE = 1  # increment when stages change their output, so that older staging is not reused
PACKAGES = ("ex4d-platform", "torch", "diffusers", "transformers", "numpy", "av")  # whose version may change a latent
TEXTS = "texts"
SAMPLE_STAGES = (stages.READ, stages.LOAD_MODELS, stages.ENCODE_VIDEO, stages.ENCODE_IMAGE, stages.WRITE_LATENTS)
TEXT_STAGES = (stages.LOAD_TEXT_MODEL, stages.ENCODE_TEXT, stages.WRITE_TEXT)


@dataclass(frozen=True)
class EncodeConfig:
    """From a dataset of clips to a dataset of latents, for the base of the section `model`."""

    data: str = setting("out/dataset", "Dataset folder or URL written by `ex4d preprocess`.")
    output: str = setting("out/latents", "Folder or URL of the latent dataset to write.", not_empty=True)
    num_workers: int = setting(2, "CPU workers, if this command starts Ray itself.", ge=1)
    num_gpus: float = setting(0.0, "Share of a GPU for each actor that runs a model; 0: on the CPU.", ge=0, le=1)
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "Data type of stored tensors; float32 equals what training itself would encode; bfloat16 has half the size.",
    )
    captions: bool = setting(True, "Encode each distinct caption; false: training uses fixed prompts only.")
    prompts: tuple[str, ...] = setting((), "More texts to encode, for train.prompt; the empty text is always included.")
    trust: str = setting(
        "auto",
        "Decode samples in the worker (own) or in a sandboxed child (foreign); auto: foreign for datasets from the web "
        "or of another user.",
        choices=foreign.TRUST,
    )
    shard_size_mb: int = setting(1024, "Start a new shard before the current one exceeds this size.", ge=1)
    max_bad_fraction: float = setting(
        0.1, "Fail, and commit nothing, if a larger fraction of samples is damaged.", ge=0, le=1
    )
    max_bugs: int = setting(10, "Stop after more than this many unexpected errors.", ge=0)
    max_attempts: int = setting(3, "Reject a row as worker_crash after it has killed this many processes.", ge=1)
    metrics_port: int | None = setting(
        None, "Serve Prometheus metrics on this port while the run lasts; null: off.", ge=1, le=65535
    )
    metrics_host: str = setting(
        "127.0.0.1",
        "Address of that port; for a Prometheus on another machine, the address of the driver's node, or 0.0.0.0.",
    )

    def __post_init__(self) -> None:
        need = checked(self, "encode")
        need(self.output.rstrip("/") != self.data.rstrip("/"), "output", "must be another folder than encode.data")


SECTIONS = {"encode": EncodeConfig, "model": ModelConfig, "ray": RayConfig}


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d encode`; return the exit status."""
    chosen = config_file.load(config_path, SECTIONS, overrides)
    check_output("encode.output", chosen["encode"].output)
    result = run(chosen["encode"], chosen["model"], chosen["ray"])
    print(result.table(), throughput(result), sep="\n")
    return result.exit_code


def run(
    config: EncodeConfig, model: ModelConfig, ray_config: RayConfig | None = None, runner_name: str = "ray"
) -> Result:
    """Update the latent dataset `config.output` to match `config.data` and return the result.

    Running it again resumes. `exit_code` is 1, and nothing is committed, if too many samples are bad.

    Args:
        runner_name: "ray", or "inline": row by row in this process, where unexpected errors propagate.

    Raises:
        ConfigError: a setting is invalid, or the base cannot take these clips; raised before any work.
        ContractError: `config.data` is not a finished dataset of clips.
    """
    outside_datasets("encode.output", config.output, own="latents")
    dataset = manifest.read_dataset(config.data)
    if "latents" in dataset:
        raise ConfigError("encode.data", config.data, "must be a dataset of clips; this one already holds latents")
    if model.family is not None:
        transformer_config(model.base, model.revision, model.family)  # raises if the base is of another family
    models = of_components(model.base, model.revision, ENCODERS)
    with opened("encode", config, ray_config, runner_name) as (passes, end):
        job = _Job(config, model, dataset, models, passes)
        result = complete(job, job.work)
        end(result)
    return result


@dataclass
class _Job:
    """One run. State is filled in this order: samples, texts, then the dataset."""

    config: EncodeConfig
    model: ModelConfig
    dataset: Mapping[str, Any]
    models: Mapping[str, str]
    passes: Passes
    rejects: list[dict[str, str]] = field(default_factory=list)
    staged: list[shards.Staged] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    committed: bool = False

    def __post_init__(self) -> None:
        self.versions = installed_versions(PACKAGES)
        self.ledger = Ledger(self.config.output)
        staged = storage.list_files(storage.join(self.config.output, "staging", TEXTS))
        self.done = self.ledger.names() | {f"{TEXTS}/{name}" for name in staged}
        device = "cuda" if self.config.num_gpus else "cpu"
        kinds = tuple(self.dataset["sample"]["mask_kinds"])
        places = (self.config.data, self.config.output)
        self.context = Encoding(*places, self.model, self.config.dtype, device, kinds, self.config.trust)

    def work(self) -> None:
        """Encode or reject every sample that staging lacks; then encode the captions of the encoded samples."""
        table = manifest.read_table(
            self.config.data, manifest.MANIFEST, sha256=self.dataset["sha256"][manifest.MANIFEST]
        )
        manifest.check_shard_names(table)
        captions: dict[str, dict[str, Any]] = {}
        rows = [self._sample_row(fields) for fields in table.to_pylist()]
        refusals = self._pass("samples", SAMPLE_STAGES, rows)
        for row in rows:
            refusal = refusals.get(row["key"])
            if refusal is not None:
                facts = {name: refusal[name] for name in ("fate", "stage", "reason", "message")}
                self.rejects.append({**facts, "key": row["key"], "unit": "clip"})
                continue
            self.staged.append(shards.Staged(row["key"], row["split"], self.ledger.url(row["artifact"])))
            captions.setdefault(row["caption"]["sha256"], {"shard": row["shard"], **row["caption"]})
        self._texts(captions if self.config.captions else {})

    def _sample_row(self, fields: Mapping[str, Any]) -> Row:
        digest = fingerprint(
            *("latents", CODE, self.versions, self.config.dtype, fields["sha256"]),
            *({name: self.models.get(name) for name in ("vae", "image_encoder")}, self._numbers()),
            self.model.mask_range,
        )
        names = ("key", "split", "shard", "offset", "length", "sha256")
        caption = next(member for member in fields["members"] if member["name"] == "txt")
        return new_row(
            **{name: fields[name] for name in names},
            caption={name: caption[name] for name in ("offset", "length", "sha256")},
            fingerprint=digest,
            artifact=f"clips/{fields['key']}.{digest}.tar",
            video_s=fields["end_s"] - fields["start_s"],
        )

    def _numbers(self) -> dict[str, Any]:
        """Return the models' dtypes and device; "auto" resolves to a different dtype on another device."""
        return {"dtype": self.model.dtype, "vae_dtype": self.model.vae_dtype, "device": self.context.device}

    def _texts(self, places: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill `texts`: {sha256 of the text: path or URL of its embeddings}."""
        digest = fingerprint(
            "text", CODE, self.versions, self.config.dtype, self.models.get("text_encoder"), self._numbers()
        )
        prompts = {texts.text_key(text): text for text in ("", *self.config.prompts)}
        rows = [
            new_row(key, text=prompts.get(key), place=places.get(key), artifact=f"{TEXTS}/{key}.{digest}.safetensors")
            for key in sorted({*prompts, *places})
        ]
        refused = self._pass("texts", TEXT_STAGES, rows)
        self.problems += [f"the text {key}: {refusal['message']}" for key, refusal in refused.items()]
        self.texts = {row["key"]: self.ledger.url(row["artifact"]) for row in rows if row["key"] not in refused}

    def _pass(self, name: str, todo: tuple[Stage, ...], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        """Run stages on the rows that the ledger lacks; return {key: refusal} of rejected rows."""
        missing = [row for row in rows if row["artifact"] not in self.done]
        done = self.passes.run(name, stages.with_gpu(todo, self.config.num_gpus), missing, self.context)
        return {row["key"]: row["refusal"] for row in done if row["refusal"] is not None}

    def judge(self) -> None:
        """Commit the dataset, unless too many samples are bad."""
        total = self.dataset["counts"]["samples"]
        if len(self.rejects) > self.config.max_bad_fraction * total:
            self.problems.append(
                f"{len(self.rejects)} of {total} samples are bad, more than "
                f"encode.max_bad_fraction={self.config.max_bad_fraction:g}"
            )
        if not self.staged:
            self.problems.append("no sample is left")
        if self.problems:
            return
        earlier = manifest.read_table(self.config.data, manifest.REJECTS).to_pylist()
        size = self.config.shard_size_mb << 20
        write_texts = partial(texts.write, staged=self.texts, file_size_bytes=size)
        shards.pack(self.staged, self.config.output, self._facts(), [*earlier, *self.rejects], size, write_texts)
        self.committed = True
        self.ledger.sweep()
        self.problems += self.passes.problems()

    def _facts(self) -> dict[str, Any]:
        first = self.staged[0]
        spec = latents.spec_of(read_sample(storage.read_bytes(first.url), first.key))
        empty = tensors.decode_tensors(storage.read_bytes(self.texts[texts.text_key("")]))
        local = storage.is_local(self.model.base) and storage.local_path(self.model.base).is_dir()
        encoded = {
            **spec,
            "computed": self._numbers(),
            "mask_range": self.model.mask_range,
            "base": storage.local_path(self.model.base).name if local else self.model.base,
            "revision": self.model.revision or "",
            "models": dict(self.models),
            "captions": self.config.captions,
            "text_dim": int(empty["embeds"].shape[1]),
            "text_length": TEXT_LENGTH,
        }
        names = ("videos_in", "videos_split", "clips_planned")
        return {
            "sample": self.dataset["sample"],
            "latents": encoded,
            "config": self.dataset["config"],
            "source": {"tree_sha256": dataset_fingerprint(self.config.data), "versions": self.dataset["versions"]},
            "versions": self.versions,
            "counts": {name: self.dataset["counts"][name] for name in names},
        }

    def finish(self) -> Result:
        """Return the Result: the counts of the input dataset, minus the rejected samples."""
        counts = dict(self.dataset["counts"])
        counts["samples"] -= len(self.rejects)
        counts["clips_bad"] += len(self.rejects)
        done = (self.committed, self.passes.progress.tallies, self.passes.worked)
        return Result(self.config.output, counts, self.rejects, self.problems, *done)


def throughput(result: Result) -> str:
    """Return one line: clips per second of work, and the fraction of each stage; model loading is listed separately."""
    worker_s_of = {name: tally.worker_s for name, tally in result.stages.items() if tally.done}
    loading = sum(worker_s_of.pop(name, 0.0) for name in (stages.LOAD_MODELS.name, stages.LOAD_TEXT_MODEL.name))
    whole = sum(worker_s_of.values())
    if not whole:
        return "nothing to encode: everything was done already"
    shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in worker_s_of.items())
    rate = f"{result.worked['samples'] / whole:.2f} clips/s for each worker"
    return f"{rate}, loading models {loading:.1f} s; of {whole:.1f} s of work: {shares}"
