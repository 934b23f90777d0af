"""One run of `ex4d preprocess`: do the work that the ledger lacks, count every video and clip, pack the samples."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import storage
from ex4d.config import fingerprint
from ex4d.data import shards
from ex4d.data.manifest import DATASET
from pipelines import inputs
from pipelines.preprocess import duplicates, fingerprints, pairs, units
from pipelines.preprocess.outcomes import Outcomes
from pipelines.preprocess.packing import Packing
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.tables import Clip, Tables, pack_rows, unpack_rows
from pipelines.preprocess.units import ARTIFACTS
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.passes import Passes
from pipelines.runtime.result import Result
from pipelines.runtime.stage import Row, Stage, Track, is_lasting, new_row, refused

if TYPE_CHECKING:
    from pipelines.preprocess.recipe import Stages

CHUNK = 1000  # videos whose records are looked up at a time
# Columns that the driver keeps of a finished row.
VIDEO_COLUMNS = (
    *("name", "path", "twin", "namesake", "spans", "sha256", "size_bytes", "caption", "pair"),
    *("depth_file", "depth_place", "known_source", "fetched"),
)
CLIP_COLUMNS = ("scores", "staged", "name", "path", "source_group", "frame_index", *ARTIFACTS)
SHOTS_PASS = "split"  # name of the pass in run.jsonl and in measured results, like `videos_split` in dataset.json


@dataclass
class Job:
    """One run. State is filled in this order: videos, decisions across videos, clips, then the outcome of each clip."""

    config: PreprocessConfig
    passes: Passes
    stages: Stages
    retry: frozenset[str]
    problems: list[str] = field(default_factory=list)
    committed: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.config.output)
        self.tables = Tables(self.ledger.database)
        self.outcomes = Outcomes(self.ledger, self.tables, self.config.score_only, self.retry)
        self.counts = self.outcomes.counts
        self.digests = fingerprints.video_fingerprints(self.config)

    def work(self, sources: inputs.AnySources) -> None:
        """Do the work that staging lacks, so that every clip has a sample or is rejected."""
        self.counts["videos_in"] = len(sources)
        self._stream(sources)
        # From here on all videos are known, so duplicates can be decided.
        for row, first in self.tables.duplicates():
            self.outcomes.reject("video", refused(row, "filtered", "hash", "duplicate", f"same content as {first}"))
        self._find_shots()
        self._decide()
        self._clips(self._plan())

    # ------------------------------------------------------------ videos

    def _stream(self, sources: inputs.AnySources) -> None:
        """Hash every video; find the shots of new videos and make their clips while others are still being hashed.

        Each video is first assumed to be unique. If a later decision across videos changes a clip's name, the clip is
        made again. So what is made here goes only into the ledger, and is counted once all videos are known.
        """
        last, clips = self._last()
        tracks = (
            Track("hash", self.stages.hash, VIDEO_COLUMNS),
            Track(SHOTS_PASS, self.stages.find_shots, ("record", "clips", "name", *ARTIFACTS)),
            Track(last, clips, CLIP_COLUMNS),
        )
        later: deque[tuple[str, Row]] = deque()
        rows = self._sources(sources)
        for name, row in self.passes.flow(tracks, rows, self.config, sources.num_videos, later):
            if name == "hash":
                video = self._hashed(row)
                if video is not None:
                    later.append((SHOTS_PASS, video))
            elif name == SHOTS_PASS:
                self.outcomes.write_video(row)
                later.extend((last, clip) for clip in row["clips"] or () if not units.finished(self.ledger, clip))
            else:
                self.outcomes.write_clip(row)
            if row["refusal"] is not None and name != "hash":
                self.outcomes.failed(row, is_guess=name == last)

    def _hashed(self, row: Row) -> Row | None:
        """Add a video to the tables, or reject it; return it if its shots have to be found."""
        fetched, known = row.pop("fetched"), row.pop("known_source")
        if fetched and fetched != known:
            self.ledger.records.add(_source_name(row["path"]), fetched)
        if row["refusal"] is not None:
            self.outcomes.reject("video", row)
            return None
        content = pairs.content(row["sha256"], row["pair"])
        row |= {"content": content, "seconds": {}}  # the seconds of this pass have been counted
        names = {name: f"videos/{content}.{digest}.json" for name, digest in zip(ARTIFACTS, self.digests, strict=True)}
        video = row | names | pairs.other_of(row)
        is_new = self.tables.add_video(video) and not units.finished(self.ledger, video)
        return video if is_new else None

    def _sources(self, sources: inputs.AnySources) -> Iterator[Row]:
        """Yield the rows of the videos; reject sources that are not videos."""
        for source in sources:
            if not source.is_video:
                row = refused(new_row(source.name), source.fate, "input", source.reason, source.message)
                self.outcomes.reject("video", row)
                continue
            yield new_row(
                source.name,
                spans=[span._asdict() for span in source.spans],
                known_source=self.ledger.records.get(_source_name(source.path)),
                **{name: getattr(source, name) for name in ("name", "path", "root", "twin", "namesake")},
            )

    def _find_shots(self) -> None:
        """Find the shots of videos that still lack a record: those to be retried and those whose record is damaged."""
        rows, number = self._without_record(), 0
        while some := list(islice(rows, CHUNK)):
            number += self._add_work("video", pack_rows(some), len(some))
        keep = ("record", "content", "path", "name", *ARTIFACTS)
        for row in self.passes.run(SHOTS_PASS, self.stages.find_shots, self.tables.work(), self.config, keep, number):
            self.outcomes.write_video(row)
            self.outcomes.note(row)
            if row["refusal"] is not None and not is_lasting(row):
                self.outcomes.reject("video", row)
                self.tables.drop_video(row["content"])
        self.tables.clear_work()

    def _add_work(self, unit: str, packed: bytes, number: int) -> int:
        """Add rows to the next pass, except those that already failed in this run; return the number added."""
        if self.tables.count("tried"):
            rows = [row for row in unpack_rows(packed) if not self.outcomes.was_tried(unit, row)]
            packed, number = pack_rows(rows), len(rows)
        self.tables.add_work(packed)
        return number

    def _without_record(self) -> Iterator[Row]:
        """Yield the videos without a record, after deleting the rejections that are to be retried."""
        known = len(self.ledger.records) and self.digests[: 1 if self.retry else 2]
        videos = self.tables.without_record(known) if known else self.tables.videos()
        while rows := list(islice(videos, CHUNK)):
            units.load(self.ledger, rows)
            for row in rows:
                name = units.finished(self.ledger, row)
                if self.retry and name == row["refusal_artifact"] and not self.tables.tried(name, row["name"]):
                    reason = (self.ledger.get(name) or {})["refusal"]["reason"]
                    if reason in self.retry:
                        self.ledger.remove(name)
                        self.outcomes.retried[row["key"]] = (reason, "")
                        name = ""
                if not name:
                    yield row

    def _decide(self) -> None:
        """Find near duplicates across all videos: they share a split, or the best one replaces the others."""
        identity = duplicates.Identity()
        for sha256, other_sha256, facts in self.tables.identities(self.digests[0]):
            hashes, size, duration_s, other_hashes = json.loads(facts)
            other = (other_sha256, other_hashes) if other_sha256 else None
            identity.add(sha256, hashes, size, duration_s, other)
        self.tables.decide(*identity.decide(self.config.near_duplicates))

    # ------------------------------------------------------------ clips

    def _plan(self) -> int:
        """Plan the clips of all units; return the number of clips to be made."""
        number = 0
        prefixes, keep = self.tables.units(), ("planned", "todo")
        for row in self.passes.must("plan", units.PLAN, self._units(prefixes), self.config, keep, len(prefixes)):
            self._take(row["planned"])
            number += self._add_work("clip", row["todo"].tobytes(), row["planned"]["num_todo"])
        return number

    def _units(self, prefixes: Sequence[str]) -> Iterator[Row]:
        retry = sorted(self.retry)
        for prefix in prefixes:
            records, sizes = self.ledger.part(prefix)
            arrays = {"videos": self.tables.unit(prefix), "records": records.encode()}
            bodies = {name: np.frombuffer(data, np.uint8) for name, data in arrays.items()}
            tried = self.tables.tried_in(prefix) if retry else []
            yield new_row(f"unit {prefix}", **bodies, sizes=sizes, retry=retry, tried=tried)

    def _take(self, planned: Mapping[str, Any]) -> None:
        """Apply the plan of a unit: count what is finished and what is rejected."""
        self.counts.update(planned["counts"])
        self.outcomes.add_rejects(planned["rejects"])
        self.tables.add_staged(planned["staged"])
        for row in planned["scored"]:
            self.tables.add_scored(row)
        self.outcomes.retried.update({key: (reason, "") for key, reason in planned["retried"].items()})
        self.ledger.apply(planned["changes"])
        self.tables.add_superseded(planned["superseded"])

    def _last(self) -> tuple[str, tuple[Stage, ...]]:
        """Return the name and stages of the last pass."""
        return ("score", self.stages.score) if self.config.score_only else ("clip", self.stages.clip)

    def _clips(self, number: int) -> None:
        """Make the missing clips, or measure the missing scores."""
        name, stages = self._last()
        for row in self.passes.run(name, stages, self.tables.work(), self.config, CLIP_COLUMNS, number):
            self.outcomes.write_clip(row)
            self.outcomes.note(row)
            is_done = row["scores"] is not None if self.config.score_only else row["refusal"] is None
            if not is_done:
                self.outcomes.reject("clip", row)
            elif self.config.score_only:
                self.tables.add_scored(units.scored(row, row["scores"]))
            else:
                split = shards.split_of(row["source_group"], self.config.val_fraction)
                staged = row["staged"]
                self.tables.add_staged([Clip(split, row["key"], row["artifact"], staged["size"], staged["sha256"])])

    # ------------------------------------------------------------ dataset

    def judge(self) -> None:
        """Commit the dataset, unless too many rows are bad."""
        self.passes.forget_bugs(self.outcomes.guessed_bugs)
        self.counts["samples"] = self.tables.count("staged")
        shares = {
            "videos": (self.counts["videos_bad"], self.counts["videos_in"]),
            "clips": (self.counts["clips_bad"], self.counts["clips_planned"]),
        }
        limit = self.config.max_bad_fraction
        for unit, (bad, total) in shares.items():
            if bad > limit * total:
                self.problems.append(
                    f"{bad} of {total} {unit} are bad, more than preprocess.max_bad_fraction={limit:g}"
                )
        if not self.counts["samples"] and not self.tables.count("scored"):
            self.problems.append("none of the clips is left, so nothing was written; the table shows why")
        if self.problems or self.config.score_only:
            return
        try:
            Packing(self.config, self.ledger, self.tables, self.outcomes.rejects, self.passes).pack(self.counts)
        except shards.DamagedSamples as error:
            for key in error.keys:
                self.ledger.set_aside(self.tables.artifact(key))
            self.problems.append(f"{error}; they were set aside; run the same command again to rebuild them")
            return
        self.committed = True
        self.ledger.sweep()
        self.ledger.prune(self.tables.superseded())
        self.problems += self.passes.problems()

    def finish(self) -> Result:
        """Return the Result with the final counts."""
        names = ("videos_in", "videos_split", "videos_rejected", "clips_planned", "samples")
        counts = {name: self.counts[name] for name in (*names, "clips_filtered", "clips_bad")}
        return Result(
            self.config.output,
            counts,
            self.outcomes.rejects,
            self.problems,
            self.committed,
            self.passes.progress.tallies,
            self.passes.worked,
            self.outcomes.retried,
            self.tables.count("scored") if self.config.score_only else None,
            stands=not self.committed and storage.exists(storage.join(self.config.output, DATASET)),
        )


def _source_name(url: str) -> str:
    """Return the name of the ledger's record of a video's files: their hashes, and tags that change with the files."""
    return f"sources/{fingerprint(url)}"
