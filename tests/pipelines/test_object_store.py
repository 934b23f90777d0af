"""Preprocessing from a store into a store, where one request in twenty fails: the same bytes as a local run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import flaky_store
import numpy as np
import pytest
from small_corpus import CORPUS, choices, inline
from web_server import web_server

from ex4d import config as configuration
from ex4d import remote, storage
from ex4d.data.loader import LoaderConfig, ShardLoader
from ex4d.data.verify import verify
from ex4d.errors import BadSample
from ex4d.synthetic import write_corpus
from pipelines.preprocess import fetch, file_cache


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Videos with depth and captions beside them, a file that is not a video, a copy, and a broken file."""
    folder = tmp_path_factory.mktemp("corpus")
    first = write_corpus(folder, CORPUS)[0]
    (folder / "zz").mkdir()
    shutil.copy(first, folder / "zz" / "a copy.mp4")
    (folder / "zz" / "notes.md").write_text("notes")
    (folder / "zz" / "cut.mp4").write_bytes(first.read_bytes()[:1500])
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return choices(corpus, folder / "out", cache_dir=str(folder / "cache"), allow_private_hosts=True)


@pytest.fixture(scope="module")
def local(config):
    """The result of a run on the same files on a local disk."""
    return inline(config)


@pytest.fixture(autouse=True)
def empty_cache(config):
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    fetch._CACHES.clear()


@pytest.fixture
def store(monkeypatch):
    """A store without faults yet, and a bucket in it."""
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with flaky_store.object_store(share=0.0) as (address, flaky):
        flaky_store.use(monkeypatch, address)
        _boto().create_bucket(Bucket="bucket")
        yield flaky


