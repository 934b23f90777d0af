"""`ex4d evaluate`: measure an adapter over ranges of camera paths, on scenes with known truth or on videos.

A row is one clip along one path. Its figures, features and videos are staged together under a name that fingerprints
everything they depend on, so a killed run can resume. evaluation.json is written last and acts as the commit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ex4d import config as config_file
from ex4d import storage
from ex4d.config import to_dict
from ex4d.data.tar import read_sample
from ex4d.data.tensors import decode_tensors
from ex4d.evaluate import summary
from ex4d.evaluate.summary import Range
from ex4d.generate import GenerateConfig
from ex4d.redact import without_secrets
from ex4d.synthetic import SyntheticConfig
from ex4d.viewer import page
from pipelines.evaluate import plan as evaluate_plan
from pipelines.evaluate import stages
from pipelines.evaluate.config import EvaluateConfig as EvaluateConfig
from pipelines.evaluate.report import Report, View
from pipelines.evaluate.stages import METHODS
from pipelines.runtime import runner
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.cluster import check_output
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.output import exclusive, outside_datasets
from pipelines.runtime.passes import Passes, TooManyBugs
from pipelines.runtime.progress import Progress
from pipelines.runtime.result import Result, logged
from pipelines.runtime.runner import RayConfig
from pipelines.runtime.stage import Row, is_lasting

SHOWN = 4  # clips per range that the page shows; the videos of all clips are saved next to it
RECORD = "evaluation.json"
SECTIONS = {"evaluate": EvaluateConfig, "generate": GenerateConfig, "synthetic": SyntheticConfig, "ray": RayConfig}


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d evaluate`; return the exit status."""
    chosen = config_file.load(config_path, SECTIONS, overrides)
    check_output("evaluate.output", chosen["evaluate"].output)
    report = run(chosen["evaluate"], chosen["generate"], chosen["synthetic"], chosen["ray"])
    print(report.table())
    return report.exit_code


def run(
    config: EvaluateConfig,
    sampler: GenerateConfig,
    world: SyntheticConfig | None = None,
    ray_config: RayConfig | None = None,
    runner_name: str = "ray",
) -> Report:
    """Compute the views that `config.output` lacks and return the report.

    Args:
        world: settings of the scenes; size and length are the adapter's. Unused for videos.
        runner_name: "ray", or "inline": row by row in this process, where unexpected errors propagate.

    Raises:
        ConfigError: a setting is invalid; raised before any work.
        ContractError: the adapter's file or a result of an earlier run is damaged.
    """
    outside_datasets("evaluate.output", config.output)
    planned = evaluate_plan.plan(config, sampler, world or SyntheticConfig())
    attempts, progress = Attempts(config.output, config.max_attempts), Progress(config.output)
    bugs: list[dict[str, Any]] = []
    how = {"runner": runner_name, "num_workers": config.num_workers}
    with exclusive(config.output), logged(config.output, progress.tallies, bugs, how) as end:
        job = _Job(config, planned)
        chosen = runner_name if job.missing() else "inline"  # do not start Ray if nothing is missing
        with runner.runner(chosen, ray_config or RayConfig(), config.num_workers, attempts) as execute:
            passes = Passes("evaluate", execute, progress, config.max_bugs, bugs=bugs)
            try:
                job.work(passes)
            except TooManyBugs as error:
                job.problems.append(str(error))
            finally:
                job.ledger.flush()
        report = job.finish(passes)
        end(report.result)
    return report


