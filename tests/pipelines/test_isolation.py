"""One video that crashes, hangs or eats memory costs one row; its neighbours notice nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ex4d import isolation, video
from ex4d.errors import BadSample, ConfigError
from ex4d.isolation import File, Isolated, Limits

HERE = Path(__file__).resolve().parent
LIMITS = Limits(wall_s=20, cpu_s=20, memory_bytes=2**30)


@pytest.fixture(scope="module", autouse=True)
def poison_on_path():
    sys.path.insert(0, str(HERE))  # the child inherits the path
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def isolated():
    child = Isolated(LIMITS, "poison")
    yield child
    child.close()


def reason_of(child: Isolated, function: str, *args) -> str:
    with pytest.raises(BadSample) as caught:
        child.call(function, *args)
    return caught.value.reason


def test_arguments_and_results_cross_unchanged(isolated):
    value = {"a": [1, None, 2.5], "b": np.arange(6, dtype=np.int16).reshape(2, 3)}
    (back, other) = isolated.call("echo", value, (1,))
    assert other == (1,)
    assert back["a"] == value["a"]
    np.testing.assert_array_equal(back["b"], value["b"])
    frames = isolated.call("frames", 3, 40, 50)
    assert frames.shape == (3, 40, 50, 3)
    assert frames.flags.writeable
    np.testing.assert_array_equal(frames.ravel()[:300], np.arange(300).astype(np.uint8))


def test_one_child_serves_many_calls_and_is_replaced_after_its_share():
    child = Isolated(Limits(max_calls=2), "poison")
    pids = [child.call("pid") for _ in range(5)]
    child.close()
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


@pytest.mark.parametrize(("function", "reason"), [("segfault", "decode_crash"), ("exit_quietly", "decode_crash")])
def test_a_crash_costs_one_call(isolated, function, reason):
    before = isolated.call("pid")
    assert reason_of(isolated, function) == reason
    after = isolated.call("pid")
    assert after != before
    assert not Path(f"/proc/{before}").exists()


def test_a_crash_tells_where_beside_a_message_that_is_the_same_each_time(isolated):
    with pytest.raises(BadSample) as caught:
        isolated.call("segfault")
    assert caught.value.message == "segfault died of SIGSEGV"
    assert "Segmentation fault" in caught.value.__notes__[0]
    assert "poison.py" in caught.value.__notes__[0]


@pytest.mark.parametrize("function", ["hang", "hang_with_gil"])
def test_a_hang_is_ended_by_the_clock(function):
    child = Isolated(Limits(wall_s=0.5), "poison")
    child.call("pid")
    started = time.monotonic()
    assert reason_of(child, function) == "decode_timeout"
    assert time.monotonic() - started < 2.5
    assert child.call("echo") == ()
    child.close()


def test_a_busy_loop_is_ended_by_the_processor_limit():
    child = Isolated(Limits(wall_s=30, cpu_s=0.5), "poison")
    assert reason_of(child, "spin") == "decode_cpu"
    child.close()


def test_memory_is_limited_and_given_back(isolated):
    assert reason_of(isolated, "eat_memory") == "decode_memory"
    assert isolated.call("echo", 1) == (1,)


@pytest.mark.parametrize(("times", "fate"), [(1, "alive"), (2, "decode_memory")])
def test_a_kill_from_outside_is_tried_once_more(times, fate):
    """A child cannot count its own deaths, since it cannot write. So it sleeps, and the test kills it."""
    with closing(Isolated(LIMITS, "poison")) as child:
        child.call("pid")
        answers: list[str] = []

        def call() -> None:
            try:
                answers.append(child.call("nap"))
            except BadSample as error:
                answers.append(error.reason)

        thread = threading.Thread(target=call)
        thread.start()
        killed: set[int] = set()
        for _ in range(times):
            wait_until(lambda: child._child and child._child.busy and child._child.process.pid not in killed)
            pid = child._child.process.pid
            killed.add(pid)
            time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        thread.join()
    assert answers == [fate]


def test_exceptions_of_the_function_cross_as_themselves(isolated):
    before = isolated.call("pid")
    with pytest.raises(BadSample) as caught:
        isolated.call("raise_bad_sample")
    assert (caught.value.reason, caught.value.message) == ("no_frames", "told to")
    assert "raise_bad_sample" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="holds a lock"):
        isolated.call("raise_unpicklable")
    assert isolated.call("pid") == before


def test_only_names_of_the_table_run(isolated):
    with pytest.raises(ConfigError, match="not in the table"):
        isolated.call("os.system", "true")


def test_the_child_sees_no_stdin_and_its_noise_goes_nowhere(isolated, capfd):
    assert isolated.call("read_stdin") == b""
    assert isolated.call("chatter") == "done"
    assert capfd.readouterr() == ("", "")


def test_threads_take_turns(isolated):
    results: dict[int, tuple] = {}

    def work(number: int) -> None:
        results[number] = isolated.call("echo", number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: (number,) for number in range(8)}


def test_a_child_started_by_a_thread_outlives_the_thread():
    child = Isolated(LIMITS, "poison")
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(child.call("pid")))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert child.call("pid") == pids[0]
    child.close()


@pytest.mark.parametrize("function", ["pid", "hang_with_gil"])
def test_the_child_dies_with_its_parent(function, tmp_path):
    """Killed while idle and while its child hangs with the interpreter's lock held."""
    pid_file = tmp_path / "pid"
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from ex4d.isolation import Isolated, Limits\n"
        "child = Isolated(Limits(), 'poison')\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.call('pid')) + '.')\n"
        f"child.call({function!r})\n"
        "import time; time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
    pid = pid_file.read_text().rstrip(".")
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(pid))


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_the_real_table_decodes_as_the_library_does(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3)).astype(np.uint8)
    path = str(tmp_path / "clip.mp4")
    video.write(path, frames, 10)
    assert isolation.run("probe", (File(path),)) == video.probe(path)
    pts, time_base = isolation.run("frame_pts", (File(path),))
    assert time_base == video.frame_pts(path)[1]
    frames = isolation.run("decode", (File(path), pts, (16, 16), "squeeze"))
    np.testing.assert_array_equal(frames, video.decode(path, pts, (16, 16), "squeeze"))
    with pytest.raises(BadSample) as caught:
        isolation.run("probe", (File(str(tmp_path / "missing.mp4")),))
    assert caught.value.reason == "unreadable"


