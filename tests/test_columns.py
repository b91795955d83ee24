"""columns.py: answers, choices, messages, columns for rewards; pictures.py: every form of one."""

import base64
import io
import json
import random
import warnings

import datasets
import numpy as np
import pytest
from datasets import Value
from PIL import Image
from test_data import BLUE, RED, encoded, good, load, paint, picture, refused, write, write_parquet
from test_train import short

import eval as evaluation
import train_saei
from runtime import columns, data, pictures
from runtime.data import load_rows
from vlm.policy import Policy

__all__ = ["picture"]  # a fixture


def one(folder, **changes):
    (row,) = load(folder, good(**changes))
    return row


# ---------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "stored, answer",
    [
        (["2"], "2"),
        (["2", "two"], ["2", "two"]),
        (["2", None, " ", "2"], "2"),
        ([2, 2.5], ["2", "2.5"]),
        (True, "true"),
        (0, "0"),
        ("#### 7", "#### 7"),
        ([], "the answer is an empty list"),
        ([None], "the answer is an empty list"),
        ([["2"]], "the answer must be a text, a number or a list of them"),
        ({"value": "x" * 1000}, "the answer must be a text, a number or a list of them"),
        (float("nan"), "the answer is NaN"),
        (float("-inf"), "the answer is infinite"),
        (["1", float("inf")], "the answer is infinite"),
        (" ", "the answer is empty"),
        (None, "the answer is empty"),
    ],
)
def test_answers(tmp_path, picture, stored, answer):
    if isinstance(answer, str) and "answer" in answer:
        with refused(f"row 0 .*: {answer}") as caught:
            one(tmp_path, solution=stored)
        assert len(str(caught.value)) < 500
    else:
        assert one(tmp_path, solution=stored)["answer"] == answer


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path, picture):
    """JSON can write it. No tokenizer takes it, and no file in UTF-8."""
    for changes in ({"solution": "\ud800"}, {"question": "a \ud800 b"}):
        with refused("row 0 .*surrogates not allowed"):
            one(tmp_path, **changes)


def test_answers_of_bytes():
    assert columns.to_answer(b"abc") == "abc"
    with refused("bytes that are no UTF-8 text"):
        columns.to_answer(b"\xff\xfe")


@pytest.mark.parametrize(
    "answers, count",
    [
        (["The bus is red and very large indeed."] * 5, 5),
        (["The bus is red and very large indeed."] + ["3"] * 4, 1),
        (["The bus is red and very large indeed."] + ["3"] * 5, 0),
        (["图中有一辆红色的大公共汽车停在路边"] * 2, 2),
        ([["The bus is red and very large indeed.", "red"]], 0),
        (["She had 3 and got four more from her mother.\n#### 7"] * 3, 0),
        (["So the final answer to this is \\boxed{7} here"] * 3, 0),
        (["\\frac{1}{2} + x y z a b c d e f", "New York City", "top left of the box"], 0),
    ],
)
def test_answers_that_are_sentences_are_warned_of(tmp_path, picture, capsys, answers, count):
    load(tmp_path, *(good(solution=answer) for answer in answers))
    said = capsys.readouterr().out
    assert (f"{count} of {len(answers)} answers are sentences" in said) == (count > 0)
    assert ("--reward" in said) == (count > 0)


# ---------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "stored, answer, kept",
    [
        (["red", "blue", None, None], "B", ["red", "blue"]),
        (["red", "blue", "", float("nan")], "B", ["red", "blue"]),
        (["red", None, "blue"], "blue", ["red", "blue"]),
        (["red", None, "blue"], "C", "an empty one of the choices stands before others"),
        (["red", None, "blue"], "B", "an empty one of the choices stands before others"),
        ([None, None], "3", None),
        ([], "3", None),
        ("", "3", None),
        ([1, 2.5], "2.5", ["1", "2.5"]),
        ({"A": "red", "B": "blue"}, "B", ["red", "blue"]),
        ({"A": "red", "B": "blue", "C": None}, "B", ["red", "blue"]),
        ({"A": "red", "X": "blue"}, "B", "choices must be a list of texts"),
        ("['red', 'blue']", "B", ["red", "blue"]),
        ('["red", "blue"]', "B", ["red", "blue"]),
        ("[red, blue]", "B", "choices must be a list of texts"),
        ([["red"], ["blue"]], "B", "choices must be a list of texts"),
        (["x" * 1000] * 26 + ["y"], "y", "there are 27 choices for the letters A to Z"),
        (["x" * 1000, "y"], "z", "the answer 'z' is none of the choices"),
    ],
)
def test_choices(tmp_path, picture, stored, answer, kept):
    if isinstance(kept, str):
        with refused(kept) as caught:
            one(tmp_path, choices=stored, solution=answer)
        assert len(str(caught.value)) < 600
    else:
        assert one(tmp_path, choices=stored, solution=answer)["choices"] == kept


