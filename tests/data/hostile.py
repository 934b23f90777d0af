"""Datasets of a stranger: bombs that are small on disk, and seeded damage of every kind of file. Run as a program, it
takes each through verify, view and the loader and prints what happened, with the most memory that it took."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ex4d.errors import ConfigError, ContractError

Change = Callable[[Path], None]


def edit_json(name: str, change: Callable[[dict], object]) -> Change:
    """Return a function that changes a JSON file of a dataset."""

    def apply(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        change(body)
        (folder / name).write_text(json.dumps(body))

    return apply


def replaced(name: str, data: bytes) -> Change:
    """Return a function that replaces a file."""
    return lambda folder: (folder / name).write_bytes(data) and None


def reseal(folder: Path) -> None:
    """Update the hashes in dataset.json to the tables, as the author of a hostile dataset can."""
    body = json.loads((folder / "dataset.json").read_text())
    for name in body["sha256"]:
        if (folder / name).is_file():
            body["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(body))


def swapped(name: str, data: bytes) -> Change:
    """Return a function that replaces a member of every sample and rebuilds all tables and hashes."""

    def apply(folder: Path) -> None:
        from ex4d.data.tar import END, read_sample, sample_tar

        table, offset, blobs = pq.read_table(folder / "manifest.parquet"), {}, {}
        rows = table.to_pylist()
        for row in rows:
            old = (folder / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
            members = read_sample(old, row["key"]) | {name: data}
            blob, start = sample_tar(row["key"], members), offset.get(row["shard"], 0)
            place = 0
            for member in row["members"]:
                body = members[member["name"]]
                member |= {
                    "offset": start + place + 512,
                    "length": len(body),
                    "sha256": hashlib.sha256(body).hexdigest(),
                }
                place += 512 + len(body) + -len(body) % 512
            row |= {"offset": start, "length": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
            offset[row["shard"]] = start + len(blob)
            blobs[row["shard"]] = blobs.get(row["shard"], b"") + blob
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shardlist"]:
            data_of = blobs[shard["url"]] + END
            (folder / shard["url"]).write_bytes(data_of)
            shard |= {"filesize": len(data_of), "sha256": hashlib.sha256(data_of).hexdigest()}
        (folder / "index.json").write_text(json.dumps(index))
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / "manifest.parquet")
        reseal(folder)

    return apply


def mask_bomb() -> bytes:
    """Return a masks.npz of a few megabytes that unpacks to two gigabytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, dtype, shape in (
            ("kind", "u1", (3,)),
            ("hole_share", "f4", (3, 5)),
            ("visible_packed", "u1", (2**31,)),
        ):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                left = int(np.prod(shape)) * np.dtype(dtype).itemsize
                while left > 0:
                    member.write(bytes(min(left, 1 << 24)))
                    left -= 1 << 24
    return out.getvalue()


def npy_header_bomb() -> bytes:
    """Return a masks.npz whose npy header declares a gigabyte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("kind", "hole_share", "visible_packed"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + b" " * 1000)
    return out.getvalue()


def long_video() -> bytes:
    """Return a small mp4 of 1,500 black frames of 1024 x 1024: over four gigabytes as pixels."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 1024
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", "crf": "51"}
        frame = av.VideoFrame.from_ndarray(np.zeros((1024, 1024, 3), np.uint8), format="rgb24").reformat(
            format="yuv420p"
        )
        for number in range(1500):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def wide_dictionary(folder: Path) -> None:
    """Give every row of the manifest the same text of megabytes, which takes kilobytes on disk."""
    table = pq.read_table(folder / "manifest.parquet")
    index = table.column_names.index("source_path")
    many = pa.concat_tables([table] * 64)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * len(many), pa.int32()), pa.array(["a" * (8 << 20)]))
    pq.write_table(many.set_column(index, "source_path", text), folder / "manifest.parquet", compression="zstd")
    reseal(folder)


