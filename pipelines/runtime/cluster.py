"""Start a Ray instance on this machine or join a cluster, with token authentication. No other module does either.

Every Ray instance requires a token, because anyone who can reach its ports can run code. An instance started here
listens on the loopback only; the ports of a cluster listen on all addresses. The token is Ray's own: RAY_AUTH_TOKEN or
the file RAY_AUTH_TOKEN_PATH if one of them is set, else ~/.ray/auth_token, which is created here and readable by its
owner alone. Ray's sockets and logs lie in a folder private to this user; Ray by itself makes them writable by everyone.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ex4d.errors import ConfigError

CONNECT_TIMEOUT_S = 15.0  # connecting to a head on a busy machine took 3 s
UNEXPECTED = 2  # NodeDeathInfo.UNEXPECTED_TERMINATION in Ray's gcs.proto; nodes that were scaled down have another
# "0" is Ray's default on Windows and macOS: one machine only, with ports that listen on the loopback alone.
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
WORKING_DIR = "runtime_resources/working_dir_files"  # where Ray unpacks the working directory of a submitted job


def require_token() -> None:
    """Require token authentication in this process and its children; create the token if there is none.

    A RAY_AUTH_MODE that is already set is kept, so that a cluster without authentication remains usable.

    Raises:
        ConfigError: the token file cannot be written.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "ray" in sys.modules:
        import ray._raylet

        ray._raylet.Config.initialize("")  # type: ignore[attr-defined] # Ray reads its environment once, when it is imported
    if os.environ["RAY_AUTH_MODE"] != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = token_path()
    try:
        _make_token(path)
    except OSError as error:
        allowed = (
            f"a folder that can be written to, for Ray's token ({error.strerror}): set HOME to one, or "
            "RAY_AUTH_TOKEN_PATH to a file with a secret of yours"
        )
        raise ConfigError("HOME", str(path.parent.parent), allowed) from error


def _make_token(path: Path) -> None:
    """Create a token unless there is one. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # 0600; other processes never see a partial token
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        os.link(temporary, path)
    except FileExistsError:
        path.chmod(0o600)  # Ray by itself makes it readable by everyone
    finally:
        os.unlink(temporary)


def require_private_folder() -> None:
    """Make Ray instances that this process and its children start keep their files in a folder private to this user.

    A RAY_TMPDIR that is already set is kept.

    Raises:
        ConfigError: the folder belongs to another user.
    """
    if os.environ.get("RAY_TMPDIR"):
        return
    # A short name, since the path of a Unix socket is limited to 107 bytes.
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"ex4d_{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise ConfigError("RAY_TMPDIR", str(folder), "a folder of your own: this one was made by somebody else")
    folder.chmod(0o700)
    os.environ["RAY_TMPDIR"] = str(folder)


def token_path() -> Path:
    """Return the path of this user's token file."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


