"""Pack the finished samples of a run into the dataset: workers build the shards, the driver writes the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ex4d.data import shards
from pipelines.preprocess import fingerprints
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages import commit
from pipelines.preprocess.tables import Tables
from pipelines.runtime.ledger import PACKED, Ledger
from pipelines.runtime.passes import Passes
from pipelines.runtime.rejects import Rejects
from pipelines.runtime.stage import new_row


@dataclass(frozen=True)
class Packing:
    """Supplies the samples and rejects of a run to `shards.pack_contents`, and builds shards on the workers."""

    config: PreprocessConfig
    ledger: Ledger
    tables: Tables
    rejected: Rejects
    passes: Passes

    def pack(self, counts: Mapping[str, int]) -> None:
        """Write the dataset. Raises DamagedSamples."""
        size, tables = self.config.shard_size_mb << 20, self.ledger.url(PACKED)
        if self.config.keep_staging == "none":
            self.ledger.packed.declare_only_copy(self.ledger.records)
        facts = fingerprints.facts(self.config, counts)
        shards.pack_contents(self, self.config.output, facts, size, tables=tables, build=self._build)
        if self.config.keep_staging == "none":
            self.ledger.packed.drop(clip.artifact for clip in self.tables.staged())

    def staged(self) -> Iterator[shards.Staged]:
        """Yield the finished samples, sorted by split and key."""
        for split, key, artifact, size, sha256 in self.tables.staged():
            yield shards.Staged(key, split, self.ledger.url(artifact), size, sha256)

    def rejects(self) -> Iterator[Mapping[str, str]]:
        """Yield the rejects in the order of rejects.parquet."""
        return self.rejected.in_order()

    def _build(self, plans: shards.Missing, output: str, tables: str, work: str | None) -> Iterator[dict[str, Any]]:
        """Build shards on the workers; yield the facts of each. Raises ContractError."""
        packed = self.ledger.packed
        if packed.holds_samples:  # copy all back before any shard is overwritten
            rows = (new_row(plan["name"], places=packed.places(plan["items"])) for plan in plans)
            for _ in self.passes.must("restore", commit.RESTORE, rows, self.config, (), len(plans)):
                pass
        rows = (new_row(plan["name"], plan=plan, output=output, tables=tables, work=work) for plan in plans)
        keep = ("built", "plan")
        for row in self.passes.must("pack", commit.BUILD_SHARD, rows, self.config, keep, len(plans)):
            if self.config.keep_staging == "none" and "url" in row["built"]:
                packed.dropped(row["plan"]["items"])
            yield row["built"]
