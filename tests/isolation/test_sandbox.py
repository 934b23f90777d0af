"""A compromised decoder can read its input and spend its time and memory, and can do nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ex4d.errors import BadSample
from ex4d.isolation import File, Isolated, Limits, sandbox, wire

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NOBODY = 65534
LIMITS = Limits(wall_s=30, cpu_s=30, memory_bytes=2**30)

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"this kernel lacks {sandbox.missing()}")


@pytest.fixture(scope="module", autouse=True)
def attempts_on_path():
    sys.path.insert(0, str(HERE))  # the child inherits the path
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def isolated(attempts_on_path):
    with contextlib.closing(Isolated(LIMITS, "attempts")) as child:
        yield child


@pytest.fixture
def target(tmp_path):
    """Yield the arguments of `everything`: an input, a secret beside it, a port and a local socket that listen."""
    (tmp_path / "input").write_bytes(b"the input")
    (tmp_path / "secret").write_text("hunter2")
    (tmp_path / "secret").chmod(0o666)
    tmp_path.chmod(0o777)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "socket"))
        abstract.bind("\0ex4d")
        for sock in (tcp, unix, abstract):
            sock.listen()
        yield [str(tmp_path / name) for name in ("input", "secret", "", "socket")], tcp.getsockname()[1]
    assert (tmp_path / "secret").read_text() == "hunter2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "secret", "socket"]
    assert (tmp_path / "input").read_bytes() == b"the input"


def test_every_attempt_is_refused(isolated, target):
    (source, secret, folder, unix), port = target
    ended = isolated.call("everything", File(source), secret, folder, port, unix)
    assert {name for name, how in ended.items() if how == "succeeded"} == set()
    assert len(ended) > 40


def test_every_attempt_is_refused_to_an_ordinary_user_too(target):
    """Started as another user, with an interpreter that this user can access; the isolation needs only Python."""
    if os.getuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    python = next((p for p in (sys.executable, "/usr/bin/python3") if runs_as_nobody(p)), None)
    if python is None:
        pytest.skip("no Python 3.11 that another user can start")
    (source, secret, folder, unix), port = target
    for parent in list(Path(folder).parents)[:2]:
        parent.chmod(0o755)
    code = (
        "import json\nfrom ex4d.isolation import File, Isolated, Limits\n"
        f"child = Isolated(Limits(wall_s=30, memory_bytes=2**30), 'attempts')\n"
        f"ended = child.call('everything', File({source!r}), {secret!r}, {folder!r}, {port}, {unix!r})\n"
        "print(json.dumps([ended, child.call('facts')['uid']]))\nchild.close()\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, "-c", code], user=NOBODY, group=NOBODY, extra_groups=[], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ended, uid = json.loads(done.stdout)
    assert uid == NOBODY
    assert {name for name, how in ended.items() if how == "succeeded"} == set()


def runs_as_nobody(python: str) -> bool:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import ex4d.isolation; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", code, str(ROOT)], user=NOBODY, capture_output=True).returncode == 0
    except PermissionError:
        return False


def test_the_child_knows_nothing_of_its_parent(monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "HOME", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "hunter2")
    with contextlib.closing(Isolated(LIMITS, "attempts")) as child:
        facts = child.call("facts")
    assert "hunter2" not in json.dumps([facts["environment"], facts["arguments"]])
    assert facts["limits"] == {"RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
    assert (facts["capabilities"], facts["dumpable"], facts["no_new_privs"]) == (0, 0, 1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is x86's")
def test_another_architecture_s_numbers_end_the_child(isolated):
    with pytest.raises(BadSample, match="SIGSYS"):
        isolated.call("other_numbers")


def test_a_library_that_aborts_is_still_told_apart(isolated):
    with pytest.raises(BadSample, match="SIGABRT"):
        isolated.call("abort")


def test_an_input_is_an_open_regular_file(isolated, tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    os.mkfifo(tmp_path / "pipe")
    before = isolated.call("facts") and isolated._child.process.pid
    assert isolated.call("contents", File(str(tmp_path / "a"))) == b"12"
    for name, reason in (("pipe", "open_error"), ("", "open_error"), ("none", "unreadable")):
        with pytest.raises(BadSample) as caught:
            isolated.call("contents", File(str(tmp_path / name)))
        assert caught.value.reason == reason
    with pytest.raises(BadSample, match="open_error"):
        isolated.call("contents", File("/dev/zero"))
    assert isolated._child.process.pid == before, "a file that does not open costs no child"


def test_an_answer_of_another_class_is_an_error_and_not_an_object(isolated):
    with pytest.raises(TypeError, match="Secret may not cross"):
        isolated.call("foreign_class")


def answer(raw: bytes, max_bytes: int = 1000) -> object:
    """Return the parent's interpretation of bytes that a child sent."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=lambda: (theirs.sendall(raw), theirs.close()))
        thread.start()
        try:
            return wire.receive(ours, max_bytes=max_bytes)
        finally:
            thread.join()


