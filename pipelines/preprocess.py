"""`ex4d preprocess`: videos to training shards. Plan → work on each clip → pack; the ledger is the staging folder.

Three passes, each over what the ledger lacks: hash every file; find the shots of every new content; make a sample of
every planned clip. A pass runs on Ray or in this process; the bytes are the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ex4d import storage
from ex4d.config import fingerprint
from ex4d.data import shards
from ex4d.errors import ConfigError, Ex4dError, Filtered
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import inputs, runner, settings
from pipelines.ledger import Attempts, Ledger, exclusive
from pipelines.progress import Progress
from pipelines.report import Result, log_run
from pipelines.runner import RayConfig
from pipelines.settings import PreprocessConfig
from pipelines.stage import Row, Stage, is_bug, new_row, refuse, refused
from pipelines.stages import clips, commit, condition, decode, depth, identify, masks, probe, score, shots

__all__ = ["SECTIONS", "PreprocessConfig", "RayConfig", "Result", "Stages", "run", "stages_of"]

logger = logging.getLogger(__name__)

SECTIONS = {"preprocess": PreprocessConfig, "ray": RayConfig, "synthetic": SyntheticConfig}


@dataclass(frozen=True)
class Stages:
    """The whole pipeline, top to bottom: three passes over rows."""

    hash: tuple[Stage, ...] = (identify.STAGE,)
    # on the driver: two files of one content are one video
    split: tuple[Stage, ...] = (probe.STAGE, shots.STAGE, commit.RECORD_VIDEO)
    # on the driver: clips.plan
    clip: tuple[Stage, ...] = (
        decode.STAGE,
        score.STAGE,
        depth.STAGE,
        masks.STAGE,
        condition.STAGE,
        commit.STAGE_SAMPLE,
        commit.RECORD_REFUSAL,
    )
    # on the driver: shards.pack


def stages_of(config: PreprocessConfig) -> Stages:
    """Return the stages with the resources that the configuration gives them."""
    return Stages(clip=tuple(depth.with_gpu(stage, config.depth_num_gpus) for stage in Stages().clip))


class TooManyBugs(Ex4dError):
    """More rows than `max_bugs` ended in an error that nobody raised on purpose."""


def run(
    config: PreprocessConfig,
    ray_config: RayConfig | None = None,
    synthetic_config: SyntheticConfig | None = None,
    runner_name: str = "ray",
    stages: Stages | None = None,
    sources: Sequence[inputs.Source] | None = None,
    retry: Sequence[str] = (),
) -> Result:
    """Return what happened, after bringing the dataset folder `config.output` up to date with the input.

    Run again, it goes on with what is missing. Its `exit_code` is 1, and nothing is committed, where too much was bad.

    Args:
        synthetic_config: the corpus that stands in where `config.input` is None; written to `OUTPUT/source`.
        runner_name: "ray", or "inline": in this process, row after row, where unexpected errors propagate.
        stages: instead of the usual ones.
        sources: instead of all that `config.input` names.
        retry: reasons; refusals of this input and these choices that have one of them are forgotten and tried again.

    Raises:
        ConfigError: a choice is invalid; before any work.
        ContractError: an artifact in the folder is not what it claims to be.
    """
    settings.check(config)
    if sources is None:
        sources = find_sources(config, synthetic_config or SyntheticConfig())
    started = time.time()
    shown = Progress(config.output, config.metrics_port)
    attempts = Attempts(config.output, config.max_attempts)
    with (
        exclusive(config.output),
        shown.serving(),
        runner.runner(runner_name, ray_config or RayConfig(), config.num_workers, attempts) as execute,
    ):
        job = _Job(config, execute, stages or stages_of(config), shown, frozenset(retry), started)
        job.ledger.write_config({"preprocess": config, "ray": ray_config, "synthetic": synthetic_config})
        try:
            job.work(sources)
        except TooManyBugs as error:
            job.problems.append(str(error))
        else:
            job.judge()
        result = job.finish()
        log_run(result, started, job.bugs, {"runner": runner_name, "num_workers": config.num_workers})
    return result


def find_sources(config: PreprocessConfig, synthetic_config: SyntheticConfig) -> list[inputs.Source]:
    """Return every input file; where `config.input` is None, of a synthetic corpus that is written first."""
    if config.input is not None:
        exclude = storage.local_path(config.output) if storage.is_local(config.output) else None
        return inputs.expand(config.input, exclude)
    if not storage.is_local(config.output):
        raise ConfigError("preprocess.input", None, "videos must be named where the output is an object store")
    paths = write_corpus(storage.local_path(config.output) / "source", synthetic_config)
    return inputs.expand([str(path) for path in paths])


@dataclass
class _Job:
    """One run. Filled in order: videos (with their records), clips, then what became of each."""

    config: PreprocessConfig
    execute: runner.Runner
    stages: Stages
    progress: Progress
    retry: frozenset[str]
    started: float
    counts: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)
    staged: list[shards.Staged] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bugs: list[dict[str, Any]] = field(default_factory=list)
    worked: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    retried: dict[str, tuple[str, str]] = field(default_factory=dict)
    committed: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.config.output)
        self.done = self.ledger.names()

    def work(self, sources: Sequence[inputs.Source]) -> None:
        """Bring staging up to date: afterwards every clip has a sample or a refusal."""
        self.counts["videos_in"] = len(sources)
        self._clips(self._plan(self._records(self._unique(sources))))

    def _unique(self, sources: Sequence[inputs.Source]) -> list[Row]:
        """Return a row for each content, under the first of its names."""
        rows = [new_row(source.name, name=source.name, path=source.path) for source in sources if source.is_video]
        for source in sources:
            if not source.is_video:
                self._reject("video", refused(new_row(source.name), "filtered", "input", "not_a_video", "by its name"))
        keep = ("name", "path", "sha256", "size_bytes", "depth_file", "caption")
        first: dict[str, Row] = {}
        for row in sorted(self._run("hash", self.stages.hash, rows, keep), key=lambda row: row["name"]):
            if row["refusal"] is not None:
                self._reject("video", row)
            elif row["sha256"] in first:
                message = f"same content as {first[row['sha256']]['name']}"
                self._reject("video", refused(row, "filtered", "hash", "duplicate", message))
            else:
                first[row["sha256"]] = row
        return list(first.values())

    def _records(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with the `record` of each video, from the ledger or worked out now."""
        made, refusal = settings.video_fingerprints(self.config)
        for row in rows:
            row["artifact"] = f"videos/{row['sha256']}.{made}.json"
            row["refusal_artifact"] = f"videos/{row['sha256']}.{refusal}.json"
        missing = self._missing(rows)
        fresh = {row["key"]: row for row in self._run("split", self.stages.split, missing, ("record",))}
        for row in rows:
            row["record"] = (
                fresh[row["key"]]["record"] if row["key"] in fresh else self.ledger.read(self._finished(row))
            )
            self._note(row["key"], row["record"]["refusal"])
        return list(rows)

    def _plan(self, rows: Sequence[Row]) -> list[Row]:
        """Return a row for each clip; videos without any are rejected."""
        planned: list[Row] = []
        for row in rows:
            record = row["record"]
            if record["refusal"] is not None:
                self._reject("video", row | {"refusal": record["refusal"]})
                continue
            try:
                found = clips.plan(row["sha256"], record, self.config)
            except Filtered as error:
                self._reject("video", refuse(row, "clips", error))
                continue
            self.counts["videos_split"] += 1
            planned += [self._clip_row(row, clip) for clip in found]
        self.counts["clips_planned"] = len(planned)
        return planned

    def _clip_row(self, video: Row, clip: clips.Clip) -> Row:
        facts = {name: video[name] for name in ("name", "sha256", "caption", "depth_file")} | vars(clip)
        made, refusal = settings.clip_fingerprints(self.config, facts)
        return new_row(
            **facts,
            path=video["path"],
            size=video["record"]["info"]["size"],
            seed=int(fingerprint(self.config.seed, clip.key)[:8], 16),
            versions=settings.versions(),
            fingerprint=made,
            artifact=f"clips/{clip.key}.{made}.tar",
            refusal_artifact=f"clips/{clip.key}.{refusal}.json",
        )

    def _clips(self, rows: Sequence[Row]) -> None:
        """Fill `staged` and `rejects`, from the ledger or by working now."""
        missing = self._missing(rows)
        fresh = {row["key"]: row for row in self._run("clip", self.stages.clip, missing, ())}
        for row in rows:
            refusal = fresh[row["key"]]["refusal"] if row["key"] in fresh else self._known_refusal(row)
            self._note(row["key"], refusal)
            if refusal is None:
                split = shards.split_of(row["sha256"], self.config.val_fraction)
                self.staged.append(shards.Staged(row["key"], split, self.ledger.url(row["artifact"])))
            else:
                self._reject("clip", row | {"refusal": refusal})

    def _missing(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that the ledger lacks, after taking those refusals from it that are to be retried."""
        for row in rows:
            self.used |= {row["artifact"], row["refusal_artifact"]}
            name = self._finished(row) if self.retry else ""
            if name == row["refusal_artifact"]:
                reason = self.ledger.refusal(name)["reason"]
                if reason in self.retry:
                    self.ledger.remove(name)
                    self.done.remove(name)
                    self.retried[row["key"]] = (reason, "")
        return [row for row in rows if not self._finished(row)]

    def _note(self, key: str, refusal: dict[str, Any] | None) -> None:
        if key in self.retried:
            self.retried[key] = (self.retried[key][0], "done" if refusal is None else refusal["reason"])

    def _finished(self, row: Row) -> str:
        """Return the name of what the ledger has of a row, "" for nothing."""
        return next((row[name] for name in ("artifact", "refusal_artifact") if row[name] in self.done), "")

    def _known_refusal(self, row: Row) -> dict[str, Any] | None:
        """Return how a clip of the ledger was refused; a sample made under other thresholds is judged by today's."""
        if row["artifact"] not in self.done:
            return self.ledger.read(row["refusal_artifact"])
        if self.config.filters != score.FilterConfig():
            try:
                score.decide(self.ledger.read_scores(row["artifact"], row["key"]), self.config.filters)
            except Filtered as error:
                return refuse(row, score.STAGE.name, error)["refusal"]
        return None

    def _run(self, name: str, stages: Sequence[Stage], rows: Sequence[Row], keep: tuple[str, ...]) -> list[Row]:
        finished: list[Row] = []
        self.worked[name] = len(rows)
        video_s = {row["key"]: _video_s(row) for row in rows}
        with self.progress.watch(name, stages, len(rows)) as count:
            for row in self.execute(stages, rows, self.config, keep):
                finished.append(row)
                count(row, video_s[row["key"]] or _video_s(row))
                if is_bug(row):
                    self.bugs.append({"key": row["key"], **row["refusal"]})
                    if len(self.bugs) > self.config.max_bugs:
                        raise TooManyBugs(f"stopped: {len(self.bugs)} bugs, more than max_bugs {self.config.max_bugs}")
        return finished

    def _reject(self, unit: str, row: Row) -> None:
        refusal = {name: row["refusal"][name] for name in ("fate", "stage", "reason", "message")}
        # Where the input lies on this machine must not change the bytes.
        folder = row.get("path", "").removesuffix(row.get("name", ""))
        message = refusal["message"].replace(folder, "") if folder else refusal["message"]
        if unit == "clip":
            message = f"{row['name']}: {message}"
        message = message.encode("utf-8", "backslashreplace").decode()
        self.rejects.append({**refusal, "key": row["key"], "unit": unit, "message": message})
        self.counts["videos_rejected" if unit == "video" else f"clips_{refusal['fate']}"] += 1

    def judge(self) -> None:
        """Commit the dataset, unless too much was bad."""
        self.counts["samples"] = len(self.staged)
        bad_videos = sum(row["unit"] == "video" and row["fate"] == "bad" for row in self.rejects)
        shares = {
            "videos": (bad_videos, self.counts["videos_in"]),
            "clips": (self.counts["clips_bad"], self.counts["clips_planned"]),
        }
        limit = self.config.max_bad_fraction
        for unit, (bad, total) in shares.items():
            if bad > limit * total:
                self.problems.append(
                    f"{bad} of {total} {unit} are bad, more than preprocess.max_bad_fraction={limit:g}"
                )
        if self.problems:
            return
        shards.pack(self.staged, self.config.output, self._facts(), self.rejects, self.config.shard_size_mb << 20)
        self.committed = True
        self.ledger.sweep(self.started)
        if self.config.keep_staging == "current":
            self.ledger.prune(self.used)
        if self.bugs:
            self.problems.append(f"{len(self.bugs)} rows ended in bugs; their tracebacks are in run.jsonl")

    def _facts(self) -> dict[str, Any]:
        from ex4d.geometry import masks as simulated

        config = self.config
        return {
            "sample": {
                "num_frames": config.num_frames,
                "size": list(config.size),
                "num_masks": config.masks.num_masks,
                "mask_kinds": list(simulated.KINDS),
            },
            "config": settings.dataset_settings(config),
            "versions": settings.versions(),
            "counts": {name: self.counts[name] for name in ("videos_in", "videos_split", "clips_planned")},
        }

    def finish(self) -> Result:
        """Return the Result, its counts complete."""
        names = ("videos_in", "videos_split", "videos_rejected", "clips_planned", "samples")
        counts = {name: self.counts[name] for name in (*names, "clips_filtered", "clips_bad")}
        return Result(
            self.config.output,
            counts,
            self.rejects,
            self.problems,
            self.committed,
            self.progress.tallies,
            self.worked,
            self.retried,
        )


def _video_s(row: Row) -> float:
    """Return how much video a row is about: a clip's length, or that of a video whose record is known; else 0."""
    if "frame_index" in row:
        return len(row["frame_index"]) / row["fps"]
    info = (row.get("record") or {}).get("info")
    return info["duration_s"] if info else 0.0
