"""Calls to a store that fail for a passing reason are tried again, a fixed number of times; others are not.

Passing are lost connections, timeouts, and what a server calls its own trouble (5xx, 408, 425, 429; S3's SlowDown is a
503). What is not there (404) or not allowed (401, 403) stays so. A store's client tries single requests again by
itself; this is around whole operations, such as an upload of many parts, and the same for every store.
"""

from __future__ import annotations

import errno
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ex4d import web
from ex4d.redact import redacted

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_DELAY_S = 0.25  # doubled each time, ± half of it: 3.75 s in all on average

Result = TypeVar("Result")

# Base classes of what the stores' clients raise beside OSError; looked up only where the client is loaded already.
_CLIENT_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "httpx": ("HTTPError",),
    "requests": ("RequestException",),
}
# Classes, by name, that say that a connection broke.
_BROKEN = {
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("TransportError", "Timeout", "ChunkedEncodingError"),  # httpx, requests
}
_PASSING_STATUS = (408, 425, 429, *(status for status in range(500, 600) if status not in (501, 505)))
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.EOPNOTSUPP)


class Unavailable(OSError):
    """An operation failed for a passing reason as often as it was tried."""


class TooLarge(OSError):
    """A file has more bytes than the caller takes."""


class Truncated(OSError):
    """A download gave another number of bytes than was announced."""


def call(operation: Callable[[], Result], url: str) -> Result:
    """Return what `operation` returns.

    Args:
        operation: may run several times, so each run must bring the same.
        url: named in the error, without what may be secret in it.

    Raises:
        Unavailable: every attempt failed for a passing reason.
        Truncated: every attempt did, and the last so.
        OSError: FileNotFoundError and PermissionError among them; the messages hold nothing of what the server said.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except _catchable() as error:
            if not is_passing(error):
                raise _lasting(error, url) from None
            log.info("attempt %d of %d at %s: %s", attempt, ATTEMPTS, redacted(url), _named(error))
            if attempt == ATTEMPTS:
                if isinstance(error, Truncated):
                    raise error from None
                failed = f"{ATTEMPTS} attempts failed, the last with {_named(error)}"
                raise Unavailable(errno.EIO, failed, redacted(url)) from None
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))  # else all workers retry in step
    raise AssertionError("the last attempt returns or raises")


def is_passing(error: BaseException) -> bool:
    """Return True where the same call may succeed later."""
    if isinstance(error, Unavailable | TooLarge) or _refused(error):
        return False  # it was tried often enough
    status, code = _answer(error)
    if code == "NoSuchUpload":  # of a multipart upload whose end was tried twice: the upload begins again
        return True
    if status is not None:
        return status in _PASSING_STATUS
    if any(_is_broken(cause) for cause in _causes(error)):
        return True
    return isinstance(error, OSError) and not isinstance(error, _LASTING) and error.errno not in _LASTING_ERRNO


def _catchable() -> tuple[type[BaseException], ...]:
    loaded = ((sys.modules.get(module), names) for module, names in _CLIENT_ERRORS.items())
    return (OSError, *(getattr(module, name) for module, names in loaded if module for name in names))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _refused(error: BaseException) -> web.PrivateHost | web.OtherHost | None:
    return next((cause for cause in _causes(error) if isinstance(cause, web.PrivateHost | web.OtherHost)), None)


def _is_broken(error: BaseException) -> bool:
    return any(base.__name__ in _BROKEN for base in type(error).__mro__)


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Return the status and the store's own code of the answer that an error stands for, (None, "") for no answer."""
    for cause in _causes(error):
        if _is_broken(cause):
            break  # below it lie a client's own parsers, with codes that nobody sent
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        for holder, name in ((response, "status_code"), (cause, "status"), (cause, "code")):
            status = getattr(holder, name, None)
            if str(status).isdecimal():
                return int(str(status)), ""
    return None, ""


def _named(error: BaseException) -> str:
    status, _ = _answer(error)
    if status is not None:
        return f"status {status}"
    return type(next((cause for cause in _causes(error) if _is_broken(cause)), error)).__name__


def _lasting(error: BaseException, url: str) -> OSError:
    status, _ = _answer(error)
    if refused := _refused(error):
        return type(refused)(refused.errno, refused.strerror, redacted(url))
    if isinstance(error, Unavailable | TooLarge):
        return error
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "No such file", redacted(url))
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return PermissionError(errno.EACCES, "Not allowed", redacted(url))
    number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
    return OSError(number, f"refused with {_named(error)}", redacted(url))
