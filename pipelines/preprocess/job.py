"""One run of `ex4d preprocess`: do the work that the ledger lacks, count every video and clip, pack the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ex4d import storage
from ex4d.config import fingerprint
from ex4d.data import shards
from ex4d.data.manifest import DATASET
from ex4d.errors import BadSample, ContractError, Filtered
from ex4d.quality import SCORES
from ex4d.redact import without_secrets
from pipelines import inputs
from pipelines.preprocess import clips, duplicates, pairs, settings
from pipelines.preprocess.filters import decide
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages import commit, pair
from pipelines.runtime.ledger import PACKED, Ledger
from pipelines.runtime.passes import Passes
from pipelines.runtime.result import Result
from pipelines.runtime.stage import Row, Stage, is_lasting, new_row, refuse, refused

if TYPE_CHECKING:
    from pipelines.preprocess.recipe import Stages

ARTIFACTS = (
    "artifact",
    "refusal_artifact",
)  # columns: names of a finished and of a rejected row in the ledger


@dataclass
class Job:
    """One run. Filled in order: videos (with their records), clips, then the outcome of each."""

    config: PreprocessConfig
    passes: Passes
    stages: Stages
    retry: frozenset[str]
    counts: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str]] = field(default_factory=list)
    staged: list[shards.Staged] = field(default_factory=list)
    scored: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    retried: dict[str, tuple[str, str]] = field(default_factory=dict)
    committed: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.config.output)

    def work(self, sources: Sequence[inputs.Source]) -> None:
        """Do the work that staging lacks, so that every clip has a sample or is rejected."""
        self.counts["videos_in"] = len(sources)
        planned = self._plan(self._records(self._unique(sources)))
        if self.config.score_only:
            self._score(planned)
        else:
            self._clips(planned)

    def _unique(self, sources: Sequence[inputs.Source]) -> list[Row]:
        """Return one row per distinct content, under the first of its names."""
        rows = [
            new_row(
                source.name,
                spans=[asdict(span) for span in source.spans],
                known_source=self._known_source(source.path),
                **{name: getattr(source, name) for name in ("name", "path", "root", "twin", "namesake")},
            )
            for source in sources
            if source.is_video
        ]
        for source in sources:
            if not source.is_video:
                row = refused(new_row(source.name), source.fate, "input", source.reason, source.message)
                self._reject("video", row)
        keep: tuple[str, ...] = ("name", "path", "twin", "namesake", "spans", "sha256", "size_bytes", "caption", "pair")
        keep += ("depth_file", "depth_place", "known_source", "fetched")
        first: dict[str, Row] = {}
        done = []
        for row in self._run("hash", self.stages.hash, rows, keep):
            fetched, known = row.pop("fetched"), row.pop("known_source")
            if fetched and fetched != known:
                self.ledger.records.add(_source_name(row["path"]), fetched)
            done.append(row)
        for row in sorted(done, key=lambda row: row["name"]):
            if row["refusal"] is not None:
                self._reject("video", row)
                continue
            content = pairs.content(row["sha256"], row["pair"])
            if content in first:
                message = f"same content as {first[content]['name']}"
                self._reject("video", refused(row, "filtered", "hash", "duplicate", message))
            else:
                first[content] = row | {"content": content, "seconds": {}, **pairs.other_of(row)}  # seconds are counted
        return list(first.values())

    def _known_source(self, path: str) -> dict[str, Any] | None:
        return None if storage.is_local(path) else self.ledger.records.get(_source_name(path))

    def _records(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with the `record` of each video, from the ledger or computed now."""
        finished, refusal = settings.video_fingerprints(self.config)
        for row in rows:
            row["artifact"] = f"videos/{row['content']}.{finished}.json"
            row["refusal_artifact"] = f"videos/{row['content']}.{refusal}.json"
        fresh = {}
        for result in self._run("split", self.stages.split, self._missing(rows), ("record", *ARTIFACTS)):
            record = result["record"] or {"refusal": result["refusal"]}  # no record after an unexpected error
            fresh[result["key"]] = record
            self._write(result, record, record)
        for row in rows:
            row["record"] = fresh.get(row["key"]) or self.ledger.records.get(self._finished(row))
            self._note(row["key"], row["record"]["refusal"])
        return list(rows)

    def _plan(self, rows: Sequence[Row]) -> list[Row]:
        """Return a row for each clip; videos without any are rejected."""
        planned: list[Row] = []
        self._group(rows)
        for row in rows:
            record = row["record"]
            if record["refusal"] is not None:
                self._reject("video", row | {"refusal": record["refusal"]})
                continue
            if row["stand_in"]:
                message = f"nearly the same as {row['stand_in']}"
                self._reject("video", refused(row, "filtered", "shots", "near_duplicate", message))
                continue
            try:
                spans = [inputs.Span(**span) for span in row["spans"]]
                found = clips.plan(row["content"], record, self.config, spans)
            except (BadSample, Filtered) as error:
                self._reject("video", refuse(row, "clips", error))
                continue
            self.counts["videos_split"] += 1
            planned += [self._clip_row(row, clip) for clip in found]
        self.counts["clips_planned"] = len(planned)
        return planned

    def _group(self, rows: Sequence[Row]) -> None:
        """Set each row's `source_group`, and `stand_in`: the name of the video that is taken in its place, or ""."""
        groups, best = duplicates.of_videos(rows, self.config.near_duplicates)
        names = {row["sha256"]: row["name"] for row in reversed(rows)}  # of equal clips the first
        for row in rows:
            row["source_group"] = groups.get(row["sha256"], row["sha256"])
            taken = best.get(row["sha256"], row["sha256"])
            row["stand_in"] = "" if taken == row["sha256"] else names[taken]

    def _clip_row(self, video: Row, clip: clips.Clip) -> Row:
        facts = {name: video[name] for name in ("name", "sha256", "source_group", "depth_file")} | vars(clip)
        facts["caption_source"] = "list" if clip.caption else "sidecar" if video["caption"] else "none"
        if clip.caption is None:
            facts["caption"] = video["caption"]
        other: dict[str, Any] = {}
        if video["pair"] is not None:
            facts["pair"] = video["pair"]
            other = pairs.other_of(video) | pair.columns(video["record"], clip, self.config.crop_bars)
        sample, refusal = settings.clip_fingerprints(self.config, facts)
        return new_row(
            **facts,
            **other,
            path=video["path"],
            depth_place=video["depth_place"],
            twin=video["twin"],
            namesake=video["namesake"],
            **clips.in_source(clip, video["record"]),
            size=video["record"]["info"]["size"],
            seed=int(fingerprint(self.config.seed, clip.key)[:8], 16),
            versions=settings.versions(),
            fingerprint=sample,
            artifact=f"clips/{clip.key}.{sample}.tar",
            refusal_artifact=f"clips/{clip.key}.{refusal}.json",
            score_artifact=f"scores/{clip.key}.{settings.score_fingerprint(self.config, facts)}.json",
            known_scores=None,
            video_s=len(clip.frame_index) / clip.fps,
        )

    def _score(self, rows: Sequence[Row]) -> None:
        """Fill `scored` and `rejects`, from the ledger or by measuring."""
        rows = [row | {"artifact": row["score_artifact"]} for row in rows]
        fresh = {}
        for made in self._run("score", self.stages.score, self._missing(rows), ("scores", *ARTIFACTS)):
            fresh[made["key"]] = made
            self._write(made, made["scores"], _with_scores(made))
        for row in rows:
            if row["key"] in fresh:
                refusal, scores = fresh[row["key"]]["refusal"], fresh[row["key"]]["scores"]
            else:
                known = self.ledger.records.get(self._finished(row)) or {}
                refusal, scores = (known, known.get("scores")) if "reason" in known else (None, known)
            self._note(row["key"], refusal)
            if scores is None:
                self._reject("clip", row | {"refusal": refusal})
            else:
                self.scored.append({**row, "scores": scores})

    def _clips(self, rows: Sequence[Row]) -> None:
        """Fill `staged` and `rejects`, from the ledger or by running the stages."""
        missing = self._missing(rows)
        for row in rows:
            self.used.add(row["score_artifact"])
        self.ledger.take({row["score_artifact"]: row["key"] for row in missing if row["score_artifact"] in self.ledger})
        for row in missing:
            row["known_scores"] = self.ledger.records.get(row["score_artifact"])
        passing = [row for row in missing if self._judged(row, row["known_scores"] or row["shot_scores"]) is None]
        fresh = {}
        for made in self._run("clip", self.stages.clip, passing, ("scores", "staged", *ARTIFACTS)):
            fresh[made["key"]] = made["refusal"]
            self._write(made, made["staged"], _with_scores(made))
        for row in rows:
            refusal = fresh[row["key"]] if row["key"] in fresh else self._known_refusal(row)
            self._note(row["key"], refusal)
            if refusal is None:
                split = shards.split_of(row["source_group"], self.config.val_fraction)
                record: Any = self.ledger.records.get(row["artifact"])
                url = self.ledger.url(row["artifact"])
                self.staged.append(shards.Staged(row["key"], split, url, record["size"], record["sha256"]))
            else:
                self._reject("clip", row | {"refusal": refusal})

    def _missing(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that the ledger lacks, after removing the rejections that are to be retried."""
        self._load(rows)
        for row in rows:
            self.used |= {row["artifact"], row["refusal_artifact"]}
            name = self._finished(row) if self.retry else ""
            if name == row["refusal_artifact"]:
                body: Any = self.ledger.records.get(name)
                reason = (body["refusal"] if name.startswith("videos/") else body)["reason"]
                if reason in self.retry:
                    self.ledger.remove(name)
                    self.retried[row["key"]] = (reason, "")
        return [row for row in rows if not self._finished(row)]

    def _load(self, rows: Sequence[Row]) -> None:
        """Read the ledger's records of these rows that no part holds; damaged ones count as missing."""
        todo = rows
        while damaged := self.ledger.take({name: row["key"] for row in todo if (name := self._finished(row))}):
            todo = [row for row in todo if damaged & {row[name] for name in ARTIFACTS}]

    def _write(self, row: Row, made: Any, refused: Any) -> None:
        """Record the outcome of a row: its result, or its permanent rejection."""
        if row["refusal"] is None and row["artifact"].endswith(".tar"):
            self.ledger.finished(row["artifact"], made)
        elif row["refusal"] is None:
            self.ledger.records.add(row["artifact"], made)
        elif is_lasting(row):
            self.ledger.records.add(row["refusal_artifact"], refused)

    def _note(self, key: str, refusal: dict[str, Any] | None) -> None:
        if key in self.retried:
            self.retried[key] = (self.retried[key][0], "done" if refusal is None else refusal["reason"])

    def _finished(self, row: Row) -> str:
        """Return the name of the ledger's record of a row, "" for none."""
        return next((row[name] for name in ARTIFACTS if row[name] in self.ledger), "")

    def _known_refusal(self, row: Row) -> dict[str, Any] | None:
        """Return the rejection of a clip in the ledger; earlier samples are checked against today's thresholds."""
        name = self._finished(row)
        if name == row["refusal_artifact"]:
            return self.ledger.records.get(name)
        record = self.ledger.records.get(name) if name else None
        known = record["scores"] if record else row["known_scores"]
        return self._judged(row, known or row["shot_scores"])

    def _judged(self, row: Row, scores: dict[str, float]) -> dict[str, Any] | None:
        """Return the rejection of a clip with these scores under today's thresholds."""
        try:
            decide(scores, self.config.filters)
        except Filtered as error:
            return refuse(row, SCORES[error.reason].stage, error)["refusal"]
        return None

    def _run(self, name: str, stages: Sequence[Stage], rows: Sequence[Row], keep: tuple[str, ...]) -> Iterator[Row]:
        return self.passes.run(name, stages, rows, self.config, keep)

    def _reject(self, unit: str, row: Row) -> None:
        refusal = {name: row["refusal"][name] for name in ("fate", "stage", "reason", "message")}
        # The input's path on this machine must not change the bytes.
        folder = row.get("path", "").removesuffix(row.get("name", ""))
        message = refusal["message"].replace(folder, "") if folder else refusal["message"]
        if unit == "clip":
            message = f"{row['name']}: {message}"
        message = without_secrets(message.encode("utf-8", "backslashreplace").decode())
        self.rejects.append({**refusal, "key": row["key"], "unit": unit, "message": message})
        self.counts["videos_rejected" if unit == "video" else f"clips_{refusal['fate']}"] += 1

    def judge(self) -> None:
        """Commit the dataset, unless too many rows are bad."""
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
        if not self.staged and not self.scored:
            self.problems.append("none of the clips is left, so nothing was written; the table shows why")
        if self.problems or self.config.score_only:
            return
        facts = settings.facts(self.config, self.counts)
        size = self.config.shard_size_mb << 20
        tables = self.ledger.url(PACKED)
        try:
            shards.pack(self.staged, self.config.output, facts, self.rejects, size, tables=tables, build=self._build)
        except shards.DamagedSamples as error:
            for key in error.keys:
                self.ledger.set_aside(
                    next(item.url for item in self.staged if item.key == key).partition("/staging/")[2]
                )
            self.problems.append(f"{error}; they were set aside; run the same command again to rebuild them")
            return
        self.committed = True
        self.ledger.sweep()
        if self.config.keep_staging == "current":
            self.ledger.prune(self.used)
        self.problems += self.passes.problems()

    def _build(
        self, plans: Iterable[Mapping[str, Any]], output: str, tables: str, work: str | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the facts of each shard; they are built by the workers. Raises ContractError."""
        rows = [new_row(plan["name"], plan=plan, output=output, tables=tables, work=work) for plan in plans]
        stages = (commit.BUILD_SHARD,)
        with self.passes.progress.watch("pack", stages, len(rows)) as count:
            for row in self.passes.execute(stages, rows, self.config, ("built",)) if rows else ():
                count(row, 0.0)
                if row["refusal"] is not None:
                    raise ContractError(f"{row['key']} could not be built: {row['refusal']['message']}")
                yield row["built"]

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
            self.passes.progress.tallies,
            self.passes.worked,
            self.retried,
            len(self.scored) if self.config.score_only else None,
            stands=not self.committed and storage.exists(storage.join(self.config.output, DATASET)),
        )


def _with_scores(row: Row) -> dict[str, Any] | None:
    """Return a clip's rejection, with its scores if they were measured before."""
    return row["refusal"] and row["refusal"] | ({} if row["scores"] is None else {"scores": row["scores"]})


def _source_name(url: str) -> str:
    """Return the name of the ledger's record of a remote file and its sidecars."""
    return f"sources/{fingerprint(url)}"
