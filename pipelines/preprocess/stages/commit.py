"""The last stages: each finished sample is written to the ledger as a whole before its row returns to the driver."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.runtime import packed
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def record_video(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `record`, the video's columns or its rejection, and `video_s`, its length in s."""
    names = ("info", "pts_runs", "cuts", "shots", "hashes", "other", "refusal")
    record = {name: row[name] for name in names if name in row}
    return {"record": record, "video_s": row["info"]["duration_s"] if row["info"] else 0.0}


def stage_sample(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Write the finished sample to staging atomically; return its record for the ledger.

    Raises:
        ContractError: the columns do not form a valid sample.
    """
    from ex4d.data import sample
    from ex4d.data.tar import sample_tar

    members = sample.encode(
        sample.Sample(
            key=row["key"],
            frames=row["frames"],
            fps=row["fps"],
            visible=row["visible"],
            kind=row["kind"],
            hole_share=row["hole_share"],
            K=row["K"],
            w2c=[None if path is None else np.asarray(path, np.float64) for path in row["w2c"]],
            caption=row["caption"],
            provenance=provenance(row),
            cond=row["cond"],
            z_depth=row["z_depth"] if "depth" in config.members else None,
            source=row.get("other_frames"),
        )
    )
    written = Ledger(config.output).write_sample(row["artifact"], sample_tar(row["key"], members))
    return {"staged": {**written, "scores": _scores(row)}}


def _scores(row: Row) -> dict[str, float]:
    return {**row["scores"], **row["depth_scores"], **row["mask_scores"]}


def provenance(row: Row) -> dict[str, Any]:
    """Return the contents of KEY.json; see sample.PROVENANCE."""
    time_base = Fraction(*row["time_base"])
    return {
        "source_sha256": row["sha256"],
        "source_group": row["source_group"],
        "source_path": row["name"],
        "licence": row["licence"],
        "start_pts": row["pts"][0],
        "end_pts": row["pts"][-1],
        "time_base": f"{time_base.numerator}/{time_base.denominator}",
        "start_s": float(row["pts"][0] * time_base),
        "end_s": float(row["pts"][-1] * time_base),
        "crop_box": row["box"],
        "caption": row["caption_facts"],
        "scores": _scores(row),
        "seeds": {"clip": row["seed"]},
        "depth": {name: _unicode(value) for name, value in row["depth_facts"].items()},
        "versions": row["versions"],
        "config_fingerprint": row["fingerprint"],
        **({"pair": row["pair_facts"]} if "pair_facts" in row else {}),
    }


def _unicode(value: Any) -> Any:
    """Escape bytes that are not UTF-8 (e.g. in a file name) in a text, for JSON; return other values unchanged."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def build_shard(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Build a shard and return its facts; with keep_staging=none, delete its staged samples. Raises ContractError."""
    from ex4d.data import building

    built = building.build(row["plan"], row["output"], row["tables"], row["work"])
    if config.keep_staging == "none" and "url" in built:
        packed.delete(row["plan"]["items"])
    return {"built": built}


def restore(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Copy samples that are stored only in a shard back to staging. Raises ContractError."""
    packed.restore(row["places"])
    return {}


RECORD_VIDEO = Stage(
    "record_video",
    record_video,
    reads=("refusal", "info", "pts_runs", "cuts", "shots", "hashes"),
    writes=("record", "video_s"),
    takes_rejected=True,
)
STAGE_SAMPLE = Stage(
    "stage_sample",
    stage_sample,
    reads=(
        *("key", "frames", "fps", "visible", "kind", "hole_share", "K", "w2c", "caption", "artifact"),
        *("cond", "z_depth"),
        *("sha256", "source_group", "name", "licence", "pts", "time_base", "box", "caption_facts", "scores"),
        *("depth_scores", "mask_scores", "seed", "depth_facts", "versions", "fingerprint"),
    ),
    writes=("staged",),
)
RECORD_PAIR = replace(RECORD_VIDEO, reads=(*RECORD_VIDEO.reads, "other"))
STAGE_PAIR = replace(STAGE_SAMPLE, reads=(*STAGE_SAMPLE.reads, "other_frames", "pair_facts"))
RESTORE = Stage("restore", restore, reads=("places",), writes=())
BUILD_SHARD = Stage("build_shard", build_shard, reads=("plan", "output", "tables", "work"), writes=("built",))
