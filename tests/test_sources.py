"""sources.py: files of text as they are written, encodings, folders and splits, foreign tables."""

import datetime
import decimal
import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import corners, good, load, paint, picture, problems, refused, write

from runtime import sources
from runtime.data import load_rows

__all__ = ["picture"]  # a fixture
GOOD = json.dumps(good())


def answers(path, **options):
    return [row["answer"] for row in load_rows(str(path), **options)]


def write_table(folder, **columns):
    path = folder / "rows.parquet"
    content = {"problem": ["?"], "image": pa.array([None], pa.binary())} | columns
    pq.write_table(pa.table(content), path)
    return path


# ----------------------------------------------------------------------------- what values become


TEXTS = ["2023-05-04", "2023-05-04T10:00:00", "10:30", "007", "1e3", "NA", "1.50", "None", "true"]


def test_texts_stay_as_they_are_written(tmp_path, picture):
    """Dates too: readers that guess types give other texts, or none that can be written as JSON."""
    assert answers(write(tmp_path, [good(solution=text) for text in TEXTS])) == TEXTS
    lines = ["image,question,solution", *(f"a.png,?,{text}" for text in TEXTS)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    assert answers(tmp_path / "rows.csv") == TEXTS


def test_a_column_may_hold_values_of_several_types(tmp_path, picture):
    rows = [good(solution=value, more=value) for value in (3, "x", True, 1.5)]
    rows.append({"question": "Which?", "solution": "y"})  # lacks columns of the others
    assert answers(write(tmp_path, rows)) == ["3", "x", "true", "1.5", "y"]


DAY = datetime.datetime(2023, 5, 4)


@pytest.mark.parametrize(
    "value, text",
    [
        (datetime.date(2023, 5, 4), "2023-05-04"),
        (DAY, "2023-05-04"),  # as pandas prints a column of days
        (DAY.replace(hour=10), "2023-05-04 10:00:00"),
        (DAY.replace(tzinfo=datetime.UTC), "2023-05-04 00:00:00+00:00"),
        (datetime.time(10, 30), "10:30:00"),
        (datetime.timedelta(hours=1), "1:00:00"),
        (decimal.Decimal("2.50"), "2.50"),
        (decimal.Decimal("1E+2"), "100"),
    ],
)
def test_values_of_tables_become_texts(tmp_path, monkeypatch, value, text):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    path = write_table(tmp_path, answer=pa.array([value]), other=pa.array([[value]]))
    for streaming in (False, True):
        row = load_rows(str(path), streaming=streaming)[0]
        assert (row["answer"], row["columns"]["other"]) == (text, [text])
        json.dumps(row["columns"])


def test_bytes_are_left_out_and_classes_and_short_floats_are_shown_as_in_the_data(tmp_path):
    columns = {"raw": pa.array([b"\xff"]), "nested": pa.array([{"raw": b"\xff", "x": 1}])}
    path = write_table(tmp_path, answer=pa.array([0.1], pa.float32()), **columns)
    (row,) = load_rows(str(path))
    assert row["answer"] == "0.1"
    assert row["columns"] == {"answer": 0.1, "nested": {"raw": None, "x": 1}, "problem": "?"}
    table = datasets.Dataset.from_dict({"image": [None], "problem": ["?"], "answer": [1]})
    table = table.cast_column("answer", datasets.ClassLabel(names=["cat", "dog"]))
    table.save_to_disk(tmp_path / "saved")
    (row,) = load_rows(str(tmp_path / "saved"))
    assert row["answer"] == row["columns"]["answer"] == "dog"


def test_sounds_and_films_beside_the_columns_are_not_decoded(tmp_path):
    """Decoding needs packages that are not installed."""
    sound = {"bytes": b"no sound", "path": None}
    row = {"image": None, "problem": "?", "answer": "1", "sound": sound, "film": sound}
    text = datasets.Value("string")
    kinds = {"image": text, "problem": text, "answer": text}
    kinds |= {"sound": {"bytes": datasets.Value("binary"), "path": text}}
    kinds["film"] = kinds["sound"]
    table = datasets.Dataset.from_list([row], features=datasets.Features(kinds))
    features = table.features | {"sound": datasets.Audio(), "film": datasets.Video()}
    features = datasets.Features(features)
    sources_of = sources.table_source(table.cast(features), tmp_path)
    assert sources_of.read(0)["sound"] == sound
    assert [name for name, kind in features.items() if sources.is_media(kind)] == ["sound", "film"]


# -------------------------------------------------------------------------- what a file looks like


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.jsonl", f"\ufeff{GOOD}"),
        ("rows.jsonl", f"\n\n  {GOOD}\r\n\r\n"),
        ("rows.json", f"{GOOD}\n"),  # the content decides, not the ending
        ("rows.jsonl", f"[{GOOD}]"),
        ("rows.json", f"\n [\n {GOOD}\n]\n"),
        ("rows.json", f'{{"version": 1, "data": [{GOOD}]}}'),
        ("rows.json", f'{{\n"data": [\n{GOOD}]}}'),
        ("rows.csv", "image,question,solution\r\na.png,How many?,3\r\n"),
        ("rows.csv", "\ufeffimage;question;solution\na.png;How many?;3\n"),
        ("ROWS.JSONL", GOOD),
        ("rows.tsv", "image\tquestion\tsolution\na.png\tHow many?\t3\n\n"),
        ("rows.csv", 'image,question,solution\n"[""a.png""]","How many?",3\n'),
    ],
)
def test_forms_of_a_file(tmp_path, picture, name, text):
    (tmp_path / name).write_text(text, newline="")
    (row,) = load_rows(str(tmp_path / name))
    assert (row["problem"], row["answer"], len(row["images"])) == ("How many?", "3", 1)


