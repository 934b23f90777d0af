"""Packing survives a real `kill -9` at moments spread over its whole run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from make_data import REJECTS, facts

from ex4d.data.shards import pack
from ex4d.data.verify import verify

PACK = """
import json, sys, time
from ex4d import storage
from ex4d.data.shards import Staged, pack
move = storage.move_file
storage.move_file = lambda *place: (time.sleep(0.02), move(*place))  # so that the kills fall between the steps
staged, output, facts, rejects = json.loads(sys.argv[1])
print("ready", flush=True)
pack([Staged(*item) for item in staged], output, facts, rejects, shard_size_bytes=60_000)
"""


def test_kill_9_while_packing_loses_nothing(staged16, tmp_path, root: Path):
    pack(staged16, str(tmp_path / "calm"), facts(16), REJECTS, shard_size_bytes=60_000)
    calm, output = verify(str(tmp_path / "calm")), str(tmp_path / "killed")
    items = [(item.key, item.split, item.url) for item in staged16]
    argument = json.dumps([items, output, facts(16), REJECTS])
    killed = 0
    for delay in (0.01, 0.06, 0.12, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", PACK, argument], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.kill()
        killed += process.wait() != 0
        process.stdout.close()
        committed = Path(output, "dataset.json").exists()
        assert not committed or verify(output).tree_sha256 == calm.tree_sha256
    assert killed >= 2
    pack(staged16, output, facts(16), REJECTS, shard_size_bytes=60_000)
    report = verify(output)
    assert report.ok
    assert report.tree_sha256 == calm.tree_sha256
    assert not list(Path(output).glob(".tmp-*"))
    assert not list(Path(output).rglob(".tmp-*"))