@contextmanager
def connected(
    address: str | None,
    num_cpus: int | None = None,
    object_store_mb: int | None = None,
    show_workers: bool = False,
) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start an instance on this machine; leave or stop it at the end.

    If this process is already connected to Ray, that connection is used and left open.

    Args:
        address: "auto" or "host:port"; None starts a new instance, even if others run on this machine.
        num_cpus, object_store_mb: resources of an instance started here; None lets Ray choose.
        show_workers: print the output of workers here.

    Raises:
        ConfigError: nothing answers at the address, or it refuses the token; or an instance started here is not ready
            in time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # the output of workers is shown without control characters
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    require_token()
    import ray

    if ray.is_initialized():
        yield
        return
    if address is None:
        require_private_folder()
        _start(num_cpus, object_store_mb, show_workers)
    else:
        _join(address, show_workers)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray instance started in the block listen on the loopback only; its processes inherit the setting."""
    from ray._private import ray_constants

    before = os.environ.get(CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # set both: Ray may be imported already
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(CLUSTERS) if before[0] is None else os.environ.update({CLUSTERS: before[0]})


def _start(num_cpus: int | None, object_store_mb: int | None, show_workers: bool) -> None:
    import ray

    with _on_loopback():
        try:
            ray.init(
                address="local",  # not a cluster that Ray remembers for this machine
                num_cpus=num_cpus,
                object_store_memory=None if object_store_mb is None else object_store_mb << 20,
                include_dashboard=False,
                dashboard_host="127.0.0.1",
                log_to_driver=show_workers,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            if "timed out during startup" not in str(error):  # Ray has no exception class for this
                raise
            allowed = "a running Ray, or null on a machine that starts one within 30 s: this one is too busy; try later"
            raise ConfigError("ray.address", None, allowed) from error


def _join(address: str, show_workers: bool) -> None:
    import ray

    head = _bootstrap(address)
    _check_head(address, head)
    try:
        ray.init(address=head, log_to_driver=show_workers, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        allowed = f"a Ray of this version with a node on this machine ({reason})"
        raise ConfigError("ray.address", address, allowed) from error


def _bootstrap(address: str) -> str:
    """Resolve "auto" or an address to host:port. Raises ConfigError if there is nothing to join."""
    if address.startswith("ray://"):
        raise ConfigError("ray.address", address, "host:port: the driver must run on a machine of the cluster")
    if address != "auto":
        return address
    found = os.environ.get("RAY_ADDRESS") or next(iter(_own_heads()), None)
    if found in (None, "", "auto", "local"):
        raise ConfigError("ray.address", address, "host:port of a running Ray; none of yours was found on this machine")
    return str(found)


def _own_heads() -> list[str]:
    """Return host:port of this user's Ray heads on this machine, newest first.

    Heads of other users are left out, because joining one would send it our token.
    """
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or is hidden
            words = (process / "cmdline").read_text(errors="replace").split("\0")
            heads = [word.partition("=")[2] for word in words if word.startswith("--gcs-address=")]
            if words[0].endswith("/raylet") and heads and process.stat().st_uid == os.getuid():
                started = int((process / "stat").read_text().rpartition(")")[2].split()[19])  # proc(5), field 22
                found[heads[0]] = max(started, found.get(heads[0], 0))
    return sorted(found, key=found.__getitem__, reverse=True)


def _check_head(address: str, head: str) -> None:
    """Raise ConfigError if no head answers or it refuses our token; Ray itself would retry for minutes."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    host, _, port = head.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError("ray.address", address, "host:port of a Ray head, such as 10.0.0.1:6379, or auto")
    channel = init_grpc_channel(head, [("grpc.enable_http_proxy", 0)])
    try:
        request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).CheckAlive(request, timeout=CONNECT_TIMEOUT_S)
    except (grpc.RpcError, ray.exceptions.AuthenticationError) as error:
        if not isinstance(error, grpc.RpcError) or error.code() == grpc.StatusCode.UNAUTHENTICATED:
            allowed = (
                f"a Ray with the token in {token_path()}, which this one refuses. Copy the head's token there with "
                "mode 0600, or set RAY_AUTH_TOKEN_PATH"
            )
        else:
            why = error.code().name.lower().replace("_", " ")
            allowed = f"a running Ray; none answers there ({why}). Start it, or leave ray.address out to start one here"
        raise ConfigError("ray.address", address, allowed) from error
    finally:
        channel.close()


def count_nodes() -> dict[str, int]:
    """Return {"alive": nodes of the connected cluster, "lost": those that died unexpectedly}; {} if not connected."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return {}
    import ray

    nodes = ray.nodes()
    lost = [node for node in nodes if not node["Alive"] and node.get("DeathReason") == UNEXPECTED]
    return {"alive": sum(node["Alive"] for node in nodes), "lost": len(lost)}


def free_address(address: str, port: int = 0) -> tuple[str, int]:
    """Return (address, port) where rank 0 can listen on this node; `port` 0: any free one. Raises OSError if taken."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return address, probe.getsockname()[1]


def check_output(key: str, path: str) -> None:
    """Raise ConfigError for an output inside the working directory of a submitted job, which Ray deletes later."""
    folder = os.path.abspath(path)
    if "://" not in path and WORKING_DIR in folder:
        allowed = (
            "an absolute path on storage that all nodes share, or an object store URL: this job runs in a folder of "
            "Ray's, which is deleted"
        )
        raise ConfigError(key, path, allowed)
