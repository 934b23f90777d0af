"""Run functions that read untrusted bytes in a child process, under limits."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ex4d import isolation
from ex4d.errors import BadSample

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig

logger = logging.getLogger(__name__)

FUNCTIONS = {
    "probe": "ex4d.video:probe",
    "decode": "ex4d.video:decode",
    "find_shots": "pipelines.preprocess.stages.shots:find_shots",
    "poses_of": "pipelines.preprocess.stages.pair:poses_of",
}


def call(config: PreprocessConfig, function: str, *args: Any, needs_s: float = 0.0) -> Any:
    """Run the named function of FUNCTIONS in this process's child; return its result.

    Args:
        needs_s: seconds that a valid file may need; both time limits are scaled up to allow for it.

    Raises:
        BadSample: decode_timeout, decode_cpu, decode_memory, decode_crash, or what the function raised.
    """
    limits = config.limits
    factor = max(1.0, needs_s / limits.timeout_s)
    allowed = isolation.Limits(limits.timeout_s * factor, limits.cpu_s * factor, limits.memory_mb << 20)
    try:
        return isolation.run(function, args, allowed, table=__name__)
    except BadSample as error:
        if error.reason != "decode_crash":
            raise
        # The output of a crash contains addresses; rejects.parquet must have the same bytes on every run.
        logger.warning("%s", error)
        raise BadSample(error.reason, error.message.partition(". ")[0]) from None
