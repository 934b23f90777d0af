"""`ex4d evaluate`: how good an adapter is, over ranges of camera paths, on scenes whose truth is known or on videos.

One row is one clip along one path. Its figures, features and videos are staged whole, named by all that they depend
on, so a run that was killed goes on with what is missing. The last to be written is evaluation.json.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ex4d import hub, storage
from ex4d.config import fingerprint, installed_versions, to_dict
from ex4d.data.tar import read_sample
from ex4d.data.tensors import decode_tensors
from ex4d.depth import DepthRequest, sidecar, weight_folders
from ex4d.errors import BadSample, ConfigError
from ex4d.evaluate import summary
from ex4d.evaluate.summary import Range
from ex4d.generate import GenerateConfig
from ex4d.geometry import camera_path, trajectory
from ex4d.models import weights
from ex4d.reconstruct import check_choices
from ex4d.synthetic import SyntheticConfig
from ex4d.viewer import page
from pipelines import inputs, runner
from pipelines.evaluate_report import Report, View
from pipelines.ledger import Attempts, Ledger, exclusive
from pipelines.progress import Progress
from pipelines.report import Result, log_run
from pipelines.runner import RayConfig
from pipelines.stage import Row, is_bug, new_row
from pipelines.stages import evaluate as stages
from pipelines.stages.evaluate import CODEC, METHODS, OTHER, Evaluation

CODE = 1  # raised when stages change what they write, so that older staging is not taken
PACKAGES = ("ex4d-platform", "torch", "diffusers", "transformers", "peft", "numpy", "opencv-python-headless", "av")
RANGE = re.compile(r"[a-z0-9_-]{1,32}")
RANGES = {"small": ("orbit", 30.0), "large": ("orbit", 60.0), "extreme": ("orbit", 90.0), "full": ("full", 90.0)}
SHOWN = 4  # clips a range on the page; the videos of all lie beside it


@dataclass(frozen=True)
class EvaluateConfig:
    """How an adapter is looked at; the section `evaluate` of a config file.

    Args:
        adapter: folder written by `ex4d train`, its file, or a released ex4d.ckpt.
        base: base model in place of the adapter's own.
        output: folder or URL of the results.
        videos: a file, folder, glob or list of videos; None: procedural scenes, whose true novel views are known.
        num_scenes: how many scenes. corpus_seed: of their corpus; no training corpus may use it.
        ranges: {name: (trajectory, degrees)}; by default the paper's four.
        methods: what is compared, keys of stages.evaluate.METHODS; None: all but `other`, and `codec` where the truth
            is known.
        depth, depth_path, fov_deg, profile: of videos, as in `ex4d generate`.
        num_frames, size: None: what the adapter was trained at.
        image_features, video_features: a DINOv2 and a VideoMAE for Fréchet distances, folders or hub-id[@revision];
            None measures none.
        seed: of the sampler's noise.
        num_workers: CPU workers of a Ray that is started here; num_gpus: share of a GPU for each worker; 0: on the CPU.
        max_bad_fraction: share of views that may fail; above it the run fails.
        max_bugs: rows that may end in an unexpected error before the run stops.
    """

    adapter: str = "out/run/adapter"
    base: str | None = None
    output: str = "out/evaluation"
    videos: str | None = None
    num_scenes: int = 16
    corpus_seed: int = 900_000
    ranges: dict[str, tuple[str, float]] = field(default_factory=lambda: dict(RANGES))
    methods: tuple[str, ...] | None = None
    depth: str = "sidecar"
    depth_path: str | None = None
    fov_deg: float = 54.0
    profile: str | None = None
    num_frames: int | None = None
    size: tuple[int, int] | None = None
    image_features: str | None = None
    video_features: str | None = None
    seed: int = 0
    num_workers: int = 2
    num_gpus: float = 0.0
    max_bad_fraction: float = 0.1
    max_bugs: int = 10

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ConfigError(f"evaluate.{name}", getattr(self, name), allowed)

        unknown = set(self.methods or ()) - set(METHODS)
        need(not unknown and self.methods != (), "methods", f"some of {', '.join(METHODS)}")
        need(self.videos is None or CODEC not in (self.methods or ()), "methods", f"{CODEC} needs the truth of scenes")
        need(self.num_scenes >= 1, "num_scenes", "at least 1")
        named = bool(self.ranges) and all(RANGE.fullmatch(name) for name in self.ranges)
        need(named, "ranges", f"names of {RANGE.pattern}, each with [trajectory, degrees]")
        need(self.num_workers >= 1, "num_workers", "at least 1")
        need(self.num_gpus >= 0, "num_gpus", "0 for the CPU, else a share of a GPU or a whole number")
        need(0 <= self.max_bad_fraction <= 1, "max_bad_fraction", "0 to 1")
        need(self.max_bugs >= 0, "max_bugs", "at least 0")
        for path, angle_deg in self.ranges.values():
            camera_path.check_name(path)
            if path in trajectory.TRAJECTORIES:
                trajectory.build(path, 2, angle_deg, 1.0)  # refuses an angle that it cannot take
            else:
                need(self.videos is not None, "ranges", "a file of poses only with evaluate.videos")

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods, in the order of METHODS."""
        usual = [name for name in METHODS if name != OTHER and (name != CODEC or self.videos is None)]
        return tuple(name for name in METHODS if name in (self.methods or usual))


