"""Plan one unit of videos: which clips there are, which are finished, and which have to be made.

A unit is all videos whose content hash begins with the same digits. Planning it needs only its videos, the ledger's
entries for them, and the decisions made across all videos. So workers plan units, and the driver reads none of their
rows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from ex4d.data.shards import split_of
from ex4d.errors import BadSample, Filtered
from ex4d.quality import SCORES
from pipelines import inputs
from pipelines.preprocess import clips, fingerprints, pairs
from pipelines.preprocess.filters import decide
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages import own_score, pair
from pipelines.preprocess.tables import pack_rows
from pipelines.runtime.blocks import columns, unpack
from pipelines.runtime.known import Known, load_files
from pipelines.runtime.ledger import known_of, superseded
from pipelines.runtime.rejects import reject_of
from pipelines.runtime.stage import Row, Stage, new_row, refuse, refused

ARTIFACTS = ("artifact", "refusal_artifact")  # columns: a row's ledger names, finished and rejected


def videos_of(row: Row) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Return the first video (by name) of each content of a unit, sorted by content; and (copy, name of the first).

    Args:
        row: columns of `Tables.unit`.
    """
    dropped, block = set(row["dropped"]), row["videos"].tobytes()
    videos = sorted((json.loads(line) for line in unpack(block)), key=itemgetter("content", "name"))
    firsts: dict[str, Row] = {}
    copies = []
    for video in (video for video in videos if video["content"] not in dropped):
        first = firsts.setdefault(video["content"], video)
        if first is not video:
            copies.append((video, first["name"]))
    return list(firsts.values()), sorted(copies, key=lambda copy: copy[0]["name"])