def test_choices_in_columns_of_letters(tmp_path, picture):
    row = one(tmp_path, A="red", B="blue", C=None, D=None, solution="B")
    assert row["problem"] == "How many?\nChoices:\nA. red\nB. blue"
    assert row["choices"] == ["red", "blue"]
    assert one(tmp_path, A="red", solution="3")["choices"] is None  # a single column is none
    row = one(tmp_path, A="red", B="blue", choices=["1", "2"], solution="2")
    assert row["choices"] == ["1", "2"]


# --------------------------------------------------------------------------------------- messages


ASKED = {"from": "human", "value": "<image>\nWhich colour?"}
SAID = {"from": "gpt", "value": "red"}


@pytest.mark.parametrize(
    "row, problem, answer",
    [
        ({"conversations": [ASKED, SAID]}, "<image>\nWhich colour?", "red"),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, ASKED, SAID]},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image>\nWhich colour?"},
            ],
            "red",
        ),
        ({"conversations": [ASKED, SAID], "answer": "blue"}, "<image>\nWhich colour?", "blue"),
        ({"conversations": [ASKED], "answer": "blue"}, "<image>\nWhich colour?", "blue"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Which colour?"},
                    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
                ]
            },
            "Which colour?",
            "red",
        ),
        ({"messages": [{"role": "user", "value": "?"}, SAID]}, "?", "red"),
        (
            {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "1"}},
            "?",
            "1",
        ),
    ],
)
def test_conversations_with_the_answer_as_last_turn(tmp_path, picture, row, problem, answer):
    (loaded,) = load(tmp_path, row | {"image": "a.png"})
    assert (loaded["problem"], loaded["answer"]) == (problem, answer)
    assert len(loaded["images"]) == 1


def test_llava_sets_have_rows_without_a_picture_and_several_turns(tmp_path, picture):
    more = [ASKED, SAID, {"from": "human", "value": "And how large?"}, SAID | {"value": "small"}]
    text = [{"from": "human", "value": "1 + 1?"}, SAID | {"value": "2"}]
    rows = [{"id": 0, "image": "a.png", "conversations": more}, {"id": 1, "conversations": text}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    first, second = load_rows(str(tmp_path / "llava.json"))
    roles = [message["role"] for message in first["problem"]]
    assert roles == ["user", "assistant", "user"] and first["answer"] == "small"
    assert (second["problem"], second["answer"], second["images"]) == ("1 + 1?", "2", [])


def test_pictures_within_messages_need_no_picture_column(tmp_path, picture):
    uri = data_uri(tmp_path)
    for part in (
        {"type": "image", "image": "a.png"},
        {"image": "a.png"},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
    ):
        user = {"role": "user", "content": [part, {"type": "text", "text": "Red?"}]}
        (row,) = load(tmp_path, {"messages": [user, {"role": "assistant", "content": "yes"}]})
        assert (row["problem"], row["answer"], len(row["images"])) == ("<image>Red?", "yes", 1)
        assert uri not in json.dumps(row["columns"])


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([ASKED], "there is no answer: the last message is the user's"),
        ([SAID], "the messages must end with the user's, or with an answer to it"),
        ([ASKED, SAID, SAID], "the messages must end with the user's, or with an answer to it"),
        ([ASKED | {"from": "x" * 500}, SAID], "a message is by 'xxx.*from.: system, user .human."),
        ([{"value": "?"}, SAID], "a message is by None"),
        ([ASKED, SAID | {"value": ""}], "the answer is empty"),
        ("text", "there is no answer"),
    ],
)
def test_conversations_without_question_or_answer(tmp_path, picture, messages, reason):
    rows = [{"image": "a.png", "conversations": turns} for turns in ([ASKED, SAID], messages)]
    with refused(f"1 of 2 rows cannot be used: row 1 .*{reason}") as caught:
        load(tmp_path, *rows)
    assert len(str(caught.value)) < 600


# ---------------------------------------------------------------------------------------- columns


def test_all_missing_columns_are_named_at_once(tmp_path, picture):
    row = {"picture": "a.png", "frage": "?", "loesung": "3", "x" * 300: 1}
    said = "no column for image .*; no column for problem .*; no column for answer .*Found: frage"
    said += ".*Name them by --columns image=NAME problem=NAME answer=NAME .image=none"
    with refused(said) as caught:
        load(tmp_path, row)
    assert len(str(caught.value)) < 800
    names = {"image": "picture", "problem": "frage", "answer": "loesung"}
    assert load(tmp_path, row, columns=names)[0]["answer"] == "3"
    with refused("rows.jsonl .train.: no column for answer [^;]*Found: .*answer=NAME$"):
        load(tmp_path, row, columns={"image": "picture", "problem": "frage"})


