"""presets.py: a small set in each hub set's own schema, loaded from disk as a copy of it; official numbers by hand."""

import io
import json
from pathlib import Path

import datasets
import pytest
from datasets import Features, Image, List, Value
from PIL import Image as Pictures

import eval as evaluation
import rewards
from runtime import data, presets
from runtime.presets import PRESETS, split_choices, with_choices

ROOT = Path(__file__).resolve().parent.parent
TEXT, WHOLE, FLOAT = Value("string"), Value("int64"), Value("float64")


def picture(width: int = 40, colour: str = "red") -> dict:
    """As parquet on the hub holds it."""
    file = io.BytesIO()
    Pictures.new("RGB", (width, 30), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "0.png"}


# name -> (features, a row as stored, our row without images and what is None)
SAMPLES = {
    "geometry3k": (
        {"images": List(Image()), "problem": TEXT, "answer": TEXT},
        {"images": [picture()], "problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
        {"problem": "<image>Find $x$.", "answer": "2 \\sqrt { 221 }"},
    ),
    "clevr_count": (
        {"image": Image(), "problem": TEXT, "solution": TEXT},
        {
            "image": picture(),
            "problem": "How many items are in the image?",
            "solution": "<answer> 3 </answer>",
        },
        {"problem": "How many items are in the image?", "answer": "3"},
    ),
    "mmk12": (
        {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": Image()},
        {
            "id": "7",
            "question": "As shown, <image> find AB.",
            "answer": "$\\frac{1}{2}$",
            "subject": "math",
        }
        | {"image": picture()},
        {
            "problem": "As shown, <image> find AB.",
            "answer": "$\\frac{1}{2}$",
            "id": "7",
            "subject": "math",
        },
    ),
    "mathvista": (
        {
            "pid": TEXT,
            "question": TEXT,
            "image": TEXT,
            "decoded_image": Image(),
            "choices": List(TEXT),
            "unit": TEXT,
        }
        | {
            "precision": FLOAT,
            "answer": TEXT,
            "question_type": TEXT,
            "answer_type": TEXT,
            "query": TEXT,
        }
        | {"metadata": {"category": TEXT, "skills": List(TEXT), "img_width": WHOLE}},
        {
            "pid": "1",
            "question": "Which?",
            "image": "images/1.jpg",
            "decoded_image": picture(),
            "choices": ["No", "Yes"],
        }
        | {
            "unit": None,
            "precision": None,
            "answer": "Yes",
            "question_type": "multi_choice",
            "answer_type": "text",
        }
        | {"query": "Hint: give the letter.\nQuestion: Which?\nChoices:\n(A) No\n(B) Yes"}
        | {"metadata": {"category": "vqa", "skills": ["a"], "img_width": 40}},
        {
            "problem": "Hint: give the letter.\nQuestion: Which?\nChoices:\n(A) No\n(B) Yes",
            "answer": "Yes",
        }
        | {"choices": ["No", "Yes"], "pid": "1"},
    ),
    "mathverse": (
        {
            name: TEXT
            for name in ("sample_index", "problem_index", "problem_version", "question", "answer")
        }
        | {name: TEXT for name in ("question_type", "query_wo", "query_cot", "question_for_eval")}
        | {"image": Image(), "metadata": {"split": TEXT, "source": TEXT}},
        {
            "sample_index": "5",
            "problem_index": "1",
            "problem_version": "Vision Only",
            "question": "",
            "answer": "D",
        }
        | {"question_type": "multi-choice", "query_wo": "Answer.", "image": picture()}
        | {
            "query_cot": "According to the question shown in the image, reason.",
            "metadata": {"split": "t"},
        }
        | {"question_for_eval": "Angle 2 is ( )\nChoices:\nA:50°\nB:60°\nC:65°\nD:90°"},
        {
            "problem": "According to the question shown in the image, reason.",
            "answer": "D",
            "sample_index": "5",
        }
        | {
            "choices": ["50°", "60°", "65°", "90°"],
            "problem_index": "1",
            "problem_version": "Vision Only",
        },
    ),
    "mathvision": (
        {
            "id": TEXT,
            "question": TEXT,
            "options": List(TEXT),
            "image": TEXT,
            "decoded_image": Image(),
            "answer": TEXT,
        }
        | {"solution": TEXT, "level": WHOLE, "subject": TEXT},
        {
            "id": "4",
            "question": "Which is next?\n<image1>",
            "options": ["1", "2"],
            "image": "images/4.jpg",
        }
        | {
            "decoded_image": picture(),
            "answer": "B",
            "solution": None,
            "level": 2,
            "subject": "counting",
        },
        {
            "problem": "Which is next?\n<image>\nChoices:\nA. 1\nB. 2",
            "answer": "B",
            "choices": ["1", "2"],
        }
        | {"id": "4", "level": 2, "subject": "counting"},
    ),
    "wemath": (
        {
            name: TEXT
            for name in ("ID", "split", "knowledge concept", "question", "option", "answer", "key")
        }
        | {"image_path": Image(), "question number": WHOLE, "knowledge concept description": TEXT},
        {
            "ID": "3steps_165",
            "split": "testmini",
            "knowledge concept": "Area",
            "question": "How large?",
            "answer": "B",
        }
        | {"option": "A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer", "key": "3steps_3"}
        | {
            "image_path": picture(),
            "question number": 1575,
            "knowledge concept description": "Area of ...",
        },
        {
            "problem": "How large?\nChoices:\nA. 200.96\nB. 3215.36\nC. 6280\nD. 32\nE. No correct answer",
            "answer": "B",
        }
        | {
            "choices": ["200.96", "3215.36", "6280", "32", "No correct answer"],
            "ID": "3steps_165",
            "key": "3steps_3",
        },
    ),
    "hallusionbench": (
        {
            name: TEXT
            for name in (
                "category",
                "subcategory",
                "visual_input",
                "set_id",
                "figure_id",
                "question_id",
            )
        }
        | {
            "sample_note": TEXT,
            "question": TEXT,
            "gt_answer": TEXT,
            "gt_answer_details": TEXT,
            "filename": TEXT,
        }
        | {"image": Image()},
        {
            "category": "VD",
            "subcategory": "illusion",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": "1",
        }
        | {"question_id": "2", "sample_note": "n", "question": "Is it round?", "gt_answer": "0"}
        | {"gt_answer_details": "It is not.", "filename": "VD/a.png", "image": picture()},
        {
            "problem": "Is it round? Answer yes or no.",
            "answer": "no",
            "category": "VD",
            "subcategory": "illusion",
        }
        | {"set_id": "0", "figure_id": "1", "question_id": "2", "visual_input": "1"},
    ),
    "logicvista": (
        {"image": Image(), "question": TEXT, "answer": TEXT},
        {"image": picture(), "question": "Which two fit? A, B, C or D?", "answer": "D, A"},
        {"problem": "Which two fit? A, B, C or D?", "answer": "A, D"},
    ),
}


def copy_of(name: str, folder: Path, **changes) -> str:
    features, raw, _ = SAMPLES[name]
    path = folder / f"{name}.parquet"
    datasets.Dataset.from_list([raw | changes], features=Features(features)).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_copy_of_the_hub_set_becomes_our_row(tmp_path, name):
    (row,) = data.load_rows(copy_of(name, tmp_path), "test", preset=name, template="none")
    assert [x.size for x in row.pop("images")] == [(40, 30)]
    assert row.pop("row") == 0
    assert {k: v for k, v in row.items() if v is not None} == SAMPLES[name][2]
    assert {"problem", "answer", "choices", "precision"} <= set(row)
    json.dumps(row)  # predictions and samples are written as JSON
    (asked,) = data.load_rows(copy_of(name, tmp_path), "test", preset=name)
    assert asked["problem"] == data.TEMPLATES[PRESETS[name].template]["user"].replace(
        "{problem}", row["problem"]
    )


@pytest.mark.parametrize("name", PRESETS)
def test_columns_that_a_preset_reads_are_those_it_needs(tmp_path, name):
    preset, (features, raw, _) = PRESETS[name], SAMPLES[name]
    asked = set()

    class Watched(dict):
        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

    preset.row(Watched(raw))
    preset.row(Watched(raw | {"precision": 1.0, "answer_type": "float"}))
    assert asked == set(preset.columns)
    lacking = {k: v for k, v in features.items() if k != preset.columns[0]}
    path = tmp_path / "other.parquet"
    datasets.Dataset.from_list(
        [{k: raw[k] for k in lacking}], features=Features(lacking)
    ).to_parquet(path)
    with pytest.raises(
        ValueError, match=f"is no copy of {preset.dataset}: it lacks {preset.columns[0]}"
    ):
        data.load_rows(str(path), "test", preset=name)


def test_docs_table_is_what_the_code_does():
    """docs/data.md: name, hub id, configuration, splits, columns read and template of every preset."""
    lines = [
        line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("| `")
    ]
    rows = {
        cells[0].strip("`"): cells
        for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines)
    }
    assert set(PRESETS) <= set(rows)
    for name, p in PRESETS.items():
        where = ", ".join(x for x in (p.dataset, p.config) if x)
        splits = ", ".join(x for x in (p.train, p.test) if x)
        assert rows[name][1:5] == [where, splits, ", ".join(p.columns), p.template], name


def test_numbers_count_to_the_stated_precision(tmp_path):
    float_answer = {
        "choices": None,
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
    }
    (row,) = data.load_rows(
        copy_of("mathvista", tmp_path, **float_answer, answer_type="float"),
        "test",
        preset="mathvista",
    )
    assert (row["precision"], row["choices"]) == (1, None)
    (row,) = data.load_rows(
        copy_of("mathvista", tmp_path, **float_answer, answer_type="list"),
        "test",
        preset="mathvista",
    )
    assert row["precision"] is None
    (row,) = data.load_rows(
        copy_of("mathvision", tmp_path, options=[], answer="1.25"), "test", preset="mathvision"
    )
    assert (row["precision"], row["choices"]) == (2, None)


def test_free_form_mathverse_has_no_choices(tmp_path):
    path = copy_of(
        "mathverse", tmp_path, question_type="free-form", question_for_eval="Find x.", answer="3"
    )
    assert data.load_rows(path, "test", preset="mathverse")[0]["choices"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_gold_answer_can_be_earned(tmp_path, name):
    (row,) = data.load_rows(copy_of(name, tmp_path), "test", preset=name)
    columns = {k: [v] * 2 for k, v in row.items() if k != "images"}
    right, wrong = rewards.accuracy_reward(
        [rf"\boxed{{{row['answer']}}}", r"\boxed{77}"], **columns
    )
    assert (right, wrong) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------------- which, where


def test_named_by_preset_or_by_data_set_or_pointed_at_a_copy():
    for arguments in (("mathvista", "demo"), (None, "mathvista"), ("mathvista", "mathvista")):
        assert data.find_preset(*arguments) == (PRESETS["mathvista"], "AI4Math/MathVista")
    assert data.find_preset("mathvista", "copy.parquet") == (PRESETS["mathvista"], "copy.parquet")
    assert data.find_preset(None, "copy.parquet") == (None, "copy.parquet")
    with pytest.raises(
        ValueError, match="unknown preset 'mathvsta'; there are geometry3k, clevr_count"
    ):
        data.load_rows(preset="mathvsta")


def test_a_preset_of_the_hub_asks_the_loader_for_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        raise FileNotFoundError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, split in (("mathverse", "testmini"), ("geometry3k", None)):
        with pytest.raises(ValueError, match="cannot be found.*no network.*presets are geometry3k"):
            data.load_rows(preset=name, split=split)
    assert asked == [
        ("AI4Math/MathVerse", "testmini", "testmini"),
        ("hiyouga/geometry3k", None, "train"),
    ]


def test_an_evaluation_set_is_not_trained_on_by_accident(tmp_path):
    with pytest.raises(
        ValueError, match="AI4Math/MathVista has no split for this purpose \\(train\\)"
    ):
        data.load_rows(preset="mathvista")
    assert evaluation.EvalConfig("m", "o", preset="mathvista").splits == ["testmini"]
    assert evaluation.EvalConfig("m", "o", dataset="geometry3k").splits == ["test"]


def test_a_row_unlike_the_hubs_is_a_bad_row(tmp_path):
    for name, changes in (
        ("clevr_count", {"solution": None}),
        ("hallusionbench", {"gt_answer": "2"}),
    ):
        with pytest.raises(
            ValueError, match=f"row 0: not as in {PRESETS[name].dataset}: (TypeError|KeyError)"
        ):
            data.load_rows(copy_of(name, tmp_path, **changes), "test", preset=name)


# --------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "text, separator, want",
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
def test_choices_of_one_string(text, separator, want):
    assert split_choices(text, separator) == want


def test_choices_are_written_under_the_question():
    assert with_choices("Which?", ["red", "blue"]) == "Which?\nChoices:\nA. red\nB. blue"
    assert with_choices("Which?", None) == with_choices("Which?", []) == "Which?"


def test_wemath_options_that_cannot_be_split_stay_as_they_are(tmp_path):
    (row,) = data.load_rows(
        copy_of("wemath", tmp_path, option="A or B"), "test", preset="wemath", template="none"
    )
    assert (row["problem"], row["choices"]) == ("How large?\nA or B", None)


# ------------------------------------------------------------------------------------------------- official numbers


def composite(ID: str, whole: bool, *steps: bool) -> list[dict]:
    n = len(steps)
    keys = [f"{n}steps_{i + 1}" for i in range(n)] + [f"{n}steps_multi"]
    return [
        {"ID": ID, "key": key, "greedy_right": float(ok)}
        for key, ok in zip(keys, (*steps, whole), strict=True)
    ]


def test_wemath_scores_by_hand():
    """One composite of each kind: mastered, by rote (strict only, then both), not generalised, not known."""
    records = composite("a", True, True, True) + composite("b", True, True, False, True)
    records += composite("c", True, False, False) + composite("d", False, True, True)
    records += composite("e", False, True, False)
    records += (
        composite("f", True, True, True)[:2] + composite("g", True, True, True)[1:]
    )  # a part of each is missing
    scores = presets.wemath_scores(records)
    assert (scores["composites"], scores["IK"], scores["IG"]) == (5, 1, 1)
    assert (scores["RM strict"], scores["RM loose"]) == (2, 1)
    assert scores["strict"] == pytest.approx((5 - 1 - 0.5 - 2) / 5)
    assert scores["loose"] == pytest.approx((5 - 1 - 0.5 - 1) / 5)


def test_hallusionbench_scores_by_hand():
    def record(category, figure, question, right):
        place = {
            "category": category,
            "subcategory": "s",
            "set_id": "0",
            "figure_id": figure,
            "question_id": question,
        }
        return place | {"greedy_right": right}

    records = [
        record("VD", "0", "0", 1.0),
        record("VD", "0", "1", 1.0),
        record("VD", "1", "0", 0.0),
    ]
    records += [
        record("VD", "1", "1", 1.0),
        record("VD", "2", "1", 1.0),
        record("VS", "0", "0", 0.0),
    ]
    # figures: 0 and 2 of three (the last record has none); questions: VD 1 of VD 0, VD 1 and VS 0
    assert presets.hallusionbench_scores(records) == {"aAcc": 4 / 6, "fAcc": 2 / 3, "qAcc": 1 / 3}


def test_mathverse_mean_of_each_version():
    records = [
        {"problem_version": v, "greedy_right": r}
        for v, r in (("Text Lite", 1.0), ("Text Lite", 0.0), ("V", 1.0))
    ]
    assert presets.mathverse_versions(records) == {"Text Lite": 0.5, "V": 1.0}


def test_eval_grades_with_the_choices(tiny, tmp_path, monkeypatch):
    def accuracy(completions, answer, choices, precision, **columns):
        assert answer == ["B"] * len(completions) and precision == [None] * len(completions)
        assert choices == [["200.96", "3215.36", "6280", "32", "No correct answer"]] * len(
            completions
        )
        return [1.0] * len(completions)

    monkeypatch.setattr(rewards, "accuracy_reward", accuracy)
    settings = {
        "preset": "wemath",
        "dataset": copy_of("wemath", tmp_path),
        "samples": 2,
        "k": [1],
        "max_new_tokens": 4,
    }
    result = evaluation.main(evaluation.EvalConfig(tiny, str(tmp_path / "out"), **settings))
    assert result["splits"]["testmini"]["greedy"][0] == 1.0


def test_eval_reports_them_and_says_that_it_scored_by_rule(tiny, tmp_path, capsys):
    path = copy_of("hallusionbench", tmp_path)
    settings = {
        "preset": "hallusionbench",
        "dataset": path,
        "samples": 2,
        "k": [1],
        "max_new_tokens": 4,
    }
    result = evaluation.main(evaluation.EvalConfig(tiny, str(tmp_path / "out"), **settings))
    assert result["dataset"] == path
    assert result["official"] == {"image": {"aAcc": 0.0, "fAcc": 0.0, "qAcc": 0.0}}
    assert "a language model" in json.loads((tmp_path / "out.json").read_text())["by_rule"]
    assert "aAcc 0" in capsys.readouterr().out
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["figure_id"] == "1" and record["answer"] == "no"


def test_choices_are_lettered_once():
    plain = presets.with_choices("Which?", ["red", "blue"])
    assert (
        plain
        == "Which?\nChoices:\nA. red\nB. blue"
        == presets.with_choices("Which?", ["A. red", "B. blue"])
    )
    assert presets.with_choices("Which?", ["(A) red", "(B) blue"]).endswith("(A) red\n(B) blue")
    assert presets.with_choices("Which?", ["A. red", "A. blue"]).endswith("A. A. red\nB. A. blue")
    assert presets.with_choices("Which?", None) == "Which?"