def test_a_child_starts_fast_and_imports_only_what_it_needs():
    code = "import sys, ex4d.isolation, ex4d.isolation.child; print(' '.join(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "ray", "av", "cv2", "pydantic"} & set(modules)


def test_a_large_parent_does_not_make_a_crash_look_like_a_lack_of_memory():
    """A child's peak memory includes its parent's; a worker that holds frames must still recognise a crash."""
    ballast = np.ones(2**27)  # 1 GiB, above the child's limit
    with closing(Isolated(LIMITS, "poison")) as fresh:
        assert reason_of(fresh, "segfault") == "decode_crash"
    assert ballast[-1] == 1


def test_one_child_serves_calls_of_different_times(poison_on_path):
    """One pool per time limit would keep a child, with its memory, for each length of video."""
    within = [Limits(wall_s=wall_s, cpu_s=wall_s, memory_bytes=2**30) for wall_s in (20, 7, 35)]
    pids = [isolation.run("pid", (), limits, table="poison") for limits in within]
    assert len(set(pids)) == 1
    assert isolation.run("pid", (), Limits(memory_bytes=2**31), table="poison") != pids[0]
    with pytest.raises(BadSample, match=r"more than 0\.3 s"):
        isolation.run("hang", (), Limits(wall_s=0.3, memory_bytes=2**30), table="poison")
    with pytest.raises(BadSample, match="decode_cpu"):
        isolation.run("spin", (), Limits(wall_s=30, cpu_s=0.3, memory_bytes=2**30), table="poison")