def plan_unit(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `planned` (`Unit.result`); `todo`, the packed rows of the clips to be made; and the columns `staged`.

    Args:
        row: columns of `Ledger.unit` and `Tables.unit`; `decided`: see `Tables.decided`. `retry`, `tried`: as in
            `compare_unit`.
    """
    unit = Unit(config, known_of(row, config.output), row["retry"], [artifact for artifact, _ in row["tried"]])
    own = []
    for video in videos_of(row)[0]:
        group, name = row["decided"].get(video["sha256"], (None, None))
        own.append({**video, "source_group": group or video["sha256"], "stand_in": name or ""})
    todo = unit.plan(own)
    groups: dict[str, list[str]] = defaultdict(list)
    for clip in sorted(unit.staged):
        groups[f"{clip[0]}/{row['prefix']}"].append(json.dumps(clip))
    packed = np.frombuffer(pack_rows(todo), np.uint8)
    return {"planned": unit.result(len(todo)), "todo": packed, **columns("staged", groups)}


def first_clips(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `clips`: rows of a new video's clips that have to be made, if no other video is a (near) duplicate."""
    known = Known(config.output, {row["artifact"]: json.dumps(row["record"])}, {})
    group = min(filter(None, (row["sha256"], pairs.other_of(row).get("other_sha256"))))  # as `Identity` decides
    return {"clips": Unit(config, known, ()).plan([{**row, "source_group": group, "stand_in": ""}])}


class Unit:
    """The plan of one unit.

    Args:
        known: the ledger's entries for the unit.
        retry: clips rejected for one of these reasons are made again, except for the names in `tried`.
    """

    def __init__(self, config: PreprocessConfig, known: Known, retry: Sequence[str], tried: Sequence[str] = ()):
        self.config, self.known, self.retry, self.tried = config, known, retry, frozenset(tried)
        self.names = fingerprints.clip_names(config)
        self.everything = list(known)
        self.counts: Counter[str] = Counter()
        self.rejects: list[dict[str, str]] = []
        self.staged: list[list[Any]] = []
        self.scored: list[dict[str, Any]] = []
        self.retried: dict[str, str] = {}
        self.used: set[str] = set()

    def result(self, num_todo: int) -> dict[str, Any]:
        """Return everything that the driver needs except for rows of clips, serializable as JSON."""
        names = ("counts", "rejects", "scored", "retried")
        drops = self.config.keep_staging != "all" and not self.config.score_only
        old = superseded(self.everything, self.used) if drops else []
        found = {name: getattr(self, name) for name in names}
        numbers = {"num_todo": num_todo, "num_staged": len(self.staged)}
        return {**found, **numbers, "changes": self.known.changes, "superseded": old}

    def plan(self, videos: Sequence[Row]) -> list[Row]:
        """Return the rows of the clips that have to be made.

        Args:
            videos: rows with `source_group` and `stand_in`, the name of the video that replaces this one, or "".
        """
        rows = [self._clip_row(video, clip) for video in videos for clip in self._clips(video)]
        self.counts["clips_planned"] = len(rows)
        if self.config.score_only:
            rows = [row | {"artifact": row["score_artifact"]} for row in rows]
        missing = self._missing(rows)
        todo = missing if self.config.score_only else self._passing(missing)
        making = {row["key"] for row in todo}
        for row in rows:
            if row["key"] not in making:
                self._looked_at(row) if self.config.score_only else self._done(row)
        return todo

    def _clips(self, row: Row) -> list[clips.Clip]:
        """Return the clips of a video; reject a video that has none."""
        self.used |= {row[name] for name in ARTIFACTS}
        record: Any = self.known.get(finished(self.known, row))
        row["record"] = record
        if record["refusal"] is not None:
            self.rejects.append(reject_of("video", row | {"refusal": record["refusal"]}))
            return []
        if row["stand_in"]:
            message = f"nearly the same as {row['stand_in']}"
            self.rejects.append(reject_of("video", refused(row, "filtered", "shots", "near_duplicate", message)))
            return []
        try:
            spans = [inputs.Span(**span) for span in row["spans"]]
            found = clips.plan(row["content"], record, self.config, spans)
        except (BadSample, Filtered) as error:
            self.rejects.append(reject_of("video", refuse(row, "clips", error)))
            return []
        self.counts["videos_split"] += 1
        return found

    def _clip_row(self, video: Row, clip: clips.Clip) -> Row:
        facts = {name: video[name] for name in ("name", "sha256", "source_group", "depth_file")} | vars(clip)
        facts["caption_source"] = "list" if clip.caption else "sidecar" if video["caption"] else "none"
        if clip.caption is None:
            facts["caption"] = video["caption"]
        other: dict[str, Any] = {}
        if video["pair"] is not None:
            facts["pair"] = video["pair"]
            other = pairs.other_of(video) | pair.columns(video["record"], clip, self.config.crop_bars)
        sample, refusal, scores = self.names.of(facts)
        return new_row(
            **facts,
            **other,
            **{name: video[name] for name in ("path", "depth_place", "twin", "namesake")},
            **clips.in_source(clip, video["record"]),
            size=video["record"]["info"]["size"],
            seed=self.names.seed(clip.key),
            versions=fingerprints.versions(),
            fingerprint=sample,
            artifact=f"clips/{clip.key}.{sample}.tar",
            refusal_artifact=f"clips/{clip.key}.{refusal}.json",
            score_artifact=f"scores/{clip.key}.{scores}.json",
            known_scores=None,
            video_s=len(clip.frame_index) / clip.fps,
        )

    def _missing(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that the ledger lacks, after deleting the rejections that are to be retried."""
        load(self.known, rows)
        for row in rows:
            self.used |= {row["artifact"], row["refusal_artifact"], row["score_artifact"]}
            name = finished(self.known, row) if self.retry else ""
            if name == row["refusal_artifact"] and name not in self.tried:
                reason = (self.known.get(name) or {})["reason"]
                if reason in self.retry:
                    self.known.remove(name)
                    self.retried[row["key"]] = reason
        return [row for row in rows if not finished(self.known, row)]

    def _passing(self, missing: Sequence[Row]) -> list[Row]:
        """Return the rows without those whose known scores already miss a threshold."""
        load_files(self.known, {name: row["key"] for row in missing if (name := row["score_artifact"]) in self.known})
        for row in missing:
            row["known_scores"] = self.known.get(row["score_artifact"])
        return [row for row in missing if judged(row, row["known_scores"] or row["shot_scores"], self.config) is None]

    def _looked_at(self, row: Row) -> None:
        """Count a clip whose scores are known, or that was rejected before it was scored."""
        known = self.known.get(finished(self.known, row)) or {}
        is_refusal = "reason" in known
        scores = known.get("scores") if is_refusal else known
        if scores is None:
            self.rejects.append(reject_of("clip", row | {"refusal": known}))
        else:
            self.scored.append(scored(row, scores))

    def _done(self, row: Row) -> None:
        """Count a clip that needs no work: a finished sample, or a rejection, possibly by the current thresholds."""
        name = finished(self.known, row)
        record: Any = self.known.get(name) if name else {"scores": row["known_scores"] or row["shot_scores"]}
        refusal = record if name == row["refusal_artifact"] else judged(row, record["scores"], self.config)
        if refusal is not None:
            self.rejects.append(reject_of("clip", row | {"refusal": refusal}))
            return
        split = split_of(row["source_group"], self.config.val_fraction)
        self.staged.append([split, row["key"], name, record["size"], record["sha256"]])


def finished(known: Any, row: Row) -> str:
    """Return the name of the ledger's artifact for a row, "" if there is none."""
    return next((row[name] for name in ARTIFACTS if row[name] in known), "")


def load(known: Any, rows: Sequence[Row]) -> None:
    """Load artifacts of these rows that have no record yet; damaged ones count as missing."""
    todo = rows
    while damaged := load_files(known, {name: row["key"] for row in todo if (name := finished(known, row))}):
        todo = [row for row in todo if damaged & {row[name] for name in ARTIFACTS}]


def judged(row: Row, scores: dict[str, float], config: PreprocessConfig) -> dict[str, Any] | None:
    """Return the rejection of a clip with these scores under the current thresholds, or None."""
    try:
        decide(scores, config.filters, config.scorer)
    except Filtered as error:
        stage = SCORES[error.reason].stage if error.reason in SCORES else own_score.STAGE.name
        return refuse(row, stage, error)["refusal"]
    return None


def scored(row: Row, scores: dict[str, float]) -> dict[str, Any]:
    """Return the fields of a clip for the page of scores."""
    frames = {"start_frame": row["frame_index"][0], "end_frame": row["frame_index"][-1]}
    return {"key": row["key"], "name": row["name"], **frames, "scores": scores}


UNIT = ("prefix", "videos", "dropped", "records", "sizes", "shards", "retry", "tried")  # columns of a unit
PLAN = Stage("plan", plan_unit, reads=(*UNIT, "decided"), writes=("planned", "todo", "staged", "staged_ends"))
FIRST_CLIPS = Stage(
    "first_clips",
    first_clips,
    reads=(
        *("key", "refusal", "record", "content", "name", "path", "twin", "namesake", "spans", "sha256", "caption"),
        *("pair", "depth_file", "depth_place", *ARTIFACTS),
    ),
    writes=("clips",),
)
