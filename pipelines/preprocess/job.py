"""One run of `ex4d preprocess`: do the work that the ledger lacks, count every video and clip, pack the samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import storage
from ex4d.data import shards
from ex4d.data.manifest import DATASET
from pipelines import inputs
from pipelines.preprocess import compare, fingerprints, unchanged, units
from pipelines.preprocess.identity import Collector, Identity
from pipelines.preprocess.outcomes import Outcomes
from pipelines.preprocess.packing import Packing
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.tables import Clip, Tables, digits_for, pack_rows, unpack_rows
from pipelines.preprocess.unchanged import VIDEO_COLUMNS
from pipelines.preprocess.units import ARTIFACTS
from pipelines.runtime.blocks import Blocks, Sorter, unpack
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.parts import READ
from pipelines.runtime.passes import Passes
from pipelines.runtime.result import Result
from pipelines.runtime.stage import Row, Stage, Track, is_lasting, new_row, refused

if TYPE_CHECKING:
    from pipelines.preprocess.recipe import Stages

CLIP_COLUMNS = ("scores", "staged", "name", "path", "source_group", "frame_index", *ARTIFACTS)
HASH_PASS = "hash"
SHOTS_PASS = "split"  # name of the pass in run.jsonl and in measured results, like `videos_split` in dataset.json


@dataclass
class Job:
    """One run. State is filled in this order: videos, decisions across videos, clips, then the outcome of each clip."""

    config: PreprocessConfig
    passes: Passes
    stages: Stages
    sources: inputs.AnySources
    retry: frozenset[str] = frozenset()
    problems: list[str] = field(default_factory=list)
    committed: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.config.output, read=self._read)
        self.ledger.digits = digits_for(self.sources.num_videos, sum(self.ledger.parts.values()))
        self.tables = Tables(self.ledger.database, self.ledger.digits)
        self.identity = Identity(self.ledger.database)
        self.digests = fingerprints.video_fingerprints(self.config)
        self.outcomes = Outcomes(self.ledger, self.tables, self.config.score_only, self.retry)
        self.counts = self.outcomes.counts

    def work(self) -> None:
        """Do the work that staging lacks, so that every clip has a sample or is rejected."""
        self.counts["videos_in"] = len(self.sources)
        self._stream(*self._rows_to_hash())
        # From here on all videos are known, so duplicates can be decided.
        self.ledger.records.drop_hashes()
        self.tables.drop_hashes()
        self._find_shots(self._compare())
        self.tables.decide(self.identity.decide(self.config.near_duplicates))
        self._clips(self._plan())

    def _read(self, rows: Iterable[Row], number: int) -> Iterator[Row]:
        """Read the ledger's records on the workers."""
        return self.passes.must("ledger", READ, rows, self.config, ("number", *READ.writes), number)

    # ------------------------------------------------------------ videos

    def _rows_to_hash(self) -> tuple[Iterator[Row], int]:
        """Add all videos that have not changed since an earlier run; return the rows of the others and their number."""
        lines, records = self._sources(), self.ledger.records
        if not records.has_sources:
            return (unchanged.row_of(line) for _, line in lines), self.sources.num_videos
        waiting = Blocks(self.ledger.database, "waiting")
        sorter = Sorter(waiting)
        for path, line in lines:
            name = unchanged.record_name(path).partition("/")[2]
            sorter.add(name[: min(self.tables.digits, unchanged.GROUP_DIGITS)], line)
        sorter.close()
        groups = waiting.places()
        keep, rows = ("prefix", *unchanged.UNCHANGED.writes), (self._group(waiting, prefix) for prefix in groups)
        for row in self.passes.must("unchanged", unchanged.UNCHANGED, rows, self.config, keep, len(groups)):
            lacking = ~np.logical_or(*(records.may_have_hashes(row[name]) for name in unchanged.HASHES))
            if lacking.any():  # rare: a version of the program that has no records yet, or a run that was killed
                row = unchanged.without_record(row, self._group(waiting, row["prefix"]), lacking)
            self.tables.add_unchanged(row)
            self.tables.add_changed(unpack(row["changed"].tobytes()))
            self.passes.worked[HASH_PASS] = self.passes.worked.get(HASH_PASS, 0) + len(row["contents"])
        waiting.drop()
        return (unchanged.row_of(*source) for _, *source in self.tables.changed()), self.tables.count("changed")

    def _group(self, waiting: Blocks, prefix: str) -> Row:
        blocks = {"sources": waiting.at(prefix), "records": self.ledger.records.sources(prefix)}
        arrays = {name: np.frombuffer(block, np.uint8) for name, block in blocks.items()}
        return new_row(f"sources {prefix}", prefix=prefix, **arrays, digits=self.tables.digits)

    def _stream(self, rows: Iterable[Row], number: int) -> None:
        """Hash these videos; find the shots of new videos and make their clips while others are still being hashed.

        Each video is first assumed to be unique. If a later decision across videos changes a clip's name, the clip is
        made again. So what is made here goes only into the ledger, and is counted once all videos are known.
        """
        last, clips = self._last()
        tracks = (
            Track(HASH_PASS, self.stages.hash, (*VIDEO_COLUMNS, "known_source", "fetched")),
            Track(SHOTS_PASS, self.stages.find_shots, ("record", "clips", "name", *ARTIFACTS)),
            Track(last, clips, CLIP_COLUMNS),
        )
        later: deque[tuple[str, Row]] = deque()
        for name, row in self.passes.flow(tracks, rows, self.config, number, later):
            if name == HASH_PASS:
                video = self._hashed(row)
                if video is not None:
                    later.append((SHOTS_PASS, video))
            elif name == SHOTS_PASS:
                self.outcomes.write_video(row)
                later.extend((last, clip) for clip in row["clips"] or () if not self._may_be_finished(clip))
            else:
                self.outcomes.write_clip(row)
            if row["refusal"] is not None and name != HASH_PASS:
                self.outcomes.failed(row, is_guess=name == last)

    def _hashed(self, row: Row) -> Row | None:
        """Add a video to the tables, or reject it; return it if its shots have to be found."""
        if row["fetched"] and row["fetched"] != row["known_source"]:
            self.ledger.records.add(unchanged.record_name(row["path"]), row["fetched"])
        if row["refusal"] is not None:
            self.outcomes.reject("video", row)
            return None
        video = unchanged.video_of(row, self.digests)
        is_new = self.tables.add_video(video) and not self._may_be_finished(video)
        return video if is_new else None

    def _may_be_finished(self, row: Row) -> bool:
        """Return whether the ledger has a row's result or refusal; possibly wrong, which later passes mend."""
        return any(self.ledger.may_have(row[name]) for name in ARTIFACTS)

    def _sources(self) -> Iterator[tuple[str, str]]:
        """Yield (path, line for `unchanged`) of each video; reject sources that are not videos."""
        for source in self.sources:
            if source.is_video:
                yield source.path, unchanged.line_of(source)
                continue
            row = refused(new_row(source.name), source.fate, "input", source.reason, source.message)
            self.outcomes.reject("video", row)

    def _compare(self) -> int:
        """Reject copies and collect the frame hashes of all videos; return the number of videos without a record."""
        number, prefixes, keep = 0, self.tables.units(), ("prefix", *compare.COMPARE.writes)
        rows = (self._unit(prefix) | {"shards": []} for prefix in prefixes)  # samples are planned later
        for row in self.passes.must("compare", compare.COMPARE, rows, self.config, keep, len(prefixes)):
            found = row["compared"]
            self._take(found)
            self.identity.extend(row["prefix"], row)
            self.tables.add_pairs(found["pairs"])
            self.tables.add_names(row)
            number += self._add_work("video", row["missing"].tobytes(), found["num_missing"])
        return number

    def _find_shots(self, number: int) -> None:
        """Find the shots of videos that still lack a record: those to be retried and those whose record is damaged."""
        keep = ("record", "content", "path", "name", "sha256", "other_sha256", *ARTIFACTS)
        for row in self.passes.run(SHOTS_PASS, self.stages.find_shots, self.tables.work(), self.config, keep, number):
            self.outcomes.write_video(row)
            self.outcomes.note(row)
            if row["refusal"] is None:
                one = Collector()
                one.add(*compare.identity_of(row, row["record"]))
                self.identity.extend(row["content"], one.columns())
                self.tables.add_pairs(compare.pairs_of([row]))
                self.tables.add_names(compare.names_of([row], self.config))
            elif not is_lasting(row):
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

    # ------------------------------------------------------------ clips

    def _plan(self) -> int:
        """Plan the clips of all units; return the number of clips to be made."""
        number, prefixes, keep = 0, self.tables.units(), units.PLAN.writes
        rows = (self._unit(prefix) | {"decided": self.tables.decided(prefix)} for prefix in prefixes)
        for row in self.passes.must("plan", units.PLAN, rows, self.config, keep, len(prefixes)):
            planned = row["planned"]
            self.counts.update(planned["counts"])
            self._take(planned)
            self.tables.add_staged_of(row)
            for clip in planned["scored"]:
                self.tables.add_scored(clip)
            self.tables.add_superseded(planned["superseded"])
            number += self._add_work("clip", row["todo"].tobytes(), planned["num_todo"])
        return number

    def _unit(self, prefix: str) -> Row:
        """Return the row of a unit for `compare.COMPARE` and `units.PLAN`."""
        retry = sorted(self.retry)
        tried = self.tables.tried_in(prefix) if retry else []
        columns = self.ledger.unit(prefix) | self.tables.unit(prefix)
        return new_row(f"unit {prefix}", prefix=prefix, retry=retry, tried=tried, **columns)

    def _take(self, found: Mapping[str, Any]) -> None:
        """Apply what a worker found in a unit: rejects, rejections to be retried, and changes of the ledger."""
        self.outcomes.add_rejects(found["rejects"])
        self.outcomes.retried.update({key: (reason, "") for key, reason in found["retried"].items()})
        self.ledger.apply(found["changes"])

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
        self.counts["samples"] = self.tables.num_staged()
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
            for artifact in self.tables.artifacts(error.keys):
                self.ledger.set_aside(artifact)
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
            has_earlier_dataset=not self.committed and storage.exists(storage.join(self.config.output, DATASET)),
        )
