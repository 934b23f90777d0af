"""Lists of videos as others write them: each row is a span of a file, or is counted with its reason."""

from __future__ import annotations

import csv
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ex4d import storage
from ex4d.errors import BadSample, ConfigError, Filtered
from pipelines.inputs import Span, expand
from pipelines.inputs.rows import seconds
from pipelines.preprocess import clips, settings


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.mp4", "deep/c.mp4", "dQw4w9WgXcQ.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def memory(tmp_path):
    yield f"memory://{tmp_path}"
    MemoryFileSystem.store.clear()


def write(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def told(sources):
    return {source.name: source.spans for source in sources if source.is_video}


def refused(sources):
    return {source.name: source.reason for source in sources if not source.is_video}


OURS = [
    {"path": "a.mp4", "caption": "one", "licence": "CC0", "start_s": "", "end_s": "1.5"},
    {"path": "a.mp4", "caption": "", "licence": "CC0", "start_s": "2", "end_s": ""},
    {"path": "deep/c.mp4", "caption": 'Ü, "two"\nlines', "licence": "", "start_s": "", "end_s": ""},
]
SPANS = {
    "a.mp4": (Span(0.0, 1.5, "one", "CC0"), Span(2.0, None, None, "CC0")),
    "deep/c.mp4": (Span(caption='Ü, "two"\nlines'),),
}


def test_ours_as_csv_tsv_and_parquet(folder):
    assert told(expand(write(folder / "list.csv", OURS))) == SPANS
    assert told(expand(write(folder / "list.tsv", OURS, "\t"))) == SPANS
    numbers = [
        row | {"start_s": float(row["start_s"] or 0), "end_s": float(row["end_s"] or 0) or None, "odd": [1]}
        for row in OURS
    ]
    pq.write_table(pa.Table.from_pylist(numbers), folder / "list.parquet")
    assert told(expand(str(folder / "list.parquet"))) == SPANS


def test_openvid(folder):
    """The columns of OpenVid-1M.csv, and names that start from another folder."""
    row = {
        "video": "c.mp4",
        "caption": "a cat",
        "aesthetic score": "5.2",
        "motion score": "1",
        "temporal consistency score": "0.9",
        "camera motion": "pan_left",
        "frame": "120",
        "fps": "24.0",
        "seconds": "5.0",
    }
    sources = expand(write(folder / "OpenVid-1M.csv", [row]), root=str(folder / "deep"))
    assert told(sources) == {"c.mp4": (Span(caption="a cat"),)}


def test_panda_and_koala(folder):
    """Lists of web pages with videos; a file that was downloaded next to the list is used."""
    page = "https://www.youtube.com/watch?v="
    times = [["0:00:16.300", "0:01:18.100"], ["1:00:00.0", "1:00:02.5"]]
    captions = ["a dog, it's running", 'a "cat"']
    panda = {
        "videoID": "dQw4w9WgXcQ",
        "url": f"{page}dQw4w9WgXcQ",
        "timestamp": str(times),
        "caption": str(captions),
        "matching_score": "[0.5, 0.4]",
        "desirable_filtering": "['desirable', 'desirable']",
        "shot_boundary_detection": "[[['0:00:00.000', '0:00:04.271']], []]",
    }
    rows = [panda, panda | {"videoID": "other", "url": f"{page}other"}, panda | {"caption": str(captions[:1])}]
    rows += [panda | {"timestamp": json.dumps(times), "caption": json.dumps(["x", "y"])}]
    sources = expand(write(folder / "panda70m.csv", rows))
    spans = [(16.3, 78.1), (3600.0, 3602.5)]
    assert told(sources) == {
        "dQw4w9WgXcQ.mkv": tuple(
            Span(*span, text) for texts in (captions, ["x", "y"]) for span, text in zip(spans, texts, strict=True)
        )
    }
    assert refused(sources) == {"panda70m.csv:2": "not_a_file_url", "panda70m.csv:3": "bad_row"}
    one = panda | {"timestamp": str(times[:1]), "caption": str(captions[:1])}
    assert told(expand(write(folder / "one.csv", [one]))) == {"dQw4w9WgXcQ.mkv": (Span(*spans[0], captions[0]),)}
    escaped = panda | {"timestamp": json.dumps(times), "caption": json.dumps(["smile \U0001f600", None])}
    texts = tuple(Span(*span, text) for span, text in zip(spans, ("smile \U0001f600", None), strict=True))
    assert told(expand(write(folder / "escaped.csv", [escaped]))) == {"dQw4w9WgXcQ.mkv": texts}
    lone = panda | {"caption": '["\\ud83d", "\\ud83d\\ude00"]'}
    assert refused(expand(write(folder / "lone.csv", [lone]))) == {"lone.csv:1": "bad_row"}
    koala = {"videoID": "k", "url": "https://youtu.be/dQw4w9WgXcQ", "timestamp": "['0:00:01', '0:00:02']"}
    sources = expand(write(folder / "koala.csv", [koala | {"caption": "[live] a bird"}]))
    assert told(sources) == {"dQw4w9WgXcQ.mkv": (Span(1.0, 2.0, "[live] a bird"),)}


BAD = {
    "an end before the start": {"start_s": "3", "end_s": "2"},
    "not a valid time": {"start_s": "soon"},
    "a time without end": {"end_s": "inf"},
    "code": {"timestamp": "[__import__('os').system('true'), 1]"},
    "a deep list": {"timestamp": "[" * 5000},
    "no pairs": {"timestamp": "[[1, 2, 3]]"},
    "no file": {"url": ""},
    "a scheme": {"url": "ftp://host/a.mp4"},
    "a way up": {"url": "https://host/../a.mp4"},
    "a chain": {"url": "zip://a.mp4::https://host/b.zip"},
}


def test_one_bad_row_costs_one_row(folder):
    good = {"url": "a.mp4", "start_s": "", "end_s": "", "timestamp": ""}
    path = write(folder / "list.csv", [good, *(good | bad for bad in BAD.values()), good | {"url": "b.mp4"}])
    with open(path, "ab") as file:
        file.write(b"too,many,fields,in,this,row\n\xff\xfe.mp4,,,\n")
    sources = expand(path)
    assert list(told(sources)) == ["\\xff\\xfe.mp4", "a.mp4", "b.mp4"]
    reasons = refused(sources)
    assert len(reasons) == len(BAD) + 1
    assert sorted(set(reasons.values())) == ["bad_row", "url_not_allowed"]
    assert all(source.fate == "bad" for source in sources if not source.is_video)
    numbers = {f"list.csv:{number}" for number in [*range(2, len(BAD) + 2), len(BAD) + 3]}
    assert set(reasons) == numbers


@pytest.mark.parametrize(
    "text", ["", "name,caption\na.mp4,x\n", "path\n"], ids=["empty", "no column of files", "no row"]
)
def test_a_list_that_names_nothing_is_an_invalid_choice(folder, text):
    (folder / "list.csv").write_text(text)
    with pytest.raises(ConfigError, match=r"preprocess\.input"):
        expand(str(folder / "list.csv"))
    (folder / "list.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ConfigError, match="Parquet"):
        expand(str(folder / "list.parquet"))


def test_a_list_in_a_store_names_nothing_on_this_machine(memory, folder):
    lines = ["url", "a.mp4", str(folder / "a.mp4"), f"file://{folder}/a.mp4", "../a.mp4", f"{memory}/in/deep/b.mp4"]
    storage.write_bytes(f"{memory}/in/list.csv", "\n".join(lines).encode())
    sources = expand(f"{memory}/in/list.csv")
    assert {source.path for source in sources if source.is_video} == {f"{memory}/in/a.mp4", f"{memory}/in/deep/b.mp4"}
    assert list(told(sources)) == ["a.mp4", "deep/b.mp4"]
    assert set(refused(sources).values()) == {"url_not_allowed"}


def test_folders_globs_and_files_of_a_store(memory, folder):
    for name in ("a.mp4", "a.txt", "a.depth.npz", "deep/b.mp4", "deep/notes.md", "out/shards/x.mp4"):
        storage.write_bytes(f"{memory}/in/{name}", b"x")
    sources = expand(f"{memory}/in", exclude=f"{memory}/in/out")
    assert [source.name for source in sources] == ["a.mp4", "deep/b.mp4", "deep/notes.md"]
    assert refused(sources) == {"deep/notes.md": "not_a_video"}
    assert list(told(expand(f"{memory}/in/deep/*.mp4"))) == ["b.mp4"]
    assert list(told(expand(f"{memory}/in/a.mp4"))) == ["a.mp4"]
    mixed = expand([f"{memory}/in/a.mp4", str(folder / "a.mp4")])
    assert [source.name for source in mixed] == sorted(["a.mp4", f"{memory.removeprefix('memory:///')}/in/a.mp4"])


def test_names_hold_no_secret_and_stay_apart():
    urls = ["https://me:SECRET@host/a/x%20y.mp4?sig=SECRET", "https://host/a/z.mp4?v=1", "https://host/a/z.mp4?v=2"]
    names = [source.name for source in expand_list(urls)]
    assert names[0] == "x y.mp4"
    assert [name[:6] for name in names[1:]] == ["z.mp4~"] * 2
    assert len(set(names)) == 3
    assert [source.name for source in expand_list(["https://a/x.mp4", "https://b/x.mp4"])] == ["a/x.mp4", "b/x.mp4"]


def expand_list(urls):
    """Expand a list to sources, without requesting their web addresses."""
    from pipelines import inputs
    from pipelines.inputs.sources import Found

    return list(Found([inputs.Entry(url.rpartition("/")[0], url) for url in urls]))


@pytest.mark.parametrize(
    "given",
    ["ftp://host/a.mp4", "s3://bucket/../x", "https://www.youtube.com/watch?v=x", "zip://a::s3://b/c", "memory:///no"],
)
def test_a_url_that_cannot_be_an_input_is_an_invalid_choice(given):
    with pytest.raises(ConfigError):
        expand(given)


@pytest.mark.parametrize(
    ("text", "value"), [("1.5", 1.5), (2, 2.0), ("01:02", 62.0), ("1:00:00.250", 3600.25), ("0:00:16.300", 16.3)]
)
def test_times(text, value):
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-1", "1:2:3:4", "nan", "inf", "a", "1:-2", None])
def test_times_that_are_none(text):
    with pytest.raises(BadSample, match="bad_row"):
        seconds(text)


# ---------------------------------------------------------------- spans and clips

CONFIG = settings.PreprocessConfig(output="o", num_frames=5, clips_per_shot=100)
RECORD = {
    "info": {"time_base": [1, 1000], "size": [32, 32]},
    "pts_runs": [500, [100, 99]],  # ten seconds at 10/s; the first frame is shown at 0.5 s of the stream's clock
    "cuts": [50],
    "shots": [{"box": [0, 0, 32, 32], "bars": 0.0, "logo": 0.0}] * 2,
}


def frames_of(found):
    return [(clip.frame_index[0], clip.frame_index[-1], clip.caption) for clip in found]


def test_clips_lie_within_their_spans_and_shots():
    spans = [Span(1.0, 2.0, "one", "CC0"), Span(4.5, 5.5, "over the cut"), Span(9.4, 99.0, "to the end")]
    found = clips.plan("0" * 64, RECORD, CONFIG, spans)
    assert frames_of(found) == [
        (10, 14, "one"),
        (15, 19, "one"),
        (45, 49, "over the cut"),
        (50, 54, "over the cut"),
        (94, 98, "to the end"),
    ]
    assert [clip.licence for clip in found] == ["CC0", "CC0", "", "", ""]


def test_the_whole_is_what_no_span_says():
    whole = clips.plan("0" * 64, RECORD, CONFIG)
    assert whole == clips.plan("0" * 64, RECORD, CONFIG, [Span()])
    assert frames_of(whole)[0] == (0, 4, None)
    times = np.array([clip.pts for clip in whole]).ravel()
    assert len(whole) == 20
    assert (np.diff(times) == 100).all()


def test_equal_clips_of_two_spans_are_one_and_the_limit_is_the_videos():
    found = clips.plan("0" * 64, RECORD, CONFIG, [Span(1.0, 1.5, "first"), Span(1.0, 1.5, "second")])
    assert frames_of(found) == [(10, 14, "first")]
    limited = settings.PreprocessConfig(output="o", num_frames=5, clips_per_video=2)
    spans = [Span(float(start), start + 0.5, str(start)) for start in range(8)]
    assert [clip.caption for clip in clips.plan("0" * 64, RECORD, limited, spans)] == ["2", "6"]


def test_spans_that_give_nothing():
    with pytest.raises(BadSample, match="span_outside"):
        clips.plan("0" * 64, RECORD, CONFIG, [Span(11.0, 12.0), Span(50.0)])
    with pytest.raises(Filtered, match="shot_length"):
        clips.plan("0" * 64, RECORD, CONFIG, [Span(1.0, 1.3)])


OTHER_TOOLS = {
    "diffsynth.csv": "video,prompt\na.mp4,one\n",
    "imagefolder.csv": "file_name,text\na.mp4,one\n",
    "semicolons.csv": "path;caption\na.mp4;one\n",
    "tabs.csv": "path\tcaption\na.mp4\tone\n",
    "videox_fun.json": '[{"file_path": "a.mp4", "text": "one", "type": "video"}]',
    "musubi.jsonl": '{"video_path": "a.mp4", "caption": "one"}\n\n',
    "both.csv": "path,prompt,caption\na.mp4,negative,one\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_captions_of_other_tools_lists_are_read(folder, name, encoding):
    (folder / name).write_bytes(OTHER_TOOLS[name].replace("\n", "\r\n").replace("one", "one 日本").encode(encoding))
    assert told(expand(str(folder / name))) == {"a.mp4": (Span(caption="one 日本"),)}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lines_of_text_have_their_encoding_too(folder, encoding):
    (folder / "list.txt").write_bytes('# videos\r\na.mp4\r\n"b.mp4"\r\n'.encode(encoding))
    assert set(told(expand(str(folder / "list.txt")))) == {"a.mp4", "b.mp4"}


def test_columns_that_are_not_used_are_named(folder, caplog):
    (folder / "list.csv").write_text("path,aesthetic score,prompt,caption\na.mp4,5,x,one\n")
    assert told(expand(str(folder / "list.csv"))) == {"a.mp4": (Span(caption="one"),)}
    assert "unused columns: aesthetic score, prompt" in caplog.text


BAD_ROWS = {
    "gbk.csv": "path,caption\nb.mp4,good\na.mp4,十二名\n".encode("gbk"),
    "latin.csv": "path,caption\nb.mp4,good\na.mp4,Zwölf\n".encode("latin-1"),
    "nul.csv": b"path,caption\nb.mp4,good\na.mp4,x\0y\n",
    "nul_name.csv": b"path,caption\nb.mp4,good\na\0.mp4,x\n",
    "quote.csv": b'path,caption\nb.mp4,good\na.mp4,"never closed\nx,y\n',
    "number.jsonl": b'{"path": "b.mp4", "caption": "good"}\n7\n',
    "cut.jsonl": b'{"path": "b.mp4", "caption": "good"}\n{"path": "a.mp4", "cap\n',
    "nested.jsonl": b'{"path": "b.mp4", "caption": "good"}\n{"path": ["a.mp4"]}\n',
    "lone.jsonl": b'{"path": "b.mp4", "caption": "good"}\n{"path": "a.mp4", "caption": "\\ud83d"}\n',
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_costs_itself_alone(folder, name):
    (folder / name).write_bytes(BAD_ROWS[name])
    sources = expand(str(folder / name))
    assert told(sources) == {"b.mp4": (Span(caption="good"),)}
    assert refused(sources) == {f"{name}:2": "bad_row"}


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("a.json", b"{", "not a JSON list"),
        ("a.json", b'{"path": "a.mp4"}', "not a JSON list of objects"),
        ("a.json", b"[" * 100_000, "not a JSON list"),
        ("a.json", "[]".encode("latin-1") + b"\xff", "UTF-8"),
        ("a.csv", b"", "first line has nothing"),
        ("a.csv", b"a.mp4,a cat\n", "first line has a.mp4, a cat"),
        ("a.csv", b"path,caption,caption\na.mp4,x,y\n", "two columns named caption"),
        ("a.csv", b"\xff\xfep\0a\0t\0h\0\n", "byte order mark"),
        ("a.txt", b"\xff\xfea", "byte order mark"),
    ],
)
def test_what_is_no_list_is_said_before_work(folder, name, data, named):
    (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match=named) as caught:
        expand(str(folder / name))
    assert "\n" not in str(caught.value)


def dictionary_bomb(path):
    """Write a Parquet list whose 20,000 paths are one text of megabytes: kilobytes on disk, 160 GB unpacked."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * (8 << 20)]))
    pq.write_table(pa.table({"path": text}), path, compression="zstd")


def holes(path):
    with open(path, "wb") as file:
        file.write(b"path\n" if path.suffix != ".json" else b"")
        file.truncate(2**34)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.txt", "a.json", "a.jsonl"])
def test_a_list_of_gigabytes_that_is_no_list_is_refused_in_little_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr("pipelines.inputs.tables.MAX_WHOLE_BYTES", 2**20)
    path = tmp_path / name
    dictionary_bomb(path) if path.suffix == ".parquet" else holes(path)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"preprocess\.input"):
        list(expand(str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20


def test_a_name_of_megabytes_costs_its_row(folder):
    (folder / "list.txt").write_text("a.mp4\n" + "b" * (1 << 20) + "\n")
    rows = [{"path": "a.mp4"}, {"path": "b" * (1 << 20)}, {"path": "https://youtu.be/" + "b" * (1 << 20)}]
    for name, bad in (("list.txt", 1), (write(folder / "list.csv", rows), 2)):
        sources = list(expand(str(folder / name)))
        assert [source.name for source in sources if source.is_video] == ["a.mp4"]
        assert list(refused(sources).values()) == ["bad_row"] * bad
        assert all(len(str(source)) < 10_000 for source in sources)
