"""`ex4d doctor --cluster`: check every node of a Ray cluster and the links between them, in under a minute."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ex4d.errors import ConfigError
from ex4d.redact import printable, terminal
from pipelines.commands import job_server, node_checks, node_pairs
from pipelines.commands.node_checks import Asked, Finding
from pipelines.runtime.cluster import connected, free_address

LIMIT_S = 40.0  # time limit of one check over all nodes
MAX_SKEW_S = 1.0
BETWEEN = "between nodes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d doctor --cluster`."""
    group = parser.add_argument_group("with --cluster")
    group.add_argument("--cluster", action="store_true", help="check every node of a running Ray cluster")
    group.add_argument(
        "--address",
        default="auto",
        help="auto or HOST:6379 on a machine of the cluster; http://HOST:8265 from outside, which submits the check as "
        "a job (default: %(default)s)",
    )
    group.add_argument(
        "--storage", action="append", default=[], metavar="FOLDER", help="folder that all nodes share; repeatable"
    )
    group.add_argument(
        "--weights", action="append", default=[], metavar="BASE", help="base model that all nodes need; repeatable"
    )
    group.add_argument(
        "--min-disk-gb",
        type=float,
        default=10.0,
        metavar="GB",
        help="free space that each disk needs (default: %(default)g)",
    )
    group.add_argument(
        "--port", type=int, default=0, help="port of rank 0 in the all-reduce between nodes (default: any free one)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `ex4d doctor --cluster`; return 1 if a check failed, else 0."""
    if args.address.startswith(("http://", "https://")):
        return _as_job(args)
    for folder in args.storage:
        if not os.path.isabs(folder):
            raise ConfigError("storage", folder, "must be an absolute path of a folder that all nodes share")
    with connected(args.address):
        rows = check(args.storage, args.weights, args.min_disk_gb, args.port)
    if args.json:
        print(json.dumps([{"node": node, **asdict(finding)} for node, finding in rows], indent=2))
    else:
        _print_table(rows)
    return 1 if any(finding.ok is False for _, finding in rows) else 0


def _as_job(args: argparse.Namespace) -> int:
    from pipelines.commands.submit import start

    words = ["ex4d", "doctor", "--cluster", *(["--json"] if args.json else [])]
    words += [word for folder in args.storage for word in ("--storage", folder)]
    words += [word for base in args.weights for word in ("--weights", base)]
    words += ["--min-disk-gb", f"{args.min_disk_gb:g}", "--port", str(args.port)]
    client, address = job_server.connect(args.address)
    job_id = start(client, shlex.join(words), {"job": "doctor", "config": ""})
    return job_server.follow(client, job_id, address)


def check(storages: Sequence[str], weights: Sequence[str], min_disk_gb: float, port: int) -> list[tuple[str, Finding]]:
    """Return (node, finding) of every check on every node of the connected Ray cluster."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = Asked(node_checks.versions(), tuple(storages), tuple(weights), min_disk_gb, gpus=0)
    names = _names(nodes)
    looks = [(replace(asked, gpus=int(node["Resources"].get("GPU", 0))),) for node in nodes]
    rows = []
    for name, found in zip(names, _on_nodes(node_checks.look, nodes, looks), strict=True):
        if isinstance(found, str):
            remedy = "the node does not run ex4d's tasks: check its log, its load and that ex4d is installed there"
            rows.append((name, Finding("answer", found, False, remedy)))
        else:
            rows += [(name, finding) for finding in found]
    rows += [(name, _clock(node)) for name, node in zip(names, nodes, strict=True)]
    for folder in storages:
        rows += [(BETWEEN, finding) for finding in _storage(folder, nodes, names)]
    return [*rows, (BETWEEN, _all_reduce(nodes, names, port))]


def _names(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the address of each node; if nodes share an address, also the start of each node's id."""
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    if len(set(addresses)) == len(nodes):
        return addresses
    return [f"{address} {node['NodeID'][:6]}" for address, node in zip(addresses, nodes, strict=True)]


def _on_nodes(
    work: Callable[..., Any],
    nodes: Sequence[dict[str, Any]],
    arguments: Sequence[tuple],
    num_gpus: int = 0,
    limit_s: float = LIMIT_S,
) -> list[Any]:
    """Run work(*arguments) on each node in parallel; return the results, with a sentence in place of a missing one.

    Each call gets its own worker, so that its process group and its changed environment end with it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(max_calls=1)(work)
    calls = []
    for node, words in zip(nodes, arguments, strict=True):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        how = {"num_cpus": 0, "num_gpus": num_gpus, "max_retries": 0, "scheduling_strategy": there}
        calls.append(task.options(**how).remote(*words))
    ray.wait(calls, num_returns=len(calls), timeout=limit_s)
    results = []
    for call in calls:
        try:
            results.append(ray.get(call, timeout=0))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(call, force=True)
            results.append(f"no answer within {limit_s:g} s")
        except ray.exceptions.RayError as error:
            results.append(str(error).strip().split("\n")[-1][:200])
    return results


def _clock(node: dict[str, Any]) -> Finding:
    """Return the offset of a node's clock from this machine's: the most accurate of three measurements."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(node_checks.now)
    task = task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
    answers = []
    for _ in range(3):
        before = time.time()
        try:
            there = ray.get(task.remote(), timeout=LIMIT_S / 4)
        except ray.exceptions.RayError:
            return Finding("clock", "no answer", False, "check the log of the node")
        after = time.time()
        answers.append(((after - before) / 2, there - (before + after) / 2))
    doubt, skew = min(answers)
    is_good = abs(skew) - doubt <= MAX_SKEW_S
    remedy = "" if is_good else "let the nodes keep time by NTP (chrony or systemd-timesyncd)"
    return Finding("clock", f"{skew:+.3f} s ± {doubt:.3f} s", is_good, remedy)


# ---------------------------------------------------------------- shared storage


def _storage(folder: str, nodes: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Finding]:
    """Check that all nodes see the same folder, and that O_EXCL, flock and rename work between them."""
    place = os.path.join(folder, f".ex4d-doctor-{secrets.token_hex(4)}")
    word = secrets.token_hex(8)
    try:
        os.mkdir(place)
        with open(os.path.join(place, "driver"), "w", encoding="utf-8") as file:
            file.write(word)
    except OSError as error:
        text = f"cannot be written to from here: {error.strerror}"
        return [Finding(f"storage {folder}", text, False, "mount it on every node, writable for this user")]
    racing = list(nodes) if len(nodes) > 1 else [nodes[0], nodes[0]]
    titles = list(names) if len(nodes) > 1 else [names[0], names[0]]
    try:
        words = [(place, word, index, len(racing)) for index in range(len(racing))]
        races = _on_nodes(node_pairs.race, racing, words)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return _judge(folder, titles, races)


def _judge(folder: str, names: Sequence[str], races: Sequence[Any]) -> list[Finding]:
    """Return the findings about a shared folder: visibility, O_EXCL, flock and rename."""
    title = f"storage {folder}"
    blind = [
        f"{name} ({race if isinstance(race, str) else race.problem or 'does not see it'})"
        for name, race in zip(names, races, strict=True)
        if isinstance(race, str) or race.problem or not race.sees_driver or race.peers < len(races)
    ]
    if blind:
        remedy = "mount the same shared file system at this path on every node; ex4d keeps its data there"
        return [Finding(title, f"not one folder for all nodes: {', '.join(blind)}", False, remedy)]
    winners = [sum(number in race.won for race in races) for number in range(node_pairs.ROUNDS)]
    twice = sum(count != 1 for count in winners)
    holders = sum(race.locked for race in races)
    torn = sum(race.torn for race in races)
    remedy = "use a file system that is POSIX between nodes (NFS 4, Lustre, CephFS, GPFS), or an object store URL"
    facts = (
        ("created once (O_EXCL)", not twice, f"{twice} of {len(winners)} files were created by none or by several"),
        ("locked once (flock)", holders == 1, f"{holders} of {len(races)} held one lock"),
        ("rename is atomic", not torn, f"{torn} reads during renames found no file or a part of one"),
    )
    seen = Finding(title, f"one folder for {len(set(names))} node(s)")
    return [
        seen,
        *(Finding(f"{title}: {what}", "yes" if ok else no, ok, "" if ok else remedy) for what, ok, no in facts),
    ]


# ---------------------------------------------------------------- network


def _all_reduce(nodes: Sequence[dict[str, Any]], names: Sequence[str], port: int) -> Finding:
    """Measure the bandwidth of an all-reduce with one rank on each node."""
    if len(nodes) < 2:
        return Finding("all-reduce", "one node: nothing to measure", None)
    on_gpu = all(node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    kind = "NCCL" if on_gpu else "gloo"
    address = str(nodes[0]["NodeManagerAddress"])
    chosen = _on_nodes(free_address, nodes[:1], [(address, port)], limit_s=LIMIT_S / 2)[0]
    remedy = f"let the nodes reach each other on all TCP ports, among them {port or 'those above 1024'} of {address}"
    if isinstance(chosen, str):
        return Finding(f"all-reduce ({kind})", f"port {port} of {address} cannot be used: {chosen}", False, remedy)
    words = [(*chosen, rank, len(nodes), on_gpu) for rank in range(len(nodes))]
    answers = _on_nodes(node_pairs.all_reduce, nodes, words, num_gpus=int(on_gpu))
    failed = [
        f"{name}: {answer if isinstance(answer, str) else answer[1]}"
        for name, answer in zip(names, answers, strict=True)
        if isinstance(answer, str) or answer[1]
    ]
    if failed:
        return Finding(f"all-reduce ({kind})", f"port {chosen[1]} of {address}: {'; '.join(failed)}", False, remedy)
    slowest = min(answer[0] for answer in answers)
    return Finding(f"all-reduce ({kind})", f"{slowest:.2f} Gbit/s over {len(nodes)} nodes")


def _print_table(rows: Sequence[tuple[str, Finding]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("node", "check", "result", "found", "remedy", title="ex4d doctor --cluster")
    results = {True: "ok", False: "[red]FAIL[/red]", None: ""}
    for node, finding in rows:
        texts = (escape(printable(text)) for text in (node, finding.check, finding.found, finding.remedy))
        name, what, found, remedy = texts
        table.add_row(name, what, results[finding.ok], found, remedy)
    Console(file=terminal(sys.stdout), width=None if sys.stdout.isatty() else 200).print(table)
    failed = sum(finding.ok is False for _, finding in rows)
    print(f"{failed} of {len(rows)} checks failed" if failed else f"all {len(rows)} checks passed")