SECTIONS = {
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "synthetic": SyntheticConfig,
    "ray": RayConfig,
}


def run(
    config: EvaluateConfig,
    sampler: GenerateConfig,
    world: SyntheticConfig | None = None,
    ray_config: RayConfig | None = None,
    runner_name: str = "ray",
) -> Report:
    """Return how good an adapter is, after making what is missing of it in `config.output`.

    Args:
        world: what scenes are made like; size and length are the adapter's. Not used for videos.
        runner_name: "ray", or "inline": in this process, row after row, where unexpected errors propagate.

    Raises:
        ConfigError: a choice is invalid; before any work.
        ContractError: the adapter's file is damaged.
    """
    job = _Job(config, sampler, world or SyntheticConfig())
    started, attempts = time.time(), Attempts(config.output, 3)
    chosen = runner_name if job.missing() else "inline"  # no Ray need start for nothing
    with (
        exclusive(config.output),
        runner.runner(chosen, ray_config or RayConfig(), config.num_workers, attempts) as execute,
    ):
        job.work(execute)
        report = job.finish()
        log_run(report.result, started, job.bugs, {"runner": runner_name, "num_workers": config.num_workers})
    return report


class _Job:
    """One run: `cases` and `rows` are planned at once, `rejects` and `problems` filled by the work."""

    def __init__(self, config: EvaluateConfig, sampler: GenerateConfig, world: SyntheticConfig):
        self.config = config
        self.metadata = weights.read_metadata(config.adapter)
        self.size = config.size or self.metadata.size
        self.num_frames = config.num_frames or self.metadata.num_frames
        released = self.metadata.mask_range == "released"
        self.choices = {
            **{name: getattr(config, name) for name in ("depth", "depth_path", "fov_deg")},
            **{"size": self.size, "num_frames": self.num_frames, "seed": config.seed},
            "profile": config.profile or ("released" if released else "default"),
        }
        check_choices(**self.choices)
        scenes = config.videos is None
        if scenes and config.corpus_seed == world.seed:
            raise ConfigError("evaluate.corpus_seed", config.corpus_seed, "must differ from synthetic.seed")
        changed = {"seed": config.corpus_seed, "num_frames": self.num_frames, "size": self.size, "num_videos": 1}
        self.world = SyntheticConfig(**{**asdict(world), **changed}) if scenes else None
        self.context = Evaluation(
            output=config.output,
            adapter=config.adapter,
            base=config.base,
            sampler=sampler.for_adapter(self.metadata),
            seed=config.seed,
            methods=config.compared,
            world=self.world,
            reconstruct=self.choices,
            image_features=config.image_features,
            video_features=config.video_features,
            mask_range=self.metadata.mask_range,
            device="cuda" if config.num_gpus else "cpu",
        )
        self.versions = installed_versions(PACKAGES)
        self.adapter_sha256 = storage.sha256(weights.adapter_file(config.adapter))
        self.ledger = Ledger(config.output)
        self.progress = Progress(config.output)
        self.rejects: list[dict[str, str]] = []
        self.problems: list[str] = []
        self.bugs: list[dict[str, Any]] = []
        self.worked = 0
        self.rows = list(self._rows())

    def _rows(self) -> Iterator[Row]:
        """Yield a row for every case along every path, and fill `rejects` with the videos that cannot be one."""
        cases = list(self._scenes() if self.config.videos is None else self._videos())
        if OTHER in self.config.compared and len(cases) < 2:
            raise ConfigError("evaluate.methods", OTHER, "needs two clips or more")
        alike = {
            **{"code": CODE, "versions": self.versions, "adapter": self.adapter_sha256},
            "base": [self.config.base, self.metadata.base_fingerprint],
            **{"sampler": self.context.sampler, "seed": self.config.seed, "device": self.context.device},
            **{"methods": self.config.compared, "world": self.world, "reconstruct": self.choices},
            "features": [self._features(), self._depth()],
        }
        plain = {name: to_dict(part) if hasattr(part, "__dataclass_fields__") else part for name, part in alike.items()}
        for index, case in enumerate(cases):
            other = cases[(index + 1) % len(cases)]
            for name, (path, angle_deg) in self.config.ranges.items():
                along = {"trajectory": path, "angle_deg": angle_deg}
                seen = [other["content"]] if OTHER in self.config.compared else []
                made = fingerprint(plain, along, case["content"], seen)
                key = f"{case['name']}-{name}"
                yield new_row(key, case=case, other=other, path=along, range=name, artifact=f"clips/{key}.{made}.tar")

    def _features(self) -> list[str]:
        """Return what stands for the feature networks by their content."""
        from ex4d.models import features

        chosen = [(self.config.image_features, False), (self.config.video_features, True)]
        return [hub.fingerprint([features.folder_of(given, kind)]) for given, kind in chosen if given is not None]

    def _depth(self) -> str:
        """Return what stands for the weights of a depth network by their content."""
        if self.config.videos is None:
            return ""
        folders = weight_folders(self.config.depth, self.config.depth_path)
        return hub.fingerprint(folders) if folders else ""

    def _scenes(self) -> Iterator[dict[str, Any]]:
        for index in range(self.config.num_scenes):
            yield {"name": f"scene-{index:05d}", "index": index, "content": str(index)}

    def _videos(self) -> Iterator[dict[str, Any]]:
        given = str(self.config.videos)
        try:
            sources = inputs.expand(given, exclude=self.config.output)
        except ConfigError as error:
            raise ConfigError("evaluate.videos", error.value, error.allowed) from None
        known = set()
        for source in sources:
            if source.reason == "not_a_video":
                continue
            try:
                if source.reason:
                    raise BadSample(source.reason, source.message)
                case = self._video(source.path, source.name)
            except BadSample as error:
                self._reject(source.name, source.name, "plan", error.reason, error.message)
                continue
            if case["name"] not in known:  # the same bytes under two names
                known.add(case["name"])
                yield case

    def _video(self, path: str, name: str) -> dict[str, Any]:
        if not storage.is_local(path):
            raise BadSample("not_local", "evaluate reads videos on this machine")
        try:
            content = [storage.sha256(path)]
            if self.config.depth == "sidecar":
                request = DepthRequest(video_path=path, depth_path=self.config.depth_path)
                content.append(storage.sha256(sidecar.find(request)))
        except OSError as error:
            raise BadSample("unreadable", error.strerror or type(error).__name__) from None
        return {"name": content[0][:16], "path": path, "video": name, "content": content}

    def _reject(self, key: str, name: str, stage: str, reason: str, message: str) -> None:
        self.rejects.append({"key": key, "name": name, "stage": stage, "reason": reason, "message": message})

    def missing(self) -> list[Row]:
        """Return the rows whose artifacts are not there."""
        done = self.ledger.names()
        return [row for row in self.rows if row["artifact"] not in done]

    def work(self, execute: runner.Runner) -> None:
        """Bring staging up to date: afterwards every row has its artifact or a rejection."""
        missing = self.missing()
        self.worked = len(missing)
        names_of = {row["key"]: row["case"].get("video", row["key"]) for row in missing}
        chosen = stages.stages(self.config.num_gpus)
        with self.progress.watch("views", chosen, len(missing)) as count:
            for row in execute(chosen, missing, self.context, ()):
                count(row, 0.0)
                refusal = row["refusal"]
                if refusal is None:
                    continue
                names = (row["key"], names_of[row["key"]])
                self._reject(*names, refusal["stage"], refusal["reason"], refusal["message"])
                if is_bug(row):
                    self.bugs.append({"key": row["key"], **refusal})
                    if len(self.bugs) > self.config.max_bugs:
                        self.problems.append(f"stopped: {len(self.bugs)} bugs, more than evaluate.max_bugs")
                        break

    def finish(self) -> Report:
        """Return the Report, after writing videos, page and evaluation.json, unless too much was bad."""
        refused = {row["key"] for row in self.rejects}
        there = [row for row in self.rows if row["key"] not in refused]
        planned = len(self.rows) + sum(row["stage"] == "plan" for row in self.rejects)
        if not self.problems and len(self.rejects) > self.config.max_bad_fraction * planned:
            limit = f"evaluate.max_bad_fraction={self.config.max_bad_fraction:g}"
            self.problems.append(f"{len(self.rejects)} of {planned} views are bad, more than {limit}")
        if not there:
            self.problems.append("no view is left")
        done = not self.problems
        if self.bugs:
            self.problems.append(f"{len(self.bugs)} views ended in bugs; their tracebacks are in run.jsonl")
        result = Result(
            self.config.output,
            {"views_planned": planned, "views": planned - len(self.rejects), "views_bad": len(self.rejects)},
            self.rejects,
            self.problems,
            committed=done,
            stages=self.progress.tallies,
            worked={"views": self.worked},
            report=storage.join(self.config.output, "report", "index.html") if done else "",
        )
        return self._write(result, there) if done else Report(result, {}, {}, [], self._facts())

    def _write(self, result: Result, rows: list[Row]) -> Report:
        """Return the Report after writing all that people look at; evaluation.json comes last."""
        ranges = {row["range"]: Range() for row in rows}
        clips: list[dict[str, Any]] = []
        shown: list[View] = []
        for row in rows:
            found = ranges[row["range"]]
            members = read_sample(storage.read_bytes(self.ledger.url(row["artifact"])), row["key"])
            facts = json.loads(members["json"])
            features = members.get("features.safetensors")
            found.add(facts["figures"], decode_tensors(features) if features else {})
            videos = {name.removesuffix(".mp4"): data for name, data in members.items() if name.endswith(".mp4")}
            for name, data in videos.items():
                storage.write_bytes(storage.join(self.config.output, "videos", f"{row['key']}.{name}.mp4"), data)
            of = {} if self.world else {"video": row["case"]["video"]}
            clips.append({"key": row["key"], "range": row["range"], **of, **facts})
            if sum(view.range == row["range"] for view in shown) < SHOWN:
                shown.append(View(row["key"], row["range"], videos))
        labels = {name: METHODS[name] for name in self.config.compared}
        tables = {name: summary.table(found, labels) for name, found in ranges.items()}
        report = Report(result, tables, ranges, shown, self._facts())
        subject = "held-out scenes, whose true novel views are known" if self.world else "videos of one's own"
        summary_lines = (f"{report.facts['adapter']} on {subject}. All videos lie in {self.config.output}/videos.",)
        page.write(report.page("How good the adapter is", summary_lines, videos="../videos"), result.report)
        record = {
            "facts": report.facts,
            "config": to_dict(self.config),
            "ranges": {
                name: {"columns": columns, "rows": lines, "distances": ranges[name].distances()}
                for name, (columns, lines) in tables.items()
            },
            "clips": clips,
            "rejects": self.rejects,
        }
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        storage.write_bytes(storage.join(self.config.output, "evaluation.json"), text.encode())
        return report

    def _facts(self) -> dict[str, Any]:
        return {
            "adapter": hub.name_of(self.config.adapter),
            "adapter sha256": self.adapter_sha256,
            "adapter step": self.metadata.step,
            "base": self.config.base or self.metadata.base,
            "trained on": self.metadata.dataset_fingerprint,
            "frames": f"{self.num_frames} × {self.size[0]} × {self.size[1]}",
            "sampler": ", ".join(f"{name}={value}" for name, value in to_dict(self.context.sampler).items()),
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        }
