"""The simulation of benchmarks/scale, compared with cases computed by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "scale"))
from simulate import Cluster, Outcome, Overhead, Pass, Preprocess, Row, Step
from simulate_training import Training, train


def rows(seconds, mb=0.0):
    return [Row((Step("cpu", one, mb),)) for one in seconds]


def run(passes, seed=0, overhead=None, **cluster) -> Outcome:
    return Preprocess(Cluster(**cluster), overhead or Overhead(), seed).run(passes)


def test_one_worker_takes_the_sum_of_all_costs():
    overhead = Overhead(start_s=5.0, driver_s=0.25, row_s=0.5)
    passes = [Pass(rows([2.0, 3.0, 4.0]), (1.0,), plan_s=7.0), Pass(rows([10.0]), (2.0,))]
    assert run(passes, overhead=overhead).wall_s == 5 + 7 + (1 + 9 + 3 * 0.75) + (2 + 10 + 0.75)


def test_equal_rows_are_shared_evenly_and_one_long_row_is_a_tail():
    assert run([Pass(rows([2.0] * 24))], nodes=3, cpus=4).wall_s == 4.0
    assert run([Pass(rows([2.0] * 24 + [9.0]))], nodes=3, cpus=4).wall_s == 4.0 + 9.0
    assert run([Pass(rows([1.0] * 2 + [3.0] * 2))], nodes=1, cpus=2, busy=1.5).wall_s == pytest.approx(
        1.0 + 1.5 * 3.0, abs=0.51
    ), "the first and the last task of a node may have it to themselves"


def test_short_rows_travel_together_as_in_the_stream():
    overhead = Overhead(driver_s=0.0, row_s=0.0)
    simulated = Preprocess(Cluster(), overhead)
    simulated.run([Pass(rows([0.01] * 1000))])
    assert simulated.rows_per_task[0] == 64, "1, 2, 4 … 64"
    assert simulated.outcome.wall_s == pytest.approx(10.0)


def test_what_a_row_gives_comes_before_the_next_row_and_warms_a_worker_for_itself():
    video = Row((Step("cpu", 1.0),), rows([2.0, 4.0]))
    overhead = Overhead(driver_row_s=0.5)
    assert run([Pass([video] * 3, (0.0, 0.0))]).wall_s == 3 * 7.0
    assert run([Pass([video] * 3, (10.0, 20.0))]).wall_s == 3 * 7.0 + 10.0 + 20.0
    assert run([Pass([video] * 3, (0.0, 0.0))], overhead=overhead).wall_s == 3 * 7.0 + 9 * 0.5
    assert run([Pass([video] * 8, (0.0, 0.0))], nodes=2).wall_s == pytest.approx(8 * 7.0 / 2, abs=2.0)


def test_the_scarcest_of_store_link_and_driver_decides():
    corpus = [Pass(rows([1.0] * 100, mb=50.0))]
    assert run(corpus, nodes=4).wall_s == 25.0, "an infinite network"
    assert run(corpus, nodes=4, node_mb_s=50.0).wall_s == 25 * (1.0 + 1.0)
    assert run(corpus, nodes=50, store_mb_s=500.0).wall_s == pytest.approx(10.0 + 1.0)
    slow_driver = Overhead(driver_s=0.5)
    assert run([Pass(rows([1.0] * 100))], nodes=64, overhead=slow_driver).wall_s == pytest.approx(51.0)


def test_a_gpu_that_is_the_bottleneck_is_never_idle():
    chain = [Row((Step("cpu", 1.0), Step("gpu", 2.0), Step("cpu", 1.0)))] * 20
    assert run([Pass(chain)], cpus=4, gpus=1).wall_s == 1.0 + 20 * 2.0 + 1.0
    assert run([Pass(chain)], cpus=1, gpus=4).wall_s == pytest.approx(40.0, abs=4.0)


def test_a_lost_node_costs_at_most_its_running_tasks():
    calm = Preprocess(Cluster(nodes=2), Overhead())
    calm.run([Pass(rows([10.0] * 8))])
    assert calm.outcome.wall_s == 40.0
    cut = Preprocess(Cluster(nodes=2, detect_s=0.0, repair_s=float("inf")), Overhead())
    cut._at(15.0, "fail", cut.nodes[1], 0)
    cut.run([Pass(rows([10.0] * 8))])
    assert cut.outcome.wall_s == 70.0, "one row was done there, seven elsewhere"
    assert (cut.outcome.failures, cut.outcome.lost_s) == (1, 5.0)
    back = Preprocess(Cluster(nodes=2, detect_s=0.0, repair_s=10.0), Overhead())
    back._at(15.0, "fail", back.nodes[1], 0)
    back.run([Pass(rows([10.0] * 8))])
    assert back.outcome.wall_s == 50.0, "half a row and ten seconds of a node were lost"


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_done_once_whatever_fails(seed):
    times = np.random.default_rng(seed).lognormal(0.0, 0.5, 300)
    failing = {"nodes": 4, "cpus": 2, "mtbf_s": 40.0, "detect_s": 3.0, "repair_s": 10.0}
    found = run([Pass(rows(times)), Pass(rows(times))], seed, **failing)
    assert found.failures > 3
    assert found.work_s >= 2 * times.sum()
    assert found.wall_s > run([Pass(rows(times)), Pass(rows(times))], nodes=4, cpus=2).wall_s


def test_more_nodes_and_faster_links_are_never_slower_and_slow_nodes_never_faster():
    times = np.random.default_rng(1).lognormal(0.0, 0.3, 400)
    corpus = [Pass(rows(times, mb=5.0))]
    by_nodes = [run(corpus, nodes=nodes, cpus=2, store_mb_s=200.0).wall_s for nodes in (1, 2, 4, 8, 16, 64)]
    assert by_nodes == sorted(by_nodes, reverse=True)
    assert by_nodes[-1] >= 400 * 5 / 200
    by_store = [run(corpus, nodes=8, store_mb_s=speed).wall_s for speed in (50.0, 100.0, 1e3, 1e6)]
    assert by_store == sorted(by_store, reverse=True)
    by_slow = [run(corpus, nodes=8, slow_share=share, slow_by=2.0).wall_s for share in (0.0, 0.25, 1.0)]
    assert by_slow == sorted(by_slow)


def test_training_by_hand():
    run = Training(num_steps=100, step_s=2.0, start_s=30.0, end_s=5.0, save_every=50, save_s=3.0, weights_mb=1000.0)
    alone = Cluster(cpus=1, node_mb_s=100.0)
    assert train(run, alone).wall_s == 30 + 10 + 200 + 2 * 3 + 5
    over = replace(run, gradient_mb=400.0, latency_s=0.01, weights_mb=0.0)
    four = train(over, Cluster(nodes=4, node_mb_s=300.0)).wall_s
    assert four == pytest.approx(30 + 100 * (2 + 2 * 3 / 4 * 400 / 300 + 6 * 0.01) + 6 + 5)
    reading = replace(run, weights_mb=0.0, batch_mb=10.0)
    assert train(reading, Cluster(nodes=8, store_mb_s=20.0)).wall_s == pytest.approx(30 + 100 * 4 + 6 + 5)
    assert train(replace(run, spread=0.1), Cluster(nodes=64)).wall_s > train(run, Cluster(nodes=64)).wall_s


def test_a_failure_of_training_costs_the_steps_since_the_checkpoint():
    run = Training(num_steps=400, step_s=1.0, start_s=5.0, save_every=20, save_s=1.0)
    cluster = Cluster(nodes=4, mtbf_s=400.0, detect_s=2.0, repair_s=10.0)
    found = [train(run, cluster, seed) for seed in range(20)]
    calm = train(run, replace(cluster, mtbf_s=float("inf"))).wall_s
    assert sum(one.failures for one in found) > 20
    for one in found:
        assert one.lost_s <= one.failures * (20 + 1)
        assert one.wall_s == pytest.approx(calm + one.lost_s + one.failures * (2 + 10 + 5), abs=1e-6)
