"""Retry calls to a store that fail for a transient reason, a fixed number of times; other errors are final.

Transient are lost connections, timeouts, and a server's own failures (5xx except 501 and 505, 408, 425, 429; S3's
SlowDown is a 503). Missing (404) or forbidden (401, 403) files are not. A store's client retries single requests by
itself; this retries whole operations, such as an upload of many parts, in the same way for every store.
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
FIRST_DELAY_S = 0.25  # doubled each time, with ± 50 % jitter: 3.75 s in total on average

Result = TypeVar("Result")

# Base classes of what the stores' clients raise besides OSError; looked up only if the client is already loaded.
_CLIENT_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "httpx": ("HTTPError",),
    "requests": ("RequestException",),
}
# Names of classes that mean that a connection broke.
_BROKEN = {
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError"),  # botocore
    *("TransportError", "Timeout", "ChunkedEncodingError"),  # httpx, requests
}
_PASSING_STATUS = (408, 425, 429, *(status for status in range(500, 600) if status not in (501, 505)))
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.EOPNOTSUPP)


class Unavailable(OSError):
    """Every attempt at an operation failed for a transient reason."""


class TooLarge(OSError):
    """A file has more bytes than the caller accepts."""


class Truncated(OSError):
    """A download returned another number of bytes than announced."""


def call(operation: Callable[[], Result], url: str) -> Result:
    """Call `operation`, retrying transient failures, and return its result.

    Args:
        operation: may run several times, so it must be idempotent.
        url: named in errors, without what may be secret in it.

    Raises:
        Unavailable: every attempt failed for a transient reason.
        Truncated: the same, and the last attempt was truncated.
        OSError: including FileNotFoundError and PermissionError; messages hold nothing of the server's text.
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
    """Return whether an error is transient: the same call may succeed later."""
    if isinstance(error, Unavailable | TooLarge) or _refused(error):
        return False  # retried often enough, too large, or refused by our rules
    status, code = _answer(error)
    if code == "NoSuchUpload":  # completion of a multipart upload was sent twice: restart the upload
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
    """Return (HTTP status, the store's own error code) of the response behind an error, (None, "") if there is none."""
    for cause in _causes(error):
        if _is_broken(cause):
            break  # deeper causes are errors of a client's parsers, whose codes no server sent
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