@pytest.fixture
def small_parts(monkeypatch):
    """Uploads of more than 40 kB go in parts of 20 kB."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 20_000)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def _boto():
    import boto3

    return boto3.client("s3")


def upload(folder, url):
    for name in storage.list_files(folder):
        storage.write_bytes(storage.join(url, name), (folder / name).read_bytes())


def tree(config):
    report = verify(config.output, full=True)
    assert report.problems == ()
    return report.tree_sha256


def test_in_and_out_of_a_flaky_store_gives_the_bytes_of_a_local_run(config, local, corpus, store, small_parts, caplog):
    caplog.set_level(logging.INFO)
    assert (local.exit_code, local.counts["samples"], local.counts["videos_rejected"]) == (0, 12, 4)
    upload(corpus, "s3://bucket/in")
    store.share = 0.05
    stored = replace(config, input="s3://bucket/in", output="s3://bucket/out")
    result = inline(stored)
    assert (result.exit_code, result.counts) == (0, local.counts)
    assert list(result.rejects) == list(local.rejects)
    assert tree(stored) == tree(config)
    assert_equal_batches(config, stored)
    kinds = {"list", "head", "get", "put", "begin", "part", "complete"}
    assert kinds <= set(store.failed)  # every kind of request has failed
    assert store.failed.total() >= 0.05 * store.asked.total()
    print("\nasked", dict(store.asked), "failed", dict(store.failed))
    storage.write_bytes("s3://bucket/in/empty.mp4", b"replaced")
    shutil.rmtree(config.cache_dir)
    store.read.clear()
    again = inline(stored)
    assert again.worked == {"hash": 7, "split": 1, "clip": 0}
    videos = [path for path in store.read if path.endswith(".mp4")]
    assert set(videos) == {"/bucket/in/empty.mp4"}  # files that the store reports unchanged were not read again
    assert "secret-that-nobody-may-see" not in caplog.text + storage.read_bytes("s3://bucket/out/run.jsonl").decode()


def test_a_video_costs_few_requests_and_a_resume_next_to_none(config, corpus, local, store):
    """A run reads each file of every kind once; a resume reads only parts of the ledger and listings."""
    upload(corpus, "s3://bucket/in")
    stored = replace(config, input="s3://bucket/in", output="s3://bucket/out", max_bad_fraction=1.0)
    store.asked.clear()
    result = inline(stored)
    num_videos, num_clips = result.counts["videos_in"] - 1, result.counts["samples"]  # one is no video by its name
    asked = store.asked.total()
    print("\nfirst", dict(store.asked), num_videos, num_clips)
    assert all(store.read.count(path) == 1 for path in store.read if path.startswith("/bucket/in/"))
    fixed = 80  # of a run, whatever its size: a slow one writes its progress and its lease more often
    assert asked < fixed + 6 * num_videos + 3 * num_clips
    for name in storage.list_files("s3://bucket/out"):
        if not name.startswith("staging/"):
            storage.remove(f"s3://bucket/out/{name}")
    store.asked.clear()
    store.read.clear()
    again = inline(stored)
    print("resumed", dict(store.asked))
    assert again.worked["clip"] == again.worked["split"] == 0
    read = {path for path in store.read if path.endswith((".mp4", ".npz"))}
    assert read == {"/bucket/in/empty.mp4"}  # unusable files are checked again


def assert_equal_batches(config, stored):
    """The loader reads the same from both, in the same order."""
    make = partial(ShardLoader, split="train", micro_batch_size=2, seed=0, config=LoaderConfig(num_threads=1))
    for one, other in zip(*(iter(make(where.output)) for where in (config, stored)), strict=False):
        assert (one["keys"], one["captions"]) == (other["keys"], other["captions"])
        assert one["valid"].all()
        np.testing.assert_array_equal(one["frames"], other["frames"])
        if one["samples_consumed"] > 8:
            return


def test_each_remote_file_is_fetched_once_by_a_run(config, corpus, tmp_path, monkeypatch):
    """The hash pass leaves a video in the cache, which belongs to the machine, for later passes."""
    with web_server(corpus) as site:
        inline(replace(config, input=f"{site.url}/", output=str(tmp_path / "web")))
    videos = [request for request in site.asked if request.startswith("GET") and request.endswith(".mp4")]
    assert len(videos) == len(set(videos)) == 7
    assert max(site.asked.count(f"GET /{path.name}") for path in corpus.glob("*.depth.npz")) == 1


def test_a_full_cache_drops_what_nobody_works_with(tmp_path):
    """Two processes share the folder, which has room for one byte; a file that one of them is decoding stays."""
    names = ["a", "b"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".tmp-0dead").touch()
    os.utime(tmp_path / "cache" / ".tmp-0dead", (0, 0))
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 10)
    digests = [storage.sha256(tmp_path / name) for name in names]
    one, other = (file_cache.FileCache(tmp_path / "cache", max_bytes=1, max_file_bytes=2**20) for _ in range(2))
    held = one.get(str(tmp_path / "a"), digests[0], "video")
    later = other.get(str(tmp_path / "b"), digests[1], "video")
    assert (held.read_bytes(), later.read_bytes()) == (b"a" * 10, b"b" * 10)
    assert not (tmp_path / "cache" / ".tmp-0dead").exists()
    one.get(str(tmp_path / "b"), digests[1], "video")
    assert held.exists()  # there was no reason to look for room
    other._make_room(1)
    assert not held.exists()
    assert later.exists()
    assert one.get(str(tmp_path / "a"), digests[0], "video") == held


def test_a_changed_file_is_named(config, corpus, store, tmp_path):
    storage.write_bytes("s3://bucket/a.mp4", b"one")
    url = "s3://bucket/a.mp4"
    digest, size_bytes = fetch.Remote(url, storage.beside(url), {}).digest(url, config, "video")
    assert size_bytes == 3
    storage.write_bytes("s3://bucket/a.mp4", b"two")
    row = {"path": "s3://bucket/a.mp4", "sha256": digest}
    assert fetch.Path(fetch.video(row, config)).read_bytes() == b"one"
    with pytest.raises(BadSample, match="source_changed"):
        fetch.video(row, replace(config, cache_dir=str(tmp_path / "other")))


def test_no_listing_is_stale_and_a_broken_upload_leaves_what_was_there(store, small_parts, tmp_path):
    url = "s3://bucket/folder/file"
    storage.write_bytes("s3://bucket/folder/first", b"")
    assert storage.list_files("s3://bucket/folder") == ["first"]
    assert not storage.exists(url)
    _boto().put_object(Bucket="bucket", Key="folder/file", Body=b"old")  # by somebody else
    assert storage.exists(url)
    assert storage.list_files("s3://bucket/folder") == ["file", "first"]
    new = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "new").write_bytes(new)
    store.refuse = {"part"}
    with pytest.raises(remote.Unavailable):
        storage.move_file(tmp_path / "new", url)
    assert storage.read_bytes(url) == b"old"
    assert not _boto().list_multipart_uploads(Bucket="bucket").get("Uploads")  # nothing billable is left behind
    store.refuse = set()
    storage.move_file(tmp_path / "new", url)
    assert storage.read_bytes(url) == new
    _boto().delete_object(Bucket="bucket", Key="folder/file")
    assert not storage.exists(url)


def test_out_of_a_web_server_by_folder_and_by_list(config, local, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    with web_server(corpus) as site:
        site.faults = {f"/{path.name}": [503] for path in corpus.glob("*.mp4")}
        stored = replace(config, input=f"{site.url}/", output=str(tmp_path / "web"))
        result = inline(stored)
        assert (result.exit_code, result.counts) == (0, local.counts)
        assert tree(stored) == tree(config)
        assert [request for request in site.asked if "copy.mp4" in request and "GET" in request] == [
            "GET /zz/a%20copy.mp4"
        ]
        names = sorted(path.name for path in corpus.glob("synthetic*.mp4"))
        site.faults = {f"/{names[1]}": ["cut"] * 9, f"/{names[2]}": ["short"] * 9}
        rows = [
            f"{site.url}/{names[0]},CC-BY-4.0,by the list",
            *(f"{site.url}/{name},," for name in names[1:]),
            f"{site.url}/gone.mp4,,",
            "https://www.youtube.com/watch?v=x,,",
        ]
        (tmp_path / "list.csv").write_text("\n".join(["url,licence,caption", *rows]))
        listed = replace(config, input=str(tmp_path / "list.csv"), output=str(tmp_path / "list"))
        listed = replace(listed, max_bad_fraction=1.0, cache_dir=str(tmp_path / "empty cache"))
        result = inline(listed)
    assert {row["key"]: row["reason"] for row in result.rejects} == {
        names[1]: "unreadable",
        names[2]: "truncated_download",
        "gone.mp4": "not_a_file",
        "list.csv:6": "not_a_file_url",
    }
    assert (result.counts["videos_in"], result.counts["videos_split"], result.counts["videos_rejected"]) == (6, 2, 4)
    told = {(facts["licence"], caption) for facts, caption in samples(listed)}
    assert ("CC-BY-4.0", "by the list") in told
    assert {licence for licence, _ in told} == {"CC-BY-4.0", ""}
    assert "by the list" not in {caption for licence, caption in told if not licence}
    assert site.url.partition("://")[2] not in json.dumps(list(result.rejects))


def samples(config):
    """(provenance, caption) of every sample."""
    import pyarrow.parquet as pq

    from ex4d.data.tar import read_sample

    for row in pq.read_table(f"{config.output}/manifest.parquet").to_pylist():
        blob = storage.read_bytes(f"{config.output}/{row['shard']}", row["offset"], row["length"])
        members = read_sample(blob, row["key"])
        yield json.loads(members["json"]), members["txt"].decode()


@pytest.mark.heavy
def test_on_ray_with_two_workers_out_of_and_into_a_flaky_store(config, local, corpus, store, tmp_path):
    """Through the command line, the workers' own clients included; the client's own retries are off."""
    upload(corpus, "s3://bucket/in")
    store.share = 0.05
    stored = replace(config, input="s3://bucket/in", output="s3://bucket/out")
    configuration.dump({"preprocess": stored}, tmp_path / "config.yaml")
    script = "import sys; from pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "preprocess", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    store.share = 0.0
    assert tree(stored) == tree(config)
    assert local.counts["samples"] == 12
    print("\nasked", dict(store.asked), "failed", dict(store.failed))
    verified = subprocess.run([*command[:3], "verify", "s3://bucket/out"], capture_output=True, text=True, timeout=100)
    assert verified.returncode == 0, verified.stdout + verified.stderr