def message(body: object, *parts: bytes) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    lengths = b"".join(struct.pack("<Q", len(part)) for part in parts)
    return struct.pack("<II", len(text), len(parts)) + lengths + text + b"".join(parts)


HOSTILE = {
    "a JSON that never ends": struct.pack("<II", 2**32 - 1, 0),
    "many arrays": struct.pack("<II", 2, 2**32 - 1),
    "a huge array": struct.pack("<II", 2, 1) + struct.pack("<Q", 2**62) + b"{}",
    "no JSON": message(b"{"),
    "nesting": message(b"[" * 100_000 + b"]" * 100_000),
    "a huge number": message(b"1" * 10_000),
    "a class that is not ours": message({"class": ["os:system", {"command": "true"}]}),
    "a class with other fields": message({"class": ["ex4d.depth.arrays:Wanted", {"shell": 1}]}),
    "an unknown tag": message({"pickle": 0}),
    "a file": message({"file": 0}),
    "an array of objects": message({"array": [0, "|O", [1]]}, b"12345678"),
    "an array that is too short": message({"array": [0, "|u1", [9]]}, b"12345678"),
    "an array of negative sides": message({"array": [0, "|u1", [-2, -4]]}, b"12345678"),
    "an array of a text": message({"array": [0, "|u1", "8"]}, b"12345678"),
    "an array of none": message({"array": [5, "|u1", [8]]}, b"12345678"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_answer_is_refused_before_anything_is_made_of_it(what):
    with pytest.raises(wire.ProtocolError):
        answer(HOSTILE[what])


def test_values_cross_as_they_are():
    value = {"a": (1, None, [2.5, "ü"]), 3: b"", "x": np.zeros((0, 3), np.float32), "y": np.arange(6.0).reshape(2, 3).T}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.send(theirs, value)
        back = wire.receive(ours)
    assert (back["a"], back[3], back["x"].shape, back["x"].dtype) == (value["a"], b"", (0, 3), np.float32)
    np.testing.assert_array_equal(back["y"], value["y"])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_of_whole_instructions_and_names_what_matters(machine):
    refused = sandbox.refused_calls(machine)
    assert {"socket", "execve", "clone", "ptrace", "process_vm_readv", "io_uring_setup", "bpf"} <= set(refused)
    assert len(set(refused.values())) == len(refused)
    assert len(sandbox.filter_program(machine, 1)) % 8 == 0
    assert len(sandbox.filter_program(machine, 1)) // 8 <= 4096  # BPF_MAXINSNS


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_takes_over_where_there_is_no_landlock(monkeypatch, tmp_path):
    (tmp_path / "secret").write_text("hunter2")
    (tmp_path / "input").write_bytes(b"the input")
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    with contextlib.closing(Isolated(LIMITS, "attempts")) as child:
        assert child.call("contents", File(str(tmp_path / "input"))) == b"the input"
        assert child._child.wrapped
        with pytest.raises(FileNotFoundError):
            child.call("read", str(tmp_path / "secret"))
        with pytest.raises(BadSample, match="SIGABRT"):
            child.call("abort")


ON_AN_OLD_KERNEL = """
import json, logging, socket, sys
from ex4d import video
from ex4d.isolation import File, Isolated, Limits, run, sandbox
from pipelines.commands import doctor
logging.basicConfig(stream=sys.stderr, format="%(message)s")
path, secret, folder, clip = sys.argv[1:]
child = Isolated(Limits(wall_s=60, memory_bytes=2**30), "attempts")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.bind(("127.0.0.1", 0))
    ended = child.call("milder", File(path), secret, folder, udp.getsockname()[1])
    udp.settimeout(0.5)
    try:
        udp.recv(10)
    except TimeoutError:  # bubblewrap's network is another one
        ended["send by UDP"] = "did not arrive"
pts = run("frame_pts", (File(clip),))[0]
same = bool((run("decode", (File(clip), pts)) == video.decode(clip, pts)).all())
print(json.dumps([[name for name, how in ended.items() if how == "succeeded"], child._child.wrapped, same]))
child.close()
doctor.video_works, doctor._gpus = (lambda: True), list  # seconds each
sys.argv = ["ex4d"]
from pipelines import cli
cli.main(["doctor"])
"""


@pytest.mark.parametrize(
    ("lacking", "wrapped"),
    [
        ("landlock", True),
        ("landlock", False),
        ("seccomp", False),
        pytest.param("seccomp", True, marks=pytest.mark.heavy),
        pytest.param("landlock,seccomp", True, marks=pytest.mark.heavy),
        pytest.param("landlock,seccomp", False, marks=pytest.mark.heavy),
    ],
)
def test_where_the_kernel_lacks_a_part_the_others_hold_and_it_is_said(tmp_path, lacking, wrapped):
    """On an emulated older kernel, decoding gives the same frames; the doctor and a warning name what is missing."""
    if wrapped and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    from ex4d import video

    video.write(str(tmp_path / "a.mp4"), np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8), 10.0)
    (tmp_path / "input").write_bytes(b"the input")
    (tmp_path / "secret").write_text("hunter2")
    paths = [str(tmp_path / name) for name in ("input", "secret", "", "a.mp4")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]), "COLUMNS": "300"}
    if not wrapped:
        environment["PATH"] = str(tmp_path)  # of this test's process alone
    command = [sys.executable, str(HERE / "old_kernel.py"), lacking, sys.executable, "-c", ON_AN_OLD_KERNEL, *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told, _, of_doctor = done.stdout.partition("\n")
    succeeded, was_wrapped, same = json.loads(told)
    assert (was_wrapped, same) == (wrapped, True)
    still_possible = {
        ("landlock", False): {"read a secret"},
        ("seccomp", False): {"send by UDP"},
        ("landlock,seccomp", True): {"open the input for writing", "truncate the input"},
    }
    if (lacking, wrapped) != ("landlock,seccomp", False):  # only the limits remain there
        assert set(succeeded) == still_possible.get((lacking, wrapped), set())
    for name in lacking.split(","):
        assert f"{name} " in of_doctor.lower()
        assert ("kernel lacks" in done.stderr) == (not wrapped)
    assert ("bubblewrap stands in" in of_doctor) == wrapped


def test_a_codec_that_is_not_listed_is_not_reached(tmp_path, monkeypatch):
    from ex4d import video
    from ex4d.video import sniff

    video.write(str(tmp_path / "a.mp4"), np.zeros((3, 32, 32, 3), np.uint8), 10.0)
    monkeypatch.setattr(sniff, "CODECS", ("vp9",))
    with pytest.raises(BadSample) as caught:
        video.probe(tmp_path / "a.mp4")
    assert caught.value.reason == "codec_not_allowed"
    monkeypatch.setenv("EX4D_CODECS", "cfhd, h264")
    assert video.probe(tmp_path / "a.mp4").codec == "h264"