def test_cells_of_a_table(tmp_path, picture):
    """A cell of several lines, an empty one (no picture), choices as a list in Python's form."""
    text = "image,question,answer,options\n,\"What,\nhere?\",a,\"['a', 'b']\"\na.png,?,3,\n"
    (tmp_path / "rows.csv").write_text(text)
    first, second = load_rows(str(tmp_path / "rows.csv"))
    assert first["problem"] == "What,\nhere?\nChoices:\nA. a\nB. b"
    assert (first["images"], len(second["images"]), second["choices"]) == ([], 1, None)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl is in UTF-16 or UTF-32, .* save it as UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16-le"), "a.jsonl is in UTF-16"),
        ("a.csv", "image,question".encode("utf-16"), "a.csv is in UTF-16"),
        (
            "a.jsonl",
            f'{GOOD}\n{{"question": "Größe"}}'.encode("latin-1"),
            "a.jsonl, line 2: byte 0xf6 is not UTF-8; the encoding may be Latin-1",
        ),
        ("a.csv", "x\n\ngroß\n".encode("latin-1"), "a.csv, line 3: byte 0xdf is not UTF-8"),
        ("a.json", "[\n1,\n'é'".encode("latin-1"), "a.json, line 3: byte 0xe9 is not UTF-8"),
        ("a.json", b'[{"a": 1},\n {"b" 2}]', "a.json, line 2, column 7: not valid JSON"),
        ("a.jsonl", b'{"a": "x\ty"}', "not valid JSON: Invalid .* character at column"),
        ("a.jsonl", b'\n{"a": 1,\n{"b"', "a.jsonl, line 2: not valid JSON: .* at column"),
        ("a.jsonl", b"3\n4\n", "a.jsonl, line 1: no object but 3"),
        ("a.jsonl", b"{}\n", "Found: none. Name them by"),
        ("a.json", b'{\n"a": 1}', "a.json holds one object with the keys a: write a list"),
        ("a.json", b"[[1], [2]]", r"a.json must hold objects, a row each, not \[1\]"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b"\n \n", "has no rows"),
        ("a.json", b"", "a.json is empty .0 bytes"),
        ("a.csv", b"\n", "a.csv is empty: it has no header"),
        ("a.csv", b"image,question\n", "has no rows"),
        ("a.csv", b"image,image\n", "two columns have one name: image, image"),
        ("a.jsonl", sources.LFS + b"/spec/v1\n", "a.jsonl is a Git LFS pointer"),
        ("a.parquet", b"", "a.parquet is empty"),
        ("a.parquet", b"no parquet", "a.parquet .train. cannot be read"),
        ("a.arrow", b"no arrow", "a.arrow .train. cannot be read"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    for streaming in (False, True):
        with refused(reason) as caught:
            load_rows(str(tmp_path / name), streaming=streaming)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_broken_lines_are_bad_rows(tmp_path, picture, capsys):
    lines = [GOOD, "", '{"image": ', "[1, 2]", "9" * 5000, GOOD]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with refused(
        "3 of 5 rows cannot be used: row 1 .line 3 of rows.jsonl.: not valid JSON: .*colu"
    ):
        load_rows(str(path))
    assert [row["row"] for row in load_rows(str(path), bad_rows="skip")] == [0, 4]
    said = capsys.readouterr().out
    assert "row 2 (line 4 of rows.jsonl): it is no object but [1, 2]" in said
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,?,1\na.png,a,b,c\n")
    with refused("row 1 .line 3 of rows.csv.: it has 4 cells for 3 columns: .*needs quotes"):
        load_rows(str(tmp_path / "rows.csv"))


def test_a_file_that_is_replaced_keeps_its_rows_and_a_changed_one_is_refused(tmp_path, picture):
    path = write(tmp_path, [good(), good(solution="4")])
    rows = load_rows(path)
    write(tmp_path, [good(solution="9")] * 2, "new.jsonl")
    (tmp_path / "new.jsonl").replace(path)  # as editors write
    assert rows[1]["answer"] == "4"
    rows = load_rows(path)
    with open(path, "a") as file:
        file.write("\n")
    with refused("row 1 was usable at the start.*rows.jsonl was changed after it was opened"):
        rows[1]


# ------------------------------------------------------------------------------------ folders, hub


def test_a_relative_folder_is_read_as_an_absolute_one(tmp_path, monkeypatch):
    paint(tmp_path / "mine/images", a="red")
    write(tmp_path / "mine", [good(image="images/a.png")], "train.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine/", "mine/../mine", str(tmp_path / "mine")):
        for streaming in (False, True):
            assert corners(load_rows(name, streaming=streaming)[0]["images"]) == [(255, 0, 0)]
    (tmp_path / "shards").mkdir()
    write_table(tmp_path / "shards", answer=["1"])
    assert answers("shards") == ["1"]
    datasets.load_dataset("parquet", data_files="shards/rows.parquet").save_to_disk("saved")
    assert answers("saved") == ["1"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("nope.jsonl", "nope.jsonl does not exist: looked at /.*/nope.jsonl"),
        ("./nope", "nope does not exist: looked at /.*/nope"),
        ("a/b/c", "a/b/c does not exist: looked at /.*/a/b/c"),
        ("nobody/nope", "looked at /.*/nobody/nope; as a hub id .*presets are geometry3k"),
        ("mine.jsnl", "mine.jsnl does not exist: .*; did you mean mine.jsonl"),
        ("mine", "mine does not exist: .*; did you mean mine.jsonl"),
        ("miin.jsonl", "miin.jsonl does not exist: .*; did you mean mine.jsonl"),
        ("empty", "empty holds no file that can be read"),
    ],
)
def test_the_place_that_was_looked_at_is_named(tmp_path, monkeypatch, name, reason):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.jsonl").touch()
    with refused(reason):
        load_rows(name)


