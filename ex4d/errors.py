"""The errors of this project: three kinds of failure, and the decision of a filter. Any other exception is a bug."""

from __future__ import annotations

from ex4d.redact import without_secrets


class Ex4dError(Exception):
    """Base class of every error that this project raises on purpose."""


class ConfigError(Ex4dError):
    """The user's choice is invalid. Raised before any work; the command exits with 2.

    The message names the key, the value, and what is allowed.
    """

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        shown = repr(without_secrets(value))
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        super().__init__(f"{key}={shown}: {allowed}")

    def __reduce__(self) -> tuple:
        return type(self), (self.key, self.value, self.allowed)  # so that it survives pickling between processes


class BadSample(Ex4dError):
    """One video or clip cannot be used. It becomes a row of rejects.parquet and the run continues.

    Args:
        reason: short snake_case code that can be counted, e.g. "decode_timeout".
        message: one sentence with the facts.
    """

    def __init__(self, reason: str, message: str = ""):
        self.reason, self.message = reason, message
        super().__init__(reason, message)  # both in args, so that the error survives pickling between processes

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" if self.message else self.reason


class Filtered(Ex4dError):
    """A score of a clip misses a threshold. Not a failure, but recorded like one.

    Args:
        reason: the filter's name, e.g. "motion".
        score: the measured value.
        threshold: the limit that it missed.
        why: what that means, in one sentence; "" if the name says it.
    """

    def __init__(self, reason: str, score: float, threshold: float, why: str = ""):
        self.reason, self.score, self.threshold, self.why = reason, float(score), float(threshold), why
        super().__init__(reason, self.score, self.threshold, why)

    @property
    def message(self) -> str:
        figures = f"score {self.score:.6g}, threshold {self.threshold:.6g}"
        return f"{self.why} ({figures})" if self.why else figures

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ContractError(Ex4dError):
    """An artifact is not what it claims to be (a damaged shard, a checkpoint of another model). Work stops."""