def special(name: str, make: Callable[[Path], object]) -> Change:
    """Return a function that replaces a file by a pipe or a link."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


BOMBS: dict[str, Change] = {
    "masks that unpack to 2 GiB": swapped("masks.npz", mask_bomb()),
    "an npy header of 1 GiB": swapped("masks.npz", npy_header_bomb()),
    "json nested a million deep": swapped("json", b"[" * 10**6),
    "dataset.json nested": replaced("dataset.json", b'{"a":' * 10**5),
    "dataset.json is a pipe": special("dataset.json", lambda path: os.mkfifo(path)),
    "dataset.json is /dev/zero": special("dataset.json", lambda path: path.symlink_to("/dev/zero")),
    "manifest is /dev/zero": special("manifest.parquet", lambda path: path.symlink_to("/dev/zero")),
    "index.json of 2^41 bytes": edit_json("index.json", lambda body: body["shardlist"][0].update(filesize=2**41)),
    "a shard that is a pipe": special("shards/train-000000.tar", lambda path: os.mkfifo(path)),
    "num_frames 2^41": edit_json("dataset.json", lambda body: body["sample"].update(num_frames=2**41)),
    "size 2^20": edit_json("dataset.json", lambda body: body["sample"].update(size=[2**20, 2**20])),
    "num_masks 10^9": edit_json("dataset.json", lambda body: body["sample"].update(num_masks=10**9)),
    "a huge number": replaced("dataset.json", b'{"a":' + b"9" * 10**6 + b"}"),
    "one text of megabytes in every row": wide_dictionary,
}


def slow_bombs() -> dict[str, Change]:
    """Return bombs that take seconds to build."""
    return {"a clip of 1,500 frames": swapped("mp4", long_video())}


def fuzzed(seed: int) -> Change:
    """Return seeded damage to bytes of a file, values of a JSON, or cells of the manifest, with updated hashes."""
    rng = np.random.default_rng([seed, 13])

    def apply(folder: Path) -> None:
        kind = seed % 4
        if kind == 0:
            names = ("index.json", "manifest.parquet", "rejects.parquet", "shards/train-000000.tar", "dataset.json")
            path = folder / names[int(rng.integers(len(names)))]
            data = bytearray(path.read_bytes())
            for position in rng.integers(0, len(data), int(rng.integers(1, 40))):
                data[position] ^= int(rng.integers(1, 256))
            path.write_bytes(data[: int(rng.integers(1, len(data)))] if seed % 8 == 0 else data)
        elif kind == 1:
            path = folder / ("dataset.json", "index.json")[int(rng.integers(2))]
            path.write_text(json.dumps(_spoiled(json.loads(path.read_text()), rng)))
        elif kind == 2:
            _spoil_table(folder, rng)
        else:
            names = ("masks.npz", "json", "camera.json", "mp4", "txt")
            swapped(names[int(rng.integers(5))], rng.bytes(int(rng.integers(0, 300))))(folder)
        if rng.integers(2) and (folder / "dataset.json").stat().st_size and kind != 1:
            try:
                reseal(folder)
            except (ValueError, KeyError, TypeError, AttributeError):
                return

    return apply


ODD = (None, -1, 0, 2**41, 2**63, 1e308, "", "../../etc/passwd", "\u202e\x1b[31m", [], {}, [[]], True, "9" * 5000)


def _spoiled(value: object, rng: np.random.Generator) -> object:
    """Return a JSON value with one of its leaves or branches replaced."""
    if isinstance(value, dict) and value and rng.integers(6):
        name = sorted(value)[int(rng.integers(len(value)))]
        return {**value, name: _spoiled(value[name], rng)}
    if isinstance(value, list) and value and rng.integers(4):
        place = int(rng.integers(len(value)))
        return [*value[:place], _spoiled(value[place], rng), *value[place + 1 :]]
    return ODD[int(rng.integers(len(ODD)))]


def _spoil_table(folder: Path, rng: np.random.Generator) -> None:
    name = ("manifest.parquet", "rejects.parquet")[int(rng.integers(2))]
    table = pq.read_table(folder / name)
    rows = table.to_pylist()
    for _ in range(3):
        row = rows[int(rng.integers(len(rows)))]
        column = sorted(row)[int(rng.integers(len(row)))]
        if column == "members":
            member = row[column][int(rng.integers(len(row[column])))]
            member[("offset", "length")[int(rng.integers(2))]] = int(rng.choice([-1, 0, 2**41, 2**62, -(2**62)]))
        elif isinstance(row[column], str):
            row[column] = str(rng.choice(["", "x" * 300, "shards/train-000000.tar", "../x", "\u202e\x1b[0m[/red]"]))
        elif isinstance(row[column], int):
            row[column] = int(rng.choice([-1, 0, 2**41, 2**62, -(2**62)]))
        else:
            row[column] = float(rng.choice([np.nan, np.inf, -1.0]))
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / name)


def try_all(folder: str) -> dict[str, object]:
    """Return the outcomes of verify, view and the loader on a dataset: problems, or the expected error."""
    from ex4d.data.loader import LoaderConfig, ShardLoader
    from ex4d.data.verify import verify
    from ex4d.viewer import sample_page

    started = time.monotonic()
    report = verify(folder, full=True, trust="foreign")
    str(report)
    found: dict[str, object] = {"problems": list(report.problems)[:3], "ok": report.ok}
    try:
        sample_page.samples_page(folder, (), 2, "foreign")
        found["view"] = "a page"
    except (ContractError, ConfigError, OSError) as error:
        found["view"] = str(error)[:100]
    for trust in ("foreign", "own"):
        try:
            config = LoaderConfig(0, 0, trust=trust, max_bad_samples=0)
            next(ShardLoader(folder, "train", 2, 0, config=config))
            found[f"loader {trust}"] = "a batch"
        except (ContractError, ConfigError, OSError) as error:
            found[f"loader {trust}"] = str(error)[:100]
    return found | {"seconds": round(time.monotonic() - started, 2)}


def main(original: str, work: str, which: str) -> None:
    """Print {name: what happened} of bombs, or of fuzzed datasets "FIRST:STOP"; and the most memory that it took."""
    if which == "bombs":
        changes = BOMBS
    elif which == "slow":
        changes = slow_bombs()
    else:
        first, stop = map(int, which.split(":"))
        changes = {f"seed {seed}": fuzzed(seed) for seed in range(first, stop)}
    found = {}
    for name, change in changes.items():
        folder = Path(work) / "one"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        change(folder)
        # Building a bomb takes memory too: count only what reading it adds.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[name] = try_all(str(folder))
        found[name]["grew_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    peaks = {"own": resource.RUSAGE_SELF, "child": resource.RUSAGE_CHILDREN}
    print(json.dumps({"found": found, "peak_mb": {n: resource.getrusage(k).ru_maxrss >> 10 for n, k in peaks.items()}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
