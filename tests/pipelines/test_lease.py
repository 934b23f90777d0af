"""One run at a time writes to an output in an object store; the lease of one that was killed is taken over."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import flaky_store
import pytest
from small_corpus import CORPUS, choices, inline

from ex4d import config as configuration
from ex4d import remote, storage
from ex4d.data.verify import verify
from ex4d.errors import ConfigError, ContractError
from pipelines.runtime import lease
from pipelines.runtime.output import exclusive

OUTPUT = "s3://bucket/out"
URL = f"{OUTPUT}/{lease.NAME}"


@pytest.fixture
def store(monkeypatch):
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    for name, value in (("RENEW_S", 0.2), ("LOST_S", 1.5), ("LOOK_S", 0.1)):
        monkeypatch.setattr(lease, name, value)
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    with flaky_store.object_store(share=0.0) as (address, flaky):
        flaky_store.use(monkeypatch, address)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        yield flaky


def test_a_second_run_is_refused_while_the_first_lives_and_welcome_after_it(store):
    store.share = 0.1
    with (
        exclusive(OUTPUT),
        pytest.raises(ConfigError, match="another run is writing there: process"),
        exclusive(OUTPUT),
    ):
        raise AssertionError
    assert not storage.exists(URL)
    with exclusive(OUTPUT), exclusive("s3://bucket/other"):
        assert storage.exists(URL)


def test_of_two_that_find_a_dead_lease_one_gets_it(store):
    dead = lease.Lease(OUTPUT)
    dead.take()
    one, other = lease.Lease(OUTPUT), lease.Lease(OUTPUT)
    one.tag = other.tag = dead.tag
    assert (one.write(), other.write(), one.write()) == (True, False, True)
    started = time.monotonic()
    with exclusive(OUTPUT):
        assert time.monotonic() - started >= lease.LOST_S
    assert not storage.exists(URL)


def test_a_run_whose_lease_was_taken_over_stops_and_leaves_it_to_the_other(store):
    def run():
        with exclusive(OUTPUT):
            storage.remove(URL)
            lease.Lease(OUTPUT).take()
            time.sleep(10)
            raise AssertionError

    with pytest.raises(ContractError, match="another run took it over"):
        run()
    assert storage.exists(URL)


def test_what_is_no_lease_is_named(store):
    storage.write_bytes(URL, b"[]")
    with pytest.raises(ConfigError, match="is not a lease"), exclusive(OUTPUT):
        raise AssertionError


def test_a_second_driver_exits_with_2_and_a_killed_one_is_made_up(store, tmp_path):
    """Through the command line, with the default waits."""
    from ex4d.synthetic import write_corpus

    write_corpus(tmp_path / "in", CORPUS)
    local = choices(tmp_path / "in", tmp_path / "local")
    inline(local)
    stored = choices(tmp_path / "in", OUTPUT)
    configuration.dump({"preprocess": stored}, tmp_path / "config.yaml")
    script = (
        "import sys; from functools import partial; from pipelines import cli; from pipelines.preprocess import run; "
        "run.run = partial(run.run, runner_name='inline'); sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "preprocess", str(tmp_path / "config.yaml")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not storage.exists(URL):
        assert first.poll() is None
        time.sleep(0.05)
    store.delay_s = 0.3  # the first runs long enough to renew
    second = subprocess.run(command, capture_output=True, text=True, timeout=100)
    store.delay_s = 0.0
    assert second.returncode == 2, second.stdout + second.stderr
    assert "another run is writing there" in second.stderr
    first.kill()
    assert first.wait() == -9
    assert storage.exists(URL)
    assert inline(stored).exit_code == 0
    trees = [verify(config.output, full=True).tree_sha256 for config in (stored, local)]
    assert trees[0] == trees[1]
    assert not storage.exists(URL)