@pytest.mark.parametrize("unused", [None, [], ""])
def test_of_two_columns_the_one_in_use_is_taken(tmp_path, picture, unused):
    row = one(tmp_path, images=unused, problem=unused, answer="4")
    assert (len(row["images"]), row["problem"], row["answer"]) == (1, "How many?", "4")


@pytest.mark.parametrize("program", [train_saei, evaluation])
def test_data_are_checked_before_weights_are_loaded(tmp_path, tiny, monkeypatch, program):
    path = write(tmp_path, [{"frage": "?"}])
    loaded, load_policy = [], Policy.from_pretrained

    def from_pretrained(name, dtype, attention, least, most, weights=True):
        loaded.append(weights)
        return load_policy(name, dtype, attention, least, most, weights)

    monkeypatch.setattr(Policy, "from_pretrained", from_pretrained)
    if program is train_saei:
        config = short(tiny, tmp_path / "out", dataset=path, split="train")
    else:
        config = evaluation.load_config(model=tiny, dataset=path, output=str(tmp_path / "out"))
    with refused("no column for image"):
        program.main(config)
    assert True not in loaded


def test_the_datas_own_columns_go_to_rewards_and_logs(tmp_path, picture):
    own = {"solution": "3", "id": 7, "meta": {"a": [1, None]}, "score": float("nan")}
    first, second = load(tmp_path, good(**own), good(row="mine"))
    json.dumps(first["columns"], allow_nan=False)
    expected = own | {"question": "How many?", "score": None, "row": None}
    assert first["columns"] == expected  # without the picture
    assert second["columns"].keys() == first["columns"].keys()  # those of all rows
    assert (second["row"], second["columns"]["row"], second["columns"]["id"]) == (1, "mine", None)
    for name in ("prompts", "truncated", "rewards"):
        with refused(f"a column must not be called {name}: rename it"):
            load(tmp_path, good(**{name: 1}))


def test_a_text_that_begins_like_a_uri_goes_to_rewards(tmp_path, picture):
    texts = ["data: 1, 2, 3", f"data:image/png;base64,{'A' * 50}"]
    row = load(tmp_path, good(note=texts))[0]
    assert row["columns"]["note"] == [texts[0], None]


def test_a_changed_template_file_changes_the_fingerprint(tmp_path, picture):
    template, found = tmp_path / "own.yaml", []
    for text in ("{problem} Now!", "{problem} Now!", "{problem} Later!"):
        template.write_text(f"user: '{text}'")
        found.append(load(tmp_path, good(), template=str(template)).fingerprint())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "order.json: there is no /.*order.json"),
        ("[0, ", "order.json is no JSON: Expecting value"),
        ('{"0": 1}', "order.json must be a JSON list of row numbers from 0 to 2"),
    ],
)
def test_an_order_that_is_none(tmp_path, text, reason):
    path = tmp_path / "order.json"
    if text is not None:
        path.write_text(text)
    with refused(reason):
        data.load_order(str(path), data.Rows(None, [0, 1, 2]))


def test_too_long_prompts_name_the_option(tmp_path, picture):
    limits = {"prompt_tokens": lambda row: 500, "max_prompt_tokens": 60}
    said = "no usable row: 2 of 2 rows have more than 60 prompt tokens .up to 500.: raise --max_pro"
    with refused(said):
        load(tmp_path, good(), good(), **limits)


def test_one_process_prints(tmp_path, picture, capsys, monkeypatch):
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        load(tmp_path, good(), good(solution=""), bad_rows="skip")
        assert len(capsys.readouterr().out.splitlines()) == lines


# --------------------------------------------------------------------------------------- pictures


def data_uri(folder):
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    return f"data:image/png;base64,{content}"


def test_every_text_that_stands_for_a_picture(tmp_path, picture):
    uri = data_uri(tmp_path)
    bare = uri.partition(",")[2]
    forms = [uri, bare, f"{bare[:76]}\n{bare[76:]}\n", "a.png", f"{tmp_path}/a.png", ".\\a.png"]
    for form in [*forms, f"file://{tmp_path}/a.png", {"path": "a.png"}, ["a.png"]]:
        (image,) = one(tmp_path, image=form)["images"]
        assert np.array_equal(np.asarray(image), picture), form
    assert one(tmp_path, image="")["images"] == []
    first, other = (load(tmp_path, good(image=form)).fingerprint() for form in (uri, bare))
    assert first != other != load(tmp_path, good()).fingerprint()