class _Job:
    """One run; the work fills `rejects` and `problems`."""

    def __init__(self, config: EvaluateConfig, planned: evaluate_plan.Planned):
        self.config, self.planned = config, planned
        self.ledger = Ledger(config.output)
        self.rejects = list(planned.rejects)
        self.problems: list[str] = []

    def missing(self) -> list[Row]:
        """Return the rows that are neither finished nor permanently rejected."""
        refusals = ((row["refusal_artifact"], row["key"]) for row in self.planned.rows)
        self.ledger.load_files({name: key for name, key in refusals if name in self.ledger})
        done = self.ledger.names()
        return [row for row in self.planned.rows if not done & {row["artifact"], row["refusal_artifact"]}]

    def work(self, passes: Passes) -> None:
        """Compute the views that staging lacks. Raises TooManyBugs."""
        rows = {row["key"]: row for row in self.missing()}
        chosen = stages.stages(self.config.num_gpus)
        for done in passes.run("views", chosen, list(rows.values()), self.planned.context, ("staged",)):
            if done["refusal"] is None:
                self.ledger.finished(rows[done["key"]]["artifact"], done["staged"])
            elif is_lasting(done):
                self.ledger.records.add(rows[done["key"]]["refusal_artifact"], done["refusal"])
            else:
                self._reject(rows[done["key"]], done["refusal"])

    def _reject(self, row: Row, refusal: Mapping[str, Any]) -> None:
        facts = {name: refusal[name] for name in ("stage", "reason", "message")}
        self.rejects.append({"key": row["key"], "name": row["case"]["video"], **facts, "views": 1})

    def finish(self, passes: Passes) -> Report:
        """Write videos, page and evaluation.json, unless too many views are bad; return the Report."""
        done = self.ledger.names()
        there = [row for row in self.planned.rows if row["artifact"] in done]
        for row in self.planned.rows:
            if row["refusal_artifact"] in done and row["artifact"] not in done:
                self._reject(row, self.ledger.records.get(row["refusal_artifact"]) or {})
        bad = sum(reject["views"] for reject in self.rejects)
        planned = len(self.planned.rows) + sum(reject["views"] for reject in self.planned.rejects)
        if not self.problems and bad > self.config.max_bad_fraction * planned:
            limit = f"evaluate.max_bad_fraction={self.config.max_bad_fraction:g}"
            self.problems.append(f"{bad} of {planned} views are bad, more than {limit}")
        if not there:
            self.problems.append("no view is left")
        committed = not self.problems
        self.problems += passes.problems()
        result = Result(
            self.config.output,
            {"views_planned": planned, "views": len(there), "views_bad": bad},
            self.rejects,
            self.problems,
            committed=committed,
            stages=passes.progress.tallies,
            worked=passes.worked,
            report=self._url("report", "index.html") if committed else "",
        )
        return self._write(result, there) if committed else Report(result, {}, {}, [], self.planned.facts)

    def _url(self, *parts: str) -> str:
        return storage.join(self.config.output, *parts)

    def _write(self, result: Result, rows: list[Row]) -> Report:
        """Write the videos, the page and evaluation.json, and delete older ones; return the Report."""
        storage.remove(self._url(RECORD))  # nothing is committed until it is written again
        ranges = {name: Range() for name in self.config.ranges}
        clips: list[dict[str, Any]] = []
        shown: list[View] = []
        names = set()
        for row in rows:
            members = read_sample(storage.read_bytes(self.ledger.url(row["artifact"])), row["key"])
            facts = json.loads(members["json"])
            features = members.get("features.safetensors")
            ranges[row["range"]].add(facts["figures"], decode_tensors(features) if features else {})
            videos = {name.removesuffix(".mp4"): data for name, data in members.items() if name.endswith(".mp4")}
            names |= {self._keep(f"{row['key']}.{name}.mp4", data) for name, data in videos.items()}
            clips.append({"key": row["key"], "range": row["range"], "video": row["case"]["video"], **facts})
            if sum(view.range == row["range"] for view in shown) < SHOWN:
                shown.append(View(row["key"], row["range"], videos))
        ranges = {name: measures for name, measures in ranges.items() if measures.figures}
        distances = {name: measures.distances() for name, measures in ranges.items()}
        labels = {name: METHODS[name] for name in self.config.compared}
        tables = {name: summary.table(measures, labels, distances[name]) for name, measures in ranges.items()}
        report = Report(result, tables, ranges, shown, self.planned.facts)
        subject = "own videos" if self.config.videos else "held-out scenes with known novel views"
        notes = (f"{report.facts['adapter']} on {subject}. All videos are in the folder `videos` next to `report`.",)
        page.write(report.page("How good the adapter is", notes, videos="../videos"), result.report)
        self._tidy(names)
        record = {
            "facts": report.facts,
            "config": to_dict(self.config),
            "ranges": {
                name: {"columns": columns, "rows": lines, "distances": distances[name]}
                for name, (columns, lines) in tables.items()
            },
            "clips": clips,
            "rejects": self.rejects,
        }
        text = json.dumps(without_secrets(record), indent=1, sort_keys=True, allow_nan=False) + "\n"
        storage.write_bytes(self._url(RECORD), text.encode())
        return report

    def _keep(self, name: str, data: bytes) -> str:
        """Write a video unless the file already has these bytes; return its name."""
        url = self._url("videos", name)
        if not storage.exists(url) or storage.read_bytes(url) != data:
            storage.write_bytes(url, data)
        return name

    def _tidy(self, videos: set[str]) -> None:
        """Delete videos of other evaluations, and staged views of the same clips under other settings."""
        for name in storage.list_files(self._url("videos")):
            if name not in videos:
                storage.remove(self._url("videos", name))
        used = {row[place] for row in self.planned.rows for place in ("artifact", "refusal_artifact")}
        keys = {row["key"] for row in self.planned.rows}
        for name in self.ledger.names() - used:
            if name.partition("/")[2].partition(".")[0] in keys:
                self.ledger.remove(name)
        self.ledger.sweep()
