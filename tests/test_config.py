"""Configuration: strict, clear about mistakes, and every file in configs/ loads."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import pytest

from ex4d import config
from ex4d.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Example:
    num_steps: int = 3
    lr: float = 1e-3
    name: str | None = None
    inner: Inner = Inner()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("train: {num_steps: 4, inner: {depth: 2}}\n")
    return path


def test_overrides_win_and_nested_keys_merge(file):
    loaded = config.load(file, {"train": Example}, ["train.lr=3e-5", "train.name=x", "train.inner.depth=5"])["train"]
    assert loaded == Example(num_steps=4, lr=3e-5, name="x", inner=Inner(5))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.num_stps=1", ("train.num_stps", "num_steps")),
        ("train.num_steps=many", ("train.num_steps", "integer")),
        ("trian.num_steps=1", ("trian.num_steps", "train")),
        ("num_steps=1", ("section.key=value",)),
        ("train.inner.depht=1", ("train.inner.depht",)),
        ("train.num_steps=[1", ("YAML",)),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(file, override, named):
    with pytest.raises(ConfigError) as caught:
        config.load(file, {"train": Example}, [override])
    assert all(word in str(caught.value) for word in named)


@pytest.mark.parametrize(
    "text", ["trian: {}\n", "train: 3\n", "- 1\n", "a: [\n", "train: !!python/object:os.system {}\n"]
)
def test_a_bad_file_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        config.load(path, {"train": Example})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        config.load(tmp_path / "nowhere.yaml", {"train": Example})


def test_dump_and_load_round_trip(tmp_path):
    first = Example(num_steps=7, lr=3e-5, inner=Inner(9))
    config.dump({"train": first}, tmp_path / "b.yaml")
    assert config.load(tmp_path / "b.yaml", {"train": Example})["train"] == first


def test_fingerprint_depends_on_values_only():
    assert config.fingerprint(Example()) == config.fingerprint(Example())
    assert config.fingerprint(Example()) != config.fingerprint(Example(lr=2e-3))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {num_steps: 1, num_steps: 2}", "duplicate key"),
        ("train: {num_steps: 1}\ntrain: {num_steps: 2}", "duplicate key"),
        (BOMB, "aliases"),
        ("train: &a {num_steps: *a}", "aliases"),
        ("[" * 5000, "valid YAML"),
        ("train: {num_steps: " + "9" * 5000 + "}", "valid YAML"),
        ("train: !!python/object/apply:os.getcwd []", "valid YAML"),
        ("#" * (config.MAX_BYTES + 1), "larger"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_yaml_is_an_invalid_choice(tmp_path, text, says):
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.read_yaml(tmp_path / "some.yaml")


def test_text_that_no_path_can_be_is_an_invalid_choice(file):
    file.write_text('train: {name: "a\\0b"}\n')
    with pytest.raises(ConfigError, match="NUL"):
        config.load(file, {"train": Example})


def test_an_optional_section_is_none_where_nobody_asks_for_it(file):
    load = partial(config.load, file, {"train": Example, "ray": Inner}, optional=("ray",))
    assert load()["ray"] is None
    assert load(["ray.depth=3"])["ray"] == Inner(3)
    assert config.load(file, {"ray": Inner}) == {"ray": Inner()}
    file.write_text("ray:\n")
    assert load() == {"train": Example(), "ray": Inner()}


def test_a_long_value_is_named_by_its_beginning():
    assert len(str(ConfigError("train.data", "x" * 10_000, "shorter"))) < 300


def test_an_invalid_choice_survives_the_way_between_processes():
    again = pickle.loads(pickle.dumps(ConfigError("train.data", 5, "a folder")))  # noqa: S301 (our own bytes)
    assert (str(again), again.value) == ("train.data=5: a folder", 5)


@dataclass(frozen=True)
class Depth:
    RENAMED: ClassVar[dict[str, str]] = {"frames": "was renamed to preprocess.num_frames"}

    depth: str = config.setting("sidecar", "Estimator.", choices=("sidecar", "parallax"))
    near_duplicates: Literal["group", "filter", "off"] = config.setting("group", "Of videos.")
    num_frames: int | None = config.setting(49, "Of a clip.", ge=2, le=100)
    size: tuple[int, int] = config.setting((512, 512), "[H, W].", ge=16, multiple_of=2)
    ranges: dict[str, float] = config.setting({"a": 1.0}, "Named.", not_empty=True)
    score_only: bool = config.setting(False, "Scores alone.")

    def __post_init__(self) -> None:
        need = config.checked(self, "preprocess")
        need(self.num_frames != 50, "num_frames", "must not be 50")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("depht=parralax", "unknown setting. Did you mean preprocess.depth=parallax?"),
        ("depth=parralax", "must be one of sidecar, parallax. Did you mean parallax?"),
        ("frames=9", "was renamed to preprocess.num_frames"),
        ("num_frames=1", "must be an integer, from 2 to 100, or null"),
        ("num_frames=many", "must be an integer, from 2 to 100, or null"),
        ("num_frames=50", "must not be 50"),
        ("size=[31, 32]", "must be [integer, integer], at least 16, a multiple of 2"),
        ("size=[32]", "must be [integer, integer], at least 16, a multiple of 2"),
        ("near_duplicates=groop", "must be one of group, filter, off. Did you mean group?"),
        ("ranges={}", "must be a mapping, not empty"),
        ("lr=3", "Did you mean train.lr?"),
    ],
)
def test_a_setting_says_what_it_may_be(tmp_path, override, says):
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "a.yaml", {"preprocess": Depth, "train": Example}, [f"preprocess.{override}"])
    assert str(caught.value).startswith(f"preprocess.{override.partition('=')[0]}=")
    assert str(caught.value).endswith(says)


@pytest.mark.parametrize("values", [{"num_frames": 1}, {"depth": "lidar"}, {"size": (15, 16)}, {"ranges": {}}])
def test_a_setting_out_of_range_is_refused_without_a_file(values):
    with pytest.raises(ConfigError, match=f"preprocess.{next(iter(values))}"):
        Depth(**values)


@pytest.mark.parametrize("text", ["12:00:00", "5:30", "190:20:30.15", "2026-11-26", "08", "-.5"])
def test_times_dates_and_names_of_digits_are_text(text):
    assert config.parse_value(text) == text


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("-3", -3), ("1_000", 1000), ("0x1F", 31), ("1.5e-3", 0.0015), ("-.inf", -math.inf)]
)
def test_numbers_are_numbers(text, number):
    value = config.parse_value(text)
    assert value == number
    assert type(value) is type(number)


def test_words_that_yaml_1_1_reads_as_booleans_are_words(tmp_path):
    (tmp_path / "a.yaml").write_text("preprocess: {near_duplicates: off, score_only: yes}")
    loaded = config.load(tmp_path / "a.yaml", {"preprocess": Depth})["preprocess"]
    assert (loaded.near_duplicates, loaded.score_only) == ("off", True)
    config.dump({"preprocess": loaded}, tmp_path / "b.yaml")
    assert config.load(tmp_path / "b.yaml", {"preprocess": Depth})["preprocess"] == loaded


def test_each_instance_has_a_mapping_of_its_own():
    Depth().ranges["b"] = 2.0
    assert Depth().ranges == {"a": 1.0}