@pytest.mark.parametrize(
    "image, reason",
    [
        ("https://x.org/" + "c" * 3000, "pictures are not downloaded: https://x.org/ccc"),
        ("s3://x/y.png", "pictures are not downloaded: s3://x/y.png"),
        ("data:image/png;base64," + "A" * 5000 + "!", "no valid base64"),
        ("data:image/png;base64," + "A" * 5000, "unreadable image .data: URI.: cannot identify"),
        ("data:", "it is empty .0 bytes"),
        ("iVBOR" + "A" * 5000, "no valid base64|cannot identify"),
        ("x" * 100_000, "there is no xxx"),
        ("a\0.png", "there is no a"),
        ("/nowhere/a.png", "there is no /nowhere/a.png[.;]"),
        (".", "unreadable image .: Is a directory"),
        ("empty.png", "unreadable image empty.png: it is empty .0 bytes"),
        ("lfs.png", "unreadable image lfs.png: it is a Git LFS pointer"),
        (12, "needs a path, bytes or {bytes, path}, got int"),
        ([None], "needs a path, bytes or {bytes, path}, got NoneType"),
        ([["a.png"]], "got list"),
        ({"url": "a.png"}, "got NoneType"),
    ],
)
def test_texts_that_are_no_picture(tmp_path, picture, image, reason):
    (tmp_path / "empty.png").touch()
    (tmp_path / "lfs.png").write_bytes(pictures.LFS + b"/spec/v1\n")
    with refused(f"row 0 .line 1 of rows.jsonl.: .*({reason})") as caught:
        one(tmp_path, image=image)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_structs_lists_and_bytes_in_a_table_without_features(tmp_path, picture):
    """As pandas and polars write pictures: no feature says that they are such."""
    content = (tmp_path / "a.png").read_bytes()
    binary = Value("binary")
    struct = {"bytes": binary, "path": Value("string")}
    for name, stored, feature in (
        ("image", content, binary),
        ("images", [content] * 2, [binary]),
        ("image", {"bytes": content, "path": None}, struct),
        ("images", [{"bytes": content, "path": "x.png"}] * 2, [struct]),
    ):
        row = {name: stored, "problem": "?", "answer": "1"}
        path = write_parquet(tmp_path, [row], **{name: feature})
        (row,) = load_rows(path)
        assert [image.size for image in row["images"]] == [(60, 40)] * (1 + (name == "images"))


def test_broken_pictures_of_any_format_are_refused_with_a_cause(tmp_path):
    """Decoders raise errors of many kinds for cut and changed files."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    broken, noise = 0, random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA"):
        whole = encoded(Image.fromarray(pixels), kind)
        for _ in range(40):
            cut = bytearray(whole[: noise.randrange(len(whole))])
            changed = bytearray(whole)
            for _ in range(8):
                changed[noise.randrange(min(300, len(whole)))] = noise.randrange(256)
            for content in (cut, changed):
                try:
                    with warnings.catch_warnings(action="ignore"):
                        pictures.to_image(bytes(content), [tmp_path])
                except ValueError as error:
                    broken += 1
                    assert str(error).startswith("unreadable image: ") and len(str(error)) < 250
                    assert " object at 0x" not in str(error)
    assert broken > 300


def test_sixteen_bits_of_both_byte_orders_and_other_modes(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for order in ("<u2", ">u2"):
        file = io.BytesIO()
        Image.fromarray(ramp.astype(order)).save(file, "TIFF")
        found = pictures.to_image(file.getvalue(), [tmp_path])
        assert np.array_equal(np.asarray(found)[..., 0], ramp >> 8)
    red = Image.new("RGB", (8, 8), RED)
    for mode in ("YCbCr", "HSV", "P", "1", "L"):
        image = pictures.to_image(red.convert(mode), [tmp_path])
        assert (image.mode, image.size) == ("RGB", (8, 8))


def test_pictures_are_found_beside_the_file_first(tmp_path):
    paint(tmp_path / "near", a="red")
    paint(tmp_path, a="blue", b="blue")
    folders = [tmp_path / "near", tmp_path]
    found = [pictures.to_image(name, folders).getpixel((0, 0)) for name in ("a.png", "b.png")]
    assert found == [RED, BLUE]
    with refused(f"there is no c.png in {tmp_path}/near or {tmp_path}"):
        pictures.to_image("c.png", folders)


def test_datasets_pictures_without_a_file_have_a_name_in_the_checksum(tmp_path):
    assert pictures.picture_id({"bytes": None, "path": None}, tmp_path) == "none"
    assert pictures.picture_id("a.png", tmp_path) == "a.png"
    assert len(pictures.picture_id("A" * 5000, tmp_path)) < 30
    assert datasets.Image().decode  # what undecoded() looks for
