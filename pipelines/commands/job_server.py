"""The job server of a Ray cluster: connect to it, submit and follow a job, report how the job ended."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ex4d.errors import ConfigError
from ex4d.redact import printable, redacted
from pipelines.runtime.cluster import require_token, token_path

DEFAULT = "http://127.0.0.1:8265"
TIMEOUTS_S = (5.0, 60.0)  # to connect; to wait for a response
MAX_REASON = 300  # maximum characters of a server's message
AGENT_S = 60.0  # how long to retry, since a head that has just started has no agent yet
INTERRUPTED, STOPPED = 130, 75
# What Ray's client raises for a response that is not (the expected) JSON; RuntimeError: for a status other than 200.
INVALID = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
HELP = f"address of the head's job server; default: RAY_API_SERVER_ADDRESS, else {DEFAULT}"


def connect(address: str | None) -> tuple[Any, str]:
    """Return (client, address) of a job server that responds and accepts our token.

    Raises:
        ConfigError: nothing answers at the address, or it refuses the token.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT
    if not address.startswith(("http://", "https://")):
        raise ConfigError("address", redacted(address), "must be http://HOST:8265, the job server of the head")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would prefer them to the argument
    require_token()
    import requests  # type: ignore[import-untyped, unused-ignore]
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **options: Any) -> Any:
            # Without a timeout it would wait forever, and a redirect would take the token to another server.
            return super()._do_request(*args, timeout=TIMEOUTS_S, allow_redirects=False, **options)

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # each sets its own level, below that of the command
    try:
        return Client(address), address
    except AuthenticationError as error:
        allowed = (
            f"a Ray with the token in {token_path()}, which this one refuses. Copy the head's token there with mode "
            "0600, or set RAY_AUTH_TOKEN_PATH"
        )
        raise ConfigError("address", redacted(address), allowed) from error
    except (*INVALID, ConnectionError, requests.RequestException) as error:
        allowed = "the job server of a running Ray, port 8265 of its head; none answers there"
        raise ConfigError("address", redacted(address), allowed) from error


@contextmanager
def answers(address: str) -> Iterator[None]:
    """Convert invalid responses of the job server inside the block to a ConnectionError with one sentence."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (*INVALID, AuthenticationError) as error:
        raise ConnectionError(
            f"the job server at {redacted(address)} gave no valid answer: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return printable(str(error).strip().split("\n")[0])[:MAX_REASON]


def submit(client: Any, **job: Any) -> str:
    """Submit a job and return its id; retry while a cluster that has just started does not accept jobs yet.

    Raises:
        ConnectionError: the server does not accept the job.
    """
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            return client.submit_job(**job)
        except INVALID as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                reason = _reason(error)
                if "No available agent" in reason:
                    port = "--dashboard-agent-listen-port=PORT"
                    reason += f" If another Ray runs on the head's machine, start this one with {port}."
                raise ConnectionError(f"the job server did not accept the job: {reason}") from error
            time.sleep(1.0)


def follow(client: Any, job_id: str, address: str) -> int:
    """Print the log of a job until it ends; return its exit status. Ctrl-C returns 130, and the job continues."""
    import aiohttp

    try:
        asyncio.run(_print_log(client, job_id))
        return _ended(client, job_id)
    except KeyboardInterrupt:
        print(f"\n{job_id} is still running. {how_to(job_id, address)}", file=sys.stderr)
        return INTERRUPTED
    except (*INVALID, OSError, aiohttp.ClientError) as error:
        print(f"{job_id} can no longer be followed ({_reason(error)}). {how_to(job_id, address)}", file=sys.stderr)
        return 1


async def _print_log(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        sys.stdout.write(printable(lines))
        sys.stdout.flush()


def how_to(job_id: str, address: str) -> str:
    """Return instructions for following, stopping and resuming a job."""
    where = "" if address == DEFAULT else f" --address {redacted(address)}"
    return (
        f"Follow it: ex4d jobs {job_id} --follow{where}; stop it: ex4d jobs {job_id} --stop{where}; the same "
        "`ex4d submit` after that does what is missing."
    )


def _ended(client: Any, job_id: str) -> int:
    """Return the exit status of a job whose log has ended, and print how it ended."""
    while not (info := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(0.5)
    state = str(info.status.value)
    if state == "SUCCEEDED":
        print(f"{job_id}: done")
        return 0
    if state == "STOPPED":
        print(f"{job_id} was stopped; run the same `ex4d submit` again to resume", file=sys.stderr)
        return STOPPED
    code = info.driver_exit_code
    message = printable((info.message or "").strip().split("\n")[0])
    print(f"{job_id} failed: {message}", file=sys.stderr)
    return code if code and code > 0 else 1