def test_pictures_beside_their_own_file(tmp_path):
    """Two folders may have pictures of one name."""
    for name in ("red", "blue"):
        paint(tmp_path / name, a=name)
        write(tmp_path / name, [good()], "train.jsonl")
    rows = load_rows(str(tmp_path))
    assert [corners(row["images"]) for row in rows] == [[(0, 0, 255)], [(255, 0, 0)]]
    stream = load_rows(str(tmp_path), streaming=True)
    assert {corners(stream[i]["images"])[0] for i in range(2)} == {(0, 0, 255), (255, 0, 0)}


def test_one_metadata_file_above_the_splits(tmp_path):
    lines = []
    for split, colour in (("train", "red"), ("test", "blue")):
        paint(tmp_path / split, a=colour)
        lines.append({"file_name": f"{split}/a.png", "question": "?", "answer": "2023-05-04"})
    write(tmp_path, lines, "metadata.jsonl")
    for split, colour in (("train", (255, 0, 0)), ("test", (0, 0, 255))):
        (row,) = load_rows(str(tmp_path), split)
        assert (row["answer"], corners(row["images"])) == ("2023-05-04", [colour])


def test_what_belongs_to_a_folder(tmp_path, picture):
    """A description without data files, hidden files and the library's own files do not count."""
    write(tmp_path, [good()], "rows.jsonl")
    (tmp_path / "README.md").write_text("# mine\nno data_files: here\n")
    for name in (".cache/train.json", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert answers(tmp_path) == ["3"]
    with refused(
        "named after the split 'val': rows.jsonl; name a file by --dataset or another spl"
    ):
        load_rows(str(tmp_path), "val")
    write(tmp_path, [good()], "train.jsonl")
    (tmp_path / "train.csv").write_text("image,question,answer\n")
    with refused("holds the split 'train' in several formats: train.csv, train.jsonl; name one"):
        load_rows(str(tmp_path))


def test_a_copy_of_a_hub_set_with_its_description(tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path, answer=["1"]).rename(tmp_path / "data/train-00000-of-00001.parquet")
    split = "  - split: train\n    path: data/train-*\n"
    described = f"---\nconfigs:\n- config_name: default\n  data_files:\n{split}---\n"
    (tmp_path / "README.md").write_text(described)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert answers(tmp_path) == ["1"]
    for streaming in (False, True):
        with refused("validation. cannot be read or has no rows: .*train"):
            load_rows(str(tmp_path), "validation", streaming=streaming)


def test_pictures_and_fields_of_tar_files(tmp_path, picture):
    """WebDataset: pictures and objects of one name. A field of an object is column.field."""
    fields = json.dumps({"question": "How many?", "gold": "3"}).encode()
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for name, content in (("0.png", (tmp_path / "a.png").read_bytes()), ("0.json", fields)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.png").unlink()
    columns = {"image": "png", "problem": "json.question", "answer": "json.gold"}
    (row,) = load_rows(str(tmp_path), columns=columns)
    assert (row["problem"], row["answer"], row["images"][0].size) == ("How many?", "3", (60, 40))
    with refused("Found: __key__, __url__, json.question, json.gold, png"):
        load_rows(str(tmp_path))


def test_a_stream_of_several_files(tmp_path, picture):
    for part in range(2):
        rows = [good(question=f"{part} {i}?") for i in range(3)]
        write(tmp_path, rows, f"train-{part}.jsonl")
    found = problems(load_rows(str(tmp_path), streaming=True), range(6))
    assert sorted(found) == problems(load_rows(str(tmp_path)), range(6))
    assert found[0] in {f"{part} {i}?" for part in range(2) for i in range(3)}
    first = load_rows(str(tmp_path), streaming=True, limit=4)
    assert problems(first, range(4)) == ["0 0?", "0 1?", "0 2?", "1 0?"] and len(first) == 4


def test_all_bad_rows_are_counted_and_the_first_are_named(tmp_path, picture):
    bad = [good(image=f"{i}.png") for i in range(8)]
    rows = [good()] * 3 + bad + [good()] * 9
    with refused("8 of 20 rows cannot be used: row 3 .line 4 of rows.jsonl.: .*0.png") as caught:
        load(tmp_path, *rows)
    said = str(caught.value)
    assert said.count("unreadable image") == 3 and "; and 5 more. Mend them, or leave" in said
    with refused("has no usable row: 8 of 8 rows cannot be used: row 0"):
        load(tmp_path, *bad, bad_rows="skip")
