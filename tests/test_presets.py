"""presets.py: a copy of each hub set with one row in its schema, official numbers by hand."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import List, Value
from PIL import Image
from test_data import encoded, refused, write_parquet

import eval as evaluation
import rewards
from runtime import data, presets
from runtime.data import load_rows
from runtime.presets import PRESETS, split_choices, with_choices

ROOT = Path(__file__).resolve().parent.parent
PICTURE = {"bytes": encoded(Image.new("RGB", (40, 30), "red"), "PNG"), "path": "0.png"}
PICTURES, TEXTS, WHOLE = List(datasets.Image()), List(Value("string")), Value("int64")

QUERY = "Hint: give the letter.\nQuestion: Which?\nChoices:\n(A) No\n(B) Yes"
ASKED = "According to the question shown in the image, reason."
WE_OPTIONS = "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer"
WE_PROBLEM = "How large?\nChoices:\nA. 200.96\nB. 3215.36\nC. 6280\nD. 32\nE. No correct answer"
WE_CHOICES = ["200.96", "3215.36", "6280", "32", "No correct answer"]
COMMON = {  # columns that are the same in the stored row and in ours
    "mmk12": {"id": "7", "answer": "$\\frac{1}{2}$", "subject": "math"},
    "mathvista": {"pid": "1", "choices": ["No", "Yes"], "answer": "Yes"},
    "mathverse": {
        "sample_index": "5",
        "problem_index": "1",
        "problem_version": "Vision Only",
        "answer": "D",
    },
    "mathvision": {"id": "4", "level": 2, "subject": "counting", "answer": "B"},
    "wemath": {"ID": "3steps_165", "key": "3steps_3", "answer": "B"},
    "hallusionbench": {
        "category": "VD",
        "subcategory": "illusion",
        "visual_input": "1",
        "set_id": "0",
        "figure_id": "1",
        "question_id": "2",
    },
}
# (features that are neither texts nor a picture, row as stored, our row without images and Nones)
SAMPLES = {
    "geometry3k": (
        {"images": PICTURES},
        {"images": [PICTURE], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
        {"problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
    ),
    "clevr_count": (
        {},
        {"image": PICTURE, "problem": "How many items?", "solution": "<answer> 3 </answer>"},
        {"problem": "How many items?", "answer": "3"},
    ),
    "mmk12": (
        {},
        {"image": PICTURE, "question": "As shown, <image> find AB."},
        {"problem": "As shown, <image> find AB."},
    ),
    "mathvista": (
        {
            "choices": TEXTS,
            "precision": Value("float64"),
            "metadata": {"category": Value("string"), "skills": TEXTS, "img_width": WHOLE},
        },
        {
            "question": "Which?",
            "image": "images/1.jpg",
            "decoded_image": PICTURE,
            "unit": None,
            "precision": None,
            "question_type": "multi_choice",
            "answer_type": "text",
            "query": QUERY,
            "metadata": {"category": "vqa", "skills": ["a"], "img_width": 40},
        },
        {"problem": QUERY},
    ),
    "mathverse": (
        {"metadata": {"split": Value("string"), "source": Value("string")}},
        {
            "question": "",
            "question_type": "multi-choice",
            "query_wo": "Answer.",
            "image": PICTURE,
            "query_cot": ASKED,
            "question_for_eval": "Angle 2 is ( )\nChoices:\nA:50°\nB:60°\nC:65°\nD:90°",
            "metadata": {"split": "t", "source": "s"},
        },
        {"problem": ASKED, "choices": ["50°", "60°", "65°", "90°"]},
    ),
    "mathvision": (
        {"options": TEXTS, "level": WHOLE},
        {
            "question": "Which is next?\n<image1>",
            "options": ["1", "2"],
            "image": "images/4.jpg",
            "decoded_image": PICTURE,
            "solution": None,
        },
        {"problem": "Which is next?\n<image>\nChoices:\nA. 1\nB. 2", "choices": ["1", "2"]},
    ),
    "wemath": (
        {"question number": WHOLE},
        {
            "split": "testmini",
            "knowledge concept": "Area",
            "question": "How large?",
            "option": WE_OPTIONS,
            "image_path": PICTURE,
            "question number": 1575,
            "knowledge concept description": "Area of ...",
        },
        {"problem": WE_PROBLEM, "choices": WE_CHOICES},
    ),
    "hallusionbench": (
        {},
        {
            "sample_note": "n",
            "question": "Is it round?",
            "gt_answer": "0",
            "gt_answer_details": "It is not.",
            "filename": "VD/a.png",
            "image": PICTURE,
        },
        {"problem": "Is it round? Answer yes or no.", "answer": "no"},
    ),
    "logicvista": (
        {},
        {"image": PICTURE, "question": "Which two fit? A, B, C or D?", "answer": "D, A"},
        {"problem": "Which two fit? A, B, C or D?", "answer": "A, D"},
    ),
}


def stored_row(name: str) -> dict:
    return COMMON.get(name, {}) | SAMPLES[name][1]


def copy_of(name: str, folder: Path, without: str = "", **changes) -> str:
    row = stored_row(name) | changes
    row.pop(without, None)
    kinds = {column: datasets.Image() for column, value in row.items() if value is PICTURE}
    kinds |= {column: kind for column, kind in SAMPLES[name][0].items() if column in row}
    return write_parquet(folder, [row], **kinds)


def load_one(name: str, folder: Path, template: str | None = None, **changes) -> dict:
    path = copy_of(name, folder, **changes)
    (row,) = load_rows(path, "test", preset=name, template=template)
    return row


@pytest.mark.parametrize("name", PRESETS)
def test_a_copy_of_the_hub_set_becomes_our_row(tmp_path, name):
    row = load_one(name, tmp_path, template="none")
    assert [image.size for image in row.pop("images")] == [(40, 30)]
    assert row.pop("row") == 0
    json.dumps(row)  # predictions and samples are written as JSON
    columns = row.pop("columns")
    assert columns == {
        k: v for k, v in stored_row(name).items() if v is not PICTURE and k != "images"
    }
    given = {column: value for column, value in row.items() if value is not None}
    assert given == COMMON.get(name, {}) | SAMPLES[name][2]
    assert {"problem", "answer", "choices", "precision"} <= set(row)
    template = data.TEMPLATES[PRESETS[name].template]["user"]
    asked = load_one(name, tmp_path)["problem"]
    assert asked == template.replace("{problem}", row["problem"])


@pytest.mark.parametrize("name", PRESETS)
def test_columns_that_a_preset_reads_are_those_it_needs(tmp_path, name):
    preset, asked = PRESETS[name], set()

    class Watched(dict):
        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

    preset.row(Watched(stored_row(name)))
    preset.row(Watched(stored_row(name) | {"precision": 1.0, "answer_type": "float"}))
    assert asked == set(preset.columns)
    path = copy_of(name, tmp_path, without=preset.columns[0])
    with refused(f"is no copy of {preset.dataset}: it lacks {preset.columns[0]}"):
        load_rows(path, "test", preset=name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_gold_answer_can_be_earned(tmp_path, name):
    row = load_one(name, tmp_path)
    columns = {column: [value] * 2 for column, value in row.items() if column != "images"}
    completions = [rf"\boxed{{{row['answer']}}}", r"\boxed{77}"]
    assert rewards.accuracy_reward(completions, **columns) == [1.0, 0.0]


def test_docs_table_is_what_the_code_does():
    """docs/data.md: name, hub id, configuration, splits, columns read and template."""
    table = {}
    for line in (ROOT / "docs/data.md").read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            table[name.strip("`")] = cells[:4]
    for name, preset in PRESETS.items():
        place = ", ".join(filter(None, (preset.dataset, preset.config)))
        splits = ", ".join(filter(None, (preset.train, preset.test)))
        assert table[name] == [place, splits, ", ".join(preset.columns), preset.template], name


FLOAT = {"choices": None, "precision": 1.0, "answer": "1.2", "question_type": "free_form"}
MARKED = "<image> <image1>\nChoices:\nA. 1\nB. 2"  # one picture, however often it is marked
FREE_FORM = {"question_type": "free-form", "question_for_eval": "Find x.", "answer": "3"}


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("mathvista", FLOAT | {"answer_type": "float"}, {"precision": 1, "choices": None}),
        ("mathvista", FLOAT | {"answer_type": "list"}, {"precision": None, "choices": None}),
        ("mathvision", {"options": [], "answer": "1.2"}, {"precision": 2, "choices": None}),
        (
            "mathvision",
            {"question": "<image1> <image1>"},
            {"choices": ["1", "2"], "problem": MARKED},
        ),
        ("mathverse", FREE_FORM, {"precision": None, "choices": None}),
        ("wemath", {"option": "A or B"}, {"problem": "How large?\nA or B", "choices": None}),
        ("clevr_count", {"solution": "3"}, {"answer": "3"}),
    ],
)
def test_other_kinds_of_rows(tmp_path, name, changes, expected):
    row = load_one(name, tmp_path, template="none", **changes)
    assert {column: row[column] for column in expected} == expected


def test_a_row_unlike_the_hubs_is_a_bad_row(tmp_path):
    cases = (("clevr_count", "solution", None), ("hallusionbench", "gt_answer", "2"))
    for name, column, value in cases:
        with refused(f"row 0 .*: not as in {PRESETS[name].dataset}: (TypeError|KeyError)"):
            load_one(name, tmp_path, **{column: value})


# -------------------------------------------------------------------------- which preset and set


def test_named_by_preset_or_by_data_set_or_pointed_at_a_copy(tmp_path, monkeypatch):
    known = PRESETS["mathvista"]
    for arguments in (("mathvista", "demo"), (None, "mathvista"), ("mathvista", "mathvista")):
        assert data.find_preset(*arguments) == (known, "AI4Math/MathVista")
    assert data.find_preset("mathvista", "copy.parquet") == (known, "copy.parquet")
    assert data.find_preset(None, "copy.parquet") == (None, "copy.parquet")
    with refused("unknown preset 'mathvsta'; there are geometry3k, clevr_count"):
        load_rows(preset="mathvsta")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mathvista").mkdir()  # a folder of that name is that folder
    assert data.find_preset(None, "mathvista") == (None, "mathvista")


def test_a_preset_of_the_hub_asks_the_loader_for_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        raise FileNotFoundError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, split in (("mathverse", "testmini"), ("geometry3k", None)):
        with refused("does not exist: .*no network.*presets are geometry3k"):
            load_rows(preset=name, split=split)
    assert asked[0] == ("AI4Math/MathVerse", "testmini", "testmini")
    assert asked[1] == ("hiyouga/geometry3k", None, "train")


def test_an_evaluation_set_is_not_trained_on_by_accident():
    with refused("AI4Math/MathVista has no split to train on"):
        load_rows(preset="mathvista")
    assert data.default_split(PRESETS["mathvista"], "test") == "testmini"
    assert data.default_split(PRESETS["geometry3k"], "test") == "test"
    assert data.default_split(None, "test") == "test"


# --------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "text, separator, choices",
    [
        ("A. 1;B. 2; C. no one", ";", ["1", "2", "no one"]),
        ("\nA:50°\nB:60°", r"\n", ["50°", "60°"]),
        ("A. x = {1; 2};B. 3.5", ";", ["x = {1; 2}", "3.5"]),
        ("A. 1;C. 2", ";", None),
        ("A. 1", ";", None),
        ("A. ;B. 2", ";", None),
        ("none", ";", None),
        ("", ";", None),
    ],
)
def test_choices_of_one_string(text, separator, choices):
    assert split_choices(text, separator) == choices


@pytest.mark.parametrize(
    "choices, problem",
    [
        (["red", "blue"], "Which?\nChoices:\nA. red\nB. blue"),
        (["A. red", "B. blue"], "Which?\nChoices:\nA. red\nB. blue"),  # lettered already
        (["(A) red", "(B) blue"], "Which?\nChoices:\n(A) red\n(B) blue"),
        (["A. red", "A. blue"], "Which?\nChoices:\nA. A. red\nB. A. blue"),
        (["red", "B. blue"], "Which?\nChoices:\nA. red\nB. B. blue"),
        (None, "Which?"),
        ([], "Which?"),
    ],
)
def test_choices_are_written_under_the_question_and_lettered_once(choices, problem):
    assert with_choices("Which?", choices) == problem


# ------------------------------------------------------------------------------ official numbers


def composite(ID: str, whole: float, *steps: float) -> list[dict]:
    n = len(steps)
    records = [{"ID": ID, "key": f"{n}steps_multi", "greedy_right": whole}]
    for i, right in enumerate(steps, 1):
        records.append({"ID": ID, "key": f"{n}steps_{i}", "greedy_right": right})
    return records


def test_wemath_scores_by_hand():
    records = composite("mastered", 1, 1, 1)
    records += composite("by rote if strict", 1, 1, 0, 1)
    records += composite("by rote", 1, 0, 0)
    records += composite("not generalised", 0, 1, 1)
    records += composite("not known", 0, 1, 0)
    records += composite("lacks the composite", 1, 1, 1)[1:]
    records += composite("lacks a step", 1, 1, 1)[:2]
    scores = presets.wemath_scores(records)
    assert (scores["composites"], scores["IK"], scores["IG"]) == (5, 1, 1)
    assert (scores["RM strict"], scores["RM loose"]) == (2, 1)
    assert scores["strict"] == pytest.approx((5 - 1 - 0.5 - 2) / 5)
    assert scores["loose"] == pytest.approx((5 - 1 - 0.5 - 1) / 5)


def test_hallusionbench_scores_by_hand():
    records = []
    for category, figure, question, right in (
        ("VD", "0", "0", 1.0),
        ("VD", "0", "1", 1.0),
        ("VD", "1", "0", 0.0),
        ("VD", "1", "1", 1.0),
        ("VD", "2", "1", 1.0),
        ("VS", "0", "0", 0.0),
    ):
        place = {"category": category, "subcategory": "s", "set_id": "0", "figure_id": figure}
        records.append(place | {"question_id": question, "greedy_right": right})
    # right figures: 0 and 2 of three (VS 0 has none). Right questions: VD 1 of VD 0, VD 1 and VS 0
    assert presets.hallusionbench_scores(records) == {"aAcc": 4 / 6, "fAcc": 2 / 3, "qAcc": 1 / 3}


def test_mathverse_mean_of_each_version():
    records = []
    for version, right in (("Text Lite", 1.0), ("Text Lite", 0.0), ("V", 1.0)):
        records.append({"problem_version": version, "greedy_right": right})
    assert presets.mathverse_versions(records) == {"Text Lite": 0.5, "V": 1.0}


def evaluate(tiny: str, folder: Path, preset: str) -> dict:
    options = {"preset": preset, "dataset": copy_of(preset, folder), "max_new_tokens": 4}
    options |= {"model": tiny, "output": str(folder / "out"), "samples": 2, "k": [1]}
    return evaluation.main(evaluation.load_config(**options))


def test_eval_grades_with_the_choices(tiny, tmp_path, monkeypatch):
    def accuracy(completions, answer, choices, precision, **columns):
        n = len(completions)
        assert (answer, precision, choices) == (["B"] * n, [None] * n, [WE_CHOICES] * n)
        return [1.0] * n

    monkeypatch.setattr(rewards, "accuracy_reward", accuracy)
    result = evaluate(tiny, tmp_path, "wemath")
    assert result["splits"]["testmini"]["greedy"][0] == 1.0


def test_eval_reports_them_and_says_that_it_scored_by_rule(tiny, tmp_path, capsys):
    result = evaluate(tiny, tmp_path, "hallusionbench")
    assert result["dataset"] == str(tmp_path / "rows.parquet")
    assert result["official"] == {"image": {"aAcc": 0.0, "fAcc": 0.0, "qAcc": 0.0}}
    assert "a language model" in json.loads((tmp_path / "out.json").read_text())["by_rule"]
    assert "aAcc 0" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert record["figure_id"] == "1" and record["answer"] == "no"
