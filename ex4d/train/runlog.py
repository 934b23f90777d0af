"""The log of a run: JSON lines always, W&B if enabled. The only module that uses W&B."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ex4d import storage

logger = logging.getLogger(__name__)


class RunLog:
    """Writes OUTPUT/metrics.jsonl and OUTPUT/validation.jsonl, and mirrors both to W&B. Only rank 0 has one.

    The first file has one object per step, the second one per separate validation.

    Args:
        output: folder of the run.
        step: the step that the run resumes from; later lines are dropped, so that each step is logged once.
        wandb_options: mode ("online", "offline", "disabled"; None: depends on the API key), project, group.
        facts: configuration, versions, commit and dataset; W&B stores them as its configuration and as an artifact.
    """

    def __init__(self, output: str | Path, step: int, wandb_options: dict[str, Any], facts: dict[str, Any]):
        self.output, self.step = Path(output), step
        self.path = self.output / "metrics.jsonl"
        self.validation_path = self.output / "validation.jsonl"
        self.output.mkdir(parents=True, exist_ok=True)
        truncate(self.path, step)
        truncate(self.validation_path, step)
        self._file = open(self.path, "a", encoding="utf-8", opener=storage.no_links)  # noqa: SIM115 - as long as the run
        self._wandb = _start_wandb(self.output, wandb_options, facts)
        # A separate validation is logged later than its step, so it has its own axis.
        self._mirror(lambda run: run.define_metric("validation/*", step_metric="validation/step"))
        self._mirror(lambda run: run.log_artifact(_artifact(run.id, self.output, facts)))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        self.step = metrics["step"]
        self._mirror(lambda run: run.log(_flat(metrics), step=self.step))

    def write_validation(self, result: dict[str, Any]) -> None:
        """Append the result of a separate validation: see validator.Validator.results."""
        with open(self.validation_path, "a", encoding="utf-8", opener=storage.no_links) as file:
            file.write(json.dumps(result) + "\n")
        shown = {f"validation/{key}": value for key, value in result.items() if key != "videos" and value is not None}
        videos = result.get("videos", [])
        self._mirror(lambda run: run.log(shown | _videos(self.output, videos), step=self.step))

    def flush(self) -> None:
        """Flush the log to disk, so that a checkpoint is never ahead of the log."""
        os.fsync(self._file.fileno())

    def close(self, exit_code: int = 0) -> None:
        """Flush to disk and end the W&B run."""
        self.flush()
        self._file.close()
        self._mirror(lambda run: run.finish(exit_code=exit_code))

    def _mirror(self, act: Callable[[Any], Any]) -> None:
        """Call W&B; if it fails, continue without it.

        Its service is a separate process, which a batch system's SIGTERM to all processes of a job ends too.
        """
        if self._wandb is None:
            return
        import wandb

        try:
            act(self._wandb)
        except (OSError, EOFError, RuntimeError, ValueError, wandb.Error) as error:
            logger.warning("W&B failed (%s: %s); metrics.jsonl has everything", type(error).__name__, error)
            self._wandb = None


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the steps of a metrics.jsonl, without a last line that a kill has cut off."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line.endswith("}")]


def truncate(path: str | Path, step: int) -> None:
    """Drop the lines of steps after `step`, which the resumed run writes again."""
    steps = read(path)
    rest = [metrics for metrics in steps if metrics["step"] <= step]
    if Path(path).exists():
        storage.write_bytes(path, "".join(json.dumps(metrics) + "\n" for metrics in rest).encode())


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten metrics to one value per chart: nested keys joined by /, errors per range of sigma, None left out."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if key == "mse_by_sigma":
            edges = [f"{index / len(value):.1f}" for index in range(len(value) + 1)]
            value = {f"{low} to {high}": mse for low, high, mse in zip(edges, edges[1:], value, strict=False)}
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def commit() -> str | None:
    """Return the commit of this source tree, with a "+" if files differ from it; None outside its repository."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    here = Path(__file__).resolve()
    if git("ls-files", "--error-unmatch", here.name) is None:  # installed, perhaps inside another project's repository
        return None
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if head and changed else head


def _artifact(run_id: str, output: Path, facts: dict[str, Any]) -> Any:
    """Return the artifact that describes a run: its facts, and its configuration if there is one."""
    import wandb

    artifact = wandb.Artifact(f"run-{run_id}", type="run")
    with artifact.new_file("run.json", mode="w") as file:
        json.dump(facts, file, indent=1)
    if (output / "config.yaml").exists():
        artifact.add_file(str(output / "config.yaml"))
    return artifact


def _videos(output: Path, paths: list[str]) -> dict[str, Any]:
    """Return {"validation/clip-N": wandb.Video}."""
    import wandb

    return {f"validation/{Path(path).stem}": wandb.Video(str(output / path), format="mp4") for path in paths}


def _start_wandb(output: Path, options: dict[str, Any], facts: dict[str, Any]) -> Any:
    """Return a W&B run, or None if it cannot start: W&B is only a mirror, and its failure must not end a training."""
    mode: Any = options["mode"] or os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        logger.warning("W&B is not installed; metrics.jsonl has everything")
        return None
    # Offline runs ignore `resume`, so we choose the id: later starts append to the same run when they are synced.
    id_file = output / "wandb_run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else uuid.uuid4().hex[:8]
    storage.write_bytes(id_file, run_id.encode())
    try:
        return wandb.init(
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            project=options["project"],
            group=options["group"],
            dir=str(output),
            config=facts,
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
    except (wandb.Error, OSError) as error:
        logger.warning("W&B did not start (%s); metrics.jsonl has everything", error)
        return None
