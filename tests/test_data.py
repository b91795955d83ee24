"""data.py: the sources, the columns, and what a bad row gets (DESIGN.md's table)."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

import data
from data import load_rows


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return pixels


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def good(**changes):
    return {"image": "a.png", "question": "How many?", "solution": "3"} | changes


def test_demo_rows_are_lazy_and_repeatable():
    rows = load_rows("demo", "plain/test", limit=5)
    assert len(rows) == 5 and len(load_rows("demo", "plain/train")) == 1_000_000
    assert rows[3]["problem"] == load_rows("demo", "plain/test")[3]["problem"]


def test_json_lines_with_paths_beside_the_file(tmp_path, picture):
    (row,) = load_rows(write(tmp_path, [good(kind="x")]), "train")
    assert (row["problem"], row["answer"], row["kind"]) == ("How many?", "3", "x")
    assert np.array_equal(np.asarray(row["images"][0]), picture)


def test_parquet_and_saved_sets_with_image_features(tmp_path, picture):
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = {"images": [[Image.fromarray(picture)] * 2], "problem": ["Two of them"], "answer": ["\\frac{1}{2}"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "dict")
    for source in ("t.parquet", "one", "dict"):
        (row,) = load_rows(str(tmp_path / source), "test")
        assert len(row["images"]) == 2 and np.array_equal(np.asarray(row["images"][1]), picture)
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        load_rows(str(tmp_path / "dict"), "train")


def test_text_only_row(tmp_path):
    (row,) = load_rows(write(tmp_path, [good(image=None)]), "train")
    assert row["images"] == []


def test_missing_column_is_named(tmp_path, picture):
    with pytest.raises(
        ValueError, match="no column for answer: looked for answer, solution, ground_truth, found image, q"
    ):
        load_rows(write(tmp_path, [{"image": "a.png", "question": "?"}]), "train")


def test_empty_set_is_refused(tmp_path):
    datasets.Dataset.from_dict({"images": [], "problem": [], "answer": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(str(tmp_path / "empty.parquet"), "train")


def test_unknown_demo_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'plain'"):
        load_rows("demo", "plain")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": "missing.png"}, "unreadable image: .*No such file"),
        ({"image": "broken.png"}, "unreadable image: cannot identify"),
        ({"image": "cut.png"}, "unreadable image: .*truncated"),
        ({"question": "  "}, "the problem is empty"),
        ({"solution": ""}, "gold answer '' cannot be parsed"),
        ({"solution": None}, "gold answer '' cannot be parsed"),
    ],
)
def test_bad_row_is_refused_with_its_index_or_skipped_and_named(tmp_path, picture, capsys, changes, reason):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    path = write(tmp_path, [good(), good(**changes), good(solution="4")])
    with pytest.raises(ValueError, match=f"row 1: {reason}.*--bad_rows skip"):
        load_rows(path, "train")
    rows = load_rows(path, "train", bad_rows="skip")
    assert [row["answer"] for row in rows] == ["3", "4"]
    assert "skipped 1 bad rows: row 1:" in capsys.readouterr().out


def test_all_rows_bad_is_refused(tmp_path, picture):
    with pytest.raises(ValueError, match="has no usable row: 1 are bad, 0 are too long"):
        load_rows(write(tmp_path, [good(question="")]), "train", bad_rows="skip")


def test_trap_04_long_prompts_are_filtered_and_counted(tmp_path, picture, policy, capsys):
    path = write(tmp_path, [good(), good(question="How many? " * 50)])
    (row,) = load_rows(path, "train", prompt_tokens=policy.prompt_tokens, max_prompt_tokens=60)
    assert row["problem"] == "How many?"
    assert "left out 1 rows with more than 60 prompt tokens" in capsys.readouterr().out
    assert policy.prompt_tokens(row) == policy.encode([row["problem"]], [row["images"]]).ids.shape[1]


def test_zero_size_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unreadable image: it has zero size"):
        data.to_image(Image.new("RGB", (0, 5)), tmp_path)
