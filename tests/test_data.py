"""data.py: sources, columns, bad rows, pictures, streams, fingerprints and the order of rows."""

import io
import json
import shutil

import datasets
import numpy as np
import pytest
from datasets import Features, Value
from PIL import Image
from test_train import metrics_of, parameters, short
from torch import equal

import rewards
import train_saei
from runtime import data
from runtime.data import load_rows

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return pixels


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(folder, rows, **features):
    """Columns are texts where `features` does not say otherwise."""
    kinds = {name: Value("string") for name in rows[0]} | features
    path = str(folder / "rows.parquet")
    datasets.Dataset.from_list(rows, features=Features(kinds)).to_parquet(path)
    return path


def good(**changes):
    return {"image": "a.png", "question": "How many?", "solution": "3"} | changes


def load(folder, *rows, **options):
    return load_rows(write(folder, rows), **options)


def refused(reason):
    return pytest.raises(ValueError, match=reason)


def paint(folder, **colours):
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")


def corners(images):
    return [image.getpixel((0, 0)) for image in images]


# ---------------------------------------------------------------------------------------- sources


def test_demo_rows_are_lazy_and_repeatable():
    rows = load_rows("demo", "plain/test", limit=5)
    assert len(rows) == 5 and len(load_rows("demo", "plain/train")) == 1_000_000
    assert rows[3]["problem"] == load_rows("demo", "plain/test")[3]["problem"]
    with refused("unknown split 'plain'"):
        load_rows("demo", "plain")


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.jsonl", '{"image": "a.png", "question": "How many?", "solution": "3"}\n'),
        ("rows.json", '[{"images": ["FOLDER/a.png"], "prompt": "How many?", "answer": 3}]'),
        ("rows.csv", "image,question,ground_truth\na.png,How many?,3\n"),
    ],
)
def test_files_with_paths_beside_them_or_absolute(tmp_path, picture, name, text):
    (tmp_path / name).write_text(text.replace("FOLDER", str(tmp_path)))
    (row,) = load_rows(str(tmp_path / name), "train")
    assert (row["problem"], row["answer"], row["row"]) == ("How many?", "3", 0)
    assert np.array_equal(np.asarray(row["images"][0]), picture)


def test_parquet_and_saved_sets_with_image_features(tmp_path, picture):
    row = {"images": [Image.fromarray(picture)] * 2, "problem": "Two", "answer": "\\frac{1}{2}"}
    kinds = {"problem": Value("string"), "answer": Value("string")}
    features = Features(kinds | {"images": datasets.Sequence(datasets.Image())})
    table = datasets.Dataset.from_list([row], features=features)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "dict")
    for source in ("t.parquet", "one", "dict"):
        (row,) = load_rows(str(tmp_path / source), "test")
        assert len(row["images"]) == 2
        assert np.array_equal(np.asarray(row["images"][1]), picture)
    with refused("has no split 'train'; it has test"):
        load_rows(str(tmp_path / "dict"), "train")


def test_folder_of_pictures_with_metadata(tmp_path):
    """An image folder of the datasets library: file_name becomes the image column."""
    for split, colour in (("train", "red"), ("test", "blue")):
        paint(tmp_path / split, a=colour)
        line = {"file_name": "a.png", "question": "Which colour?", "answer": colour}
        write(tmp_path / split, [line], "metadata.jsonl")
    for streaming in (False, True):
        (row,) = load_rows(str(tmp_path), "test", limit=1, streaming=streaming)
        assert (row["answer"], corners(row["images"])) == ("blue", [BLUE])


def test_folder_of_json_files_beside_pictures(tmp_path):
    """The split is in the file's name. A majority of pictures does not make a picture set."""
    paint(tmp_path / "images", a="red", b="blue", c="red")
    row = {"images": ["images/a.png", "images/b.png"], "answer": "b"}
    for split in ("train", "test"):
        problem = f"<image> or <image>, {split}?"
        write(tmp_path, [row | {"problem": problem}], f"{split}.jsonl")
    (row,) = load_rows(str(tmp_path), "test")
    assert row["problem"] == "<image> or <image>, test?" and corners(row["images"]) == [RED, BLUE]
    with refused("no file of .* is named after the split 'val': test.jsonl, train.jsonl"):
        load_rows(str(tmp_path), "val")
    (tmp_path / "train.jsonl").rename(tmp_path / "rows.jsonl")
    (tmp_path / "test.jsonl").unlink()
    assert load_rows(str(tmp_path))[0]["problem"] == "<image> or <image>, train?"
    with refused("named after the split 'test': rows.jsonl"):  # a single file is called train
        load_rows(str(tmp_path), "test")


def test_splits_are_whole_words_of_a_files_name_or_its_folder(tmp_path, picture):
    (tmp_path / "val").mkdir()
    for name, count in (("my.train", 1), ("constraint_test", 2), ("latest", 3), ("val/0", 4)):
        write(tmp_path, [good()] * count, f"{name}.jsonl")
    for split, count in (("train", 1), ("test", 2), ("val", 4)):
        assert len(load_rows(str(tmp_path), split)) == count


def test_folder_of_parquet_shards_as_the_hub_has_them(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        row = {"image": None, "problem": f"{shard}?", "answer": shard}
        path = tmp_path / f"data/train-0000{shard}-of-00002.parquet"
        datasets.Dataset.from_list([row]).to_parquet(path)
    rows = load_rows(str(tmp_path), "train")
    # whole numbers become texts
    assert [(row["problem"], row["answer"]) for row in rows] == [("0?", "0"), ("1?", "1")]


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("missing.jsonl", None, "missing.jsonl does not exist"),
        ("a.xlsx", "x", "a.xlsx: only files ending in .json, .jsonl, .csv, .tsv, .parquet, .arrow"),
        ("empty.jsonl", "", "empty.jsonl is empty .0 bytes"),
        ("nobody", None, "nobody does not exist: looked at /.*nobody"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, text, reason):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with refused(reason):
        load_rows(str(tmp_path / name))


def test_empty_set_is_refused(tmp_path):
    table = datasets.Dataset.from_dict({"images": [], "problem": [], "answer": []})
    table.to_parquet(tmp_path / "empty.parquet")
    with refused("has no rows"):
        load_rows(str(tmp_path / "empty.parquet"), "train")


# --------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": "missing.png"}, "unreadable image: there is no missing.png in /"),
        ({"image": "broken.png"}, "unreadable image broken.png: cannot identify"),
        ({"image": "cut.png"}, "unreadable image cut.png: .*truncated"),
        ({"question": "  "}, "the problem is empty"),
        ({"solution": ""}, "the answer is empty"),
        ({"solution": None}, "the answer is empty"),
        ({"precision": "high"}, "precision must be a whole number of decimals, got 'high'"),
        ({"options": "A. x;B. y"}, "choices must be a list of texts, got 'A. x;B. y'"),
    ],
)
def test_a_bad_row_is_refused_or_skipped_and_named(tmp_path, picture, capsys, changes, reason):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    kept = {name: None for name in changes if name not in good()}
    path = write(tmp_path, [good(**kept), good(**changes), good(**kept, solution="4")])
    with refused(
        f"1 of 3 rows cannot be used: row 1 .line 2 of rows.jsonl.: {reason}.*--bad_rows skip"
    ):
        load_rows(path)
    rows = load_rows(path, bad_rows="skip")
    assert [(row["row"], row["answer"]) for row in rows] == [(0, "3"), (2, "4")]
    said = capsys.readouterr().out
    assert "skipped row 1 (line 2" in said and "skipped 1 bad rows of 3" in said


def test_all_rows_bad_is_refused(tmp_path, picture):
    with refused("has no usable row"):
        load(tmp_path, good(question=""), bad_rows="skip")


def test_trap_04_long_prompts_are_filtered_and_counted(tmp_path, picture, policy, capsys):
    limits = {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": 60}
    (row,) = load(tmp_path, good(), good(question="How many? " * 50), **limits)
    assert row["problem"] == "How many?"
    assert "left out 1 of 2 rows with more than 60 prompt tokens" in capsys.readouterr().out
    ids = policy.encode([row["problem"]], [row["images"]]).ids
    assert policy.prompt_tokens(row) == ids.shape[1]


def test_a_broken_picture_in_an_image_column_is_a_bad_row(tmp_path, picture):
    """Not the end of the reader: images are stored undecoded until a row is checked."""
    rows = []
    for content in ((tmp_path / "a.png").read_bytes(), b"no picture"):
        image = {"bytes": content, "path": None}
        rows.append({"images": [image], "problem": "?", "answer": str(len(rows))})
    path = write_parquet(tmp_path, rows, images=datasets.List(datasets.Image()))
    for streaming in (False, True):
        with refused("row 1 .*: unreadable image: cannot identify"):
            load_rows(path, limit=2, streaming=streaming)
        (row,) = load_rows(path, bad_rows="skip", limit=2, streaming=streaming)
        assert row["answer"] == "0"


@pytest.mark.parametrize(
    "answer, choices, fits",
    [
        ("A", ["red", "blue"], True),
        ("blue", ["red", "blue"], True),
        ("A, C", ["a1", "b1", "c1"], True),
        ("2", ["1", "2"], True),
        ("B", ["A. red", "B. blue"], True),
        ("3.0", ["3", "4"], True),
        ("C", ["red", "blue"], False),
        ("1", ["red", "blue"], False),
        ("green", ["red", "blue"], False),
    ],
)
def test_a_gold_that_is_none_of_the_choices_is_refused(tmp_path, picture, answer, choices, fits):
    row = good(solution=answer, choices=choices)
    if fits:
        assert load(tmp_path, row)[0]["choices"] == choices
    else:
        with refused("row 0 .*: the answer .* is none of the choices"):
            load(tmp_path, row)


# ---------------------------------------------------------------------------------------- columns


def test_columns_by_name(tmp_path, picture):
    names = {"image": "photo", "problem": "task", "answer": "gold", "choices": "answers"}
    row = good(photo="a.png", image="missing.png", task="Which?", gold="b", answers=["x", "b"])
    path = write(tmp_path, [row])
    (row,) = load_rows(path, columns=names)
    assert row["problem"] == "Which?\nChoices:\nA. x\nB. b"
    assert (row["answer"], row["choices"], len(row["images"])) == ("b", ["x", "b"], 1)
    assert row["columns"]["question"] == "How many?"  # other columns stay
    with refused("no column for image .looked for foto.*--columns image=NAME .image=none"):
        load_rows(path, columns={"image": "foto"})
    with refused("no column for choices .looked for optoins"):
        load_rows(path, columns={"choices": "optoins"})
    with refused("unknown key 'images'. Did you mean image"):
        load_rows(path, columns={"images": "photo"})


@pytest.mark.parametrize(
    "pairs, result",
    [
        ([], {}),
        (["image=picture", "problem=query"], {"image": "picture", "problem": "query"}),
        (["answer=a=b"], {"answer": "a=b"}),
        (
            ["images=a"],
            "unknown key 'images'. Did you mean image\\? The keys are image, problem, ans",
        ),
        (["solution=a"], "unknown key 'solution'. The keys are image, problem, answer, choices"),
        (["image"], "takes pairs like image=picture, got 'image'"),
        (["image="], "takes pairs like image=picture, got 'image='"),
        (["image=a", "image=b"], "--columns names image twice: a and b"),
    ],
)
def test_pairs_of_the_command_line(pairs, result):
    if isinstance(result, dict):
        assert data.parse_columns(pairs) == result
    else:
        with refused(result):
            data.parse_columns(pairs)


def test_missing_column_is_named(tmp_path):
    with refused("answer .looked for answer, solution, ground_truth, .*. Found: image, question"):
        load(tmp_path, {"image": "a.png", "question": "?"})


def test_text_alone_has_to_be_asked_for(tmp_path):
    path = write(tmp_path, [{"question": "1 + 1?", "answer": "2"}])
    with refused("no column for image .looked for images, image, .*. Found: answer, question"):
        load_rows(path)
    assert load_rows(path, columns={"image": "none"})[0]["images"] == []
    assert load(tmp_path, good(image=None))[0]["images"] == []  # or row by row


@pytest.mark.parametrize("name", ["choices", "options"])
def test_choices_are_listed_and_go_to_the_reward(tmp_path, picture, name):
    rows = load(tmp_path, good(**{name: [7, 8]}, solution="8"), good(**{name: None}))
    listed, plain = rows
    assert (listed["problem"], listed["choices"]) == ("How many?\nChoices:\nA. 7\nB. 8", ["7", "8"])
    assert (plain["problem"], plain["choices"], plain["precision"]) == ("How many?", None, None)
    (row,) = load(tmp_path, good(**{name: [7, 8]}), columns={"choices": "none"})
    assert (row["problem"], row["choices"]) == ("How many?", None)


def test_columns_named_like_the_rewards_arguments_are_refused(tmp_path, picture):
    for name in ("completions", "completion_ids"):
        with refused(f"a column must not be called {name}: rename it"):
            load(tmp_path, good(**{name: "x"}))
    assert load(tmp_path, good(columns="x"))[0]["columns"]["columns"] == "x"


def test_all_columns_reach_the_rewards(tiny, tmp_path, picture, monkeypatch):
    seen = []

    def accuracy(completions, answer, **columns):
        if len(completions) > 1:  # a single one: the check of the gold answer
            seen.append(columns | {"answer": answer})
        return [0.0] * len(completions)

    monkeypatch.setattr(rewards, "accuracy_reward", accuracy)
    path = write(tmp_path, [good(choices=["3", "4"], precision=2, source="mine")])
    train_saei.main(short(tiny, tmp_path / "out", dataset=path, split="train", steps=1))
    (columns,) = seen
    expected = {"choices": ["3", "4"], "precision": 2, "answer": "3", "source": "mine"}
    expected |= {"solution": "3", "question": "How many?"}  # under the data's own names, too
    for name, value in expected.items():
        assert columns[name] == [value] * 8


def test_further_pictures_do_not_go_to_rewards_and_logs(tmp_path, picture):
    row = {"image": "a.png", "thumbnail": str(tmp_path / "a.png"), "problem": "?", "answer": "1"}
    path = write_parquet(tmp_path, [row | {"source": "mine"}], thumbnail=datasets.Image())
    (row,) = load_rows(path)
    assert len(row["images"]) == 1
    assert row["columns"] == {"problem": "?", "answer": "1", "source": "mine"}


# -------------------------------------------------------------------- places, messages, templates


@pytest.mark.parametrize(
    "problem, count, marks",
    [("<image> and <image>?", 1, 2), ("<image>?", 2, 1), ("Is <image> red?", 0, 1)],
)
def test_marks_that_do_not_match_the_images(tmp_path, picture, policy, problem, count, marks):
    reason = f"the problem has {marks} <image> marks for {count} images"
    with refused(f"row 0 .*: {reason}"):
        load(tmp_path, good(image=["a.png"] * count, question=problem))
    with refused(reason):
        policy.chat_text(problem, count)


def test_pictures_stand_where_they_are_marked(policy):
    def text(problem, images):
        block = "<|vision_start|><|image_pad|><|vision_end|>"
        return policy.chat_text(problem, images).replace(block, "[I]")

    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert text("Is <image> or <image> red?", 2) == user.format("Is [I] or [I] red?")
    assert text("Which?", 2) == text("<image><image>Which?", 2) == user.format("[I][I]Which?")
    assert text("1 + 1?", 0) == user.format("1 + 1?")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "See <image>"}]
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And <image>?"}]
    assert text(talk, 2) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSee [I]<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n" + user.format("And [I]?")
    )
    talk[1]["content"], talk[3]["content"] = "See", "And?"
    assert "user\n[I][I]See<" in text(talk, 2) and "user\nAnd?<" in text(talk, 2)


def test_places_reach_the_tokens(policy):
    """Image tokens in the encoded prompt follow the marks: text, picture, text, picture."""
    images = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")]
    row = {"problem": "Is <image> or <image> red?", "images": images}
    ids = policy.encode([row["problem"]], [images]).ids[0].tolist()
    tokens = ("<|image_pad|>", "<|vision_start|>", "?")
    pad, start, mark = policy.processor.tokenizer.convert_tokens_to_ids(tokens)
    assert [x for x in ids if x in (pad, start, mark)] == [start, pad, start, pad, pad, mark]
    assert policy.prompt_tokens(row) == len(ids)


PARTS = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]


def test_conversational_prompts_as_in_trl(tmp_path, picture):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    first, second, third = load(
        tmp_path,
        {"prompt": [{"role": "user", "content": PARTS}], "images": ["a.png"], "answer": "3"},
        {"prompt": talk, "images": ["a.png", "a.png"], "answer": "3"},
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "images": None, "answer": "3"},
    )
    assert (first["problem"], len(first["images"])) == ("Is <image> red?", 1)
    assert (second["problem"], len(second["images"])) == (talk, 2)
    assert (third["problem"], third["images"]) == ("1 + 1?", [])


def test_conversational_prompts_in_parquet_have_empty_fields_too(tmp_path, picture):
    """Arrow gives every part every field: text None in an image part, image None in a text part."""
    prompt = [{"role": "user", "content": PARTS}]
    row = {"prompt": prompt, "images": [str(tmp_path / "a.png")], "answer": "yes"}
    part = {"type": Value("string"), "text": Value("string")}
    talk = [{"role": Value("string"), "content": [part]}]
    path = write_parquet(tmp_path, [row], prompt=talk, images=datasets.List(datasets.Image()))
    (row,) = load_rows(path)
    assert (row["problem"], row["images"][0].size) == ("Is <image> red?", (60, 40))


def test_pictures_within_messages(tmp_path, picture):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Red?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "yes"}
    (loaded,) = load(tmp_path, row, columns={"problem": "messages", "image": "none"})
    assert (loaded["problem"], loaded["images"][0].size) == ("<image>Red?", (60, 40))
    with refused("row 0 .*: pictures stand both in the messages and in the image column"):
        load(tmp_path, row | {"image": "a.png"}, columns={"problem": "messages"})


TURN = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([TURN, TURN | {"role": "system"}], "must end with the user's"),
        ([TURN | {"role": "narrator"}], "a message is by 'narrator'"),
        ([TURN | {"content": [{"type": "video"}]}], "a part of type 'video'"),
        ([TURN | {"content": [{"type": "text", "text": " "}]}], "the problem is empty"),
        ([TURN | {"content": None}], "the problem is empty"),
        ([], "the problem is empty"),
        ([TURN | {"content": {"type": "text"}}], "content is neither a text nor a list of parts"),
        ([TURN | {"content": ["plain"]}], "content is neither a text nor a list of parts"),
    ],
)
def test_messages_that_are_no_prompt_are_bad_rows(tmp_path, messages, reason):
    with refused(f"row 0 .*: .*{reason}"):
        load(tmp_path, {"prompt": messages, "image": None, "answer": "1"})


def test_templates(tmp_path, picture):
    path = write(tmp_path, [good(question="<image>How many?")])
    plain = load_rows(path)[0]["problem"]
    assert plain == load_rows(path, template="none")[0]["problem"] == "<image>How many?"
    for name, place in (("boxed", "\\boxed{}"), ("tags", "<answer></answer>")):
        problem = load_rows(path, template=name)[0]["problem"]
        assert problem.startswith("<image>How many?\n")
        assert place in problem and "<think></think>" in problem
    (tmp_path / "own.yaml").write_text("system: You count.\nuser: 'Q: {problem} \\boxed{}!'\n")
    (row,) = load_rows(path, template=str(tmp_path / "own.yaml"))
    assert row["problem"] == [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "Q: <image>How many? \\boxed{}!"},
    ]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("user: no place", "needs the key user with {problem} in it"),
        ("system: '{problem}'", "needs the key user with {problem} in it"),
        ("user: '{problem}'\nassistant: x", "needs the key user with {problem} in it"),
        ("- a", "needs the key user with {problem} in it"),
        ("user: [", "own.yaml is no YAML"),
        (None, "own.yaml' is neither one of none, boxed, tags nor a file"),
        (
            "system: x\nuser: '{problem}'",
            "row 0 .*: the row has a system message and so has the tem",
        ),
    ],
)
def test_unfit_templates_are_refused(tmp_path, picture, text, reason):
    if text is not None:
        (tmp_path / "own.yaml").write_text(text)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with refused(reason):
        load(tmp_path, good(question=talk), template=str(tmp_path / "own.yaml"))


def test_the_demo_takes_no_template():
    with refused("no template, got 'boxed'. Name your own data by --dataset"):
        load_rows("demo", template="boxed")


# ----------------------------------------------------------------------------------------- images


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_every_form_of_image(tmp_path, picture):
    png = (tmp_path / "a.png").read_bytes()
    opened = Image.open(tmp_path / "a.png")
    stored, by_path = {"bytes": png, "path": None}, {"bytes": None, "path": "a.png"}
    for form in (png, stored, by_path, "a.png", opened):
        assert np.array_equal(np.asarray(data.to_image(form, [tmp_path])), picture)
    for nothing in (None, {"bytes": None, "path": None}):
        with refused("unreadable image"):
            data.to_image(nothing, [tmp_path])


def test_exif_orientation(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste(BLUE, (0, 0, 20, 20))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by 90 degrees
    upright = data.to_image(encoded(lying, "PNG", exif=exif), [tmp_path])
    assert upright.size == (20, 40)
    assert (upright.getpixel((10, 5)), upright.getpixel((10, 35))) == (BLUE, RED)


def test_transparency_is_laid_on_white(tmp_path):
    for mode, opaque_black in (("RGBA", (0, 0, 0, 255)), ("LA", (0, 255))):
        drawing = Image.new(mode, (4, 4))  # black, all of it transparent
        drawing.putpixel((1, 1), opaque_black)
        image = data.to_image(encoded(drawing, "PNG"), [tmp_path])
        assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == (WHITE, BLACK)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([*BLACK, *BLUE])
    palette.putpixel((1, 1), 1)
    transparent = data.to_image(encoded(palette, "PNG", transparency=0), [tmp_path])
    opaque = data.to_image(encoded(palette, "PNG"), [tmp_path])
    assert transparent.getpixel((0, 0)) == WHITE and opaque.getpixel((1, 1)) == BLUE


def test_cmyk_and_16_bits(tmp_path):
    cmyk = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.allclose(data.to_image(cmyk, [tmp_path]).getpixel((8, 8)), RED, atol=3)
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    deep = data.to_image(encoded(Image.fromarray(ramp), "PNG"), [tmp_path])
    assert np.array_equal(np.asarray(deep)[..., 0], ramp >> 8)  # a plain conversion cuts at 255


@pytest.mark.parametrize(
    "mode, size, limit, reason",
    [
        ("I", (4, 4), 100, "it has 32-bit pixels \\(mode I\\)"),
        ("F", (4, 4), 100, "it has 32-bit pixels \\(mode F\\)"),
        ("RGB", (20, 20), 100, ".*decompression bomb"),
        ("RGB", (0, 5), 100, "it has zero size"),
    ],
)
def test_refused_pictures(tmp_path, monkeypatch, mode, size, limit, reason):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    image = Image.new(mode, size)
    with refused(f"unreadable image: {reason}"):
        data.to_image(encoded(image, "TIFF") if min(size) else image, [tmp_path])


def test_animations_give_their_first_frame(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        film = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert data.to_image(film, [tmp_path]).getpixel((0, 0)) == RED


@pytest.mark.parametrize("size", [(1, 1), (5400, 3700)], ids=["one pixel", "20 megapixels"])
def test_extreme_sizes_are_resized_by_the_processor(tmp_path, policy, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    limits = {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": 200}
    (row,) = load(tmp_path, good(), **limits)
    (image,) = policy.encode([row["problem"]], [row["images"]]).images
    assert 32 * 32 <= image.shape[1] * image.shape[2] <= 256 * 256
    assert image[0].min() > 0.99 and image[1].max() < 0.01


def test_a_shape_that_the_processor_refuses_is_a_bad_row(tmp_path, policy):
    Image.new("RGB", (1000, 1), "red").save(tmp_path / "a.png")
    limits = {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": 200}
    with refused("row 0 .*: .*aspect ratio"):
        load(tmp_path, good(), **limits)


# ---------------------------------------------------------------------------------------- streams


@pytest.fixture
def numbered(tmp_path):
    """A file of 20 rows whose problems are 0?, 1?, ..."""
    paint(tmp_path, a="red")
    return write(tmp_path, [good(question=f"{i}?") for i in range(20)])


def problems(rows, indices):
    return [rows[i]["problem"] for i in indices]


def test_a_stream_gives_every_row_of_every_epoch_once_and_repeats_itself(numbered):
    first = problems(load_rows(numbered, streaming=True, seed=3), range(40))
    stored = [f"{i}?" for i in range(20)]
    assert sorted(first[:20]) == sorted(first[20:]) == sorted(stored)
    assert first[:20] != first[20:] != stored
    assert problems(load_rows(numbered, streaming=True, seed=3), range(40)) == first
    assert problems(load_rows(numbered, streaming=True, seed=4), range(40)) != first


def test_a_stream_is_read_from_any_place_and_never_back(numbered):
    whole = problems(load_rows(numbered, streaming=True), range(30))
    later = load_rows(numbered, streaming=True)  # as a resumed run, or one process of two, does
    assert problems(later, [7, 9, 25]) == [whole[7], whole[9], whole[25]]
    assert problems(later, [25]) == [whole[25]]  # the last one again
    with pytest.raises(IndexError, match="forward only: row 24 after row 25"):
        later[24]


def test_a_stream_checks_rows_as_they_come(tmp_path, picture, policy, capsys):
    rows = [good(), good(solution=""), good(question="How many? " * 50), good(solution="4")]
    limits = {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": 60}
    stream = load(tmp_path, *rows, bad_rows="skip", streaming=True, **limits)
    found = [(stream[i]["answer"], stream[i]["row"]) for i in range(2)]
    assert sorted(found) == [("3", 0), ("4", 3)]
    stream[3]  # in the second epoch
    said = capsys.readouterr().out
    assert "skipped row 1 (line 2 of rows.jsonl): the answer is empty" in said
    assert (
        "skipped 1 bad rows of 4" in said
        and "left out 1 of 4 rows with more than 60 prompt tokens" in said
    )
    strict = load(tmp_path, *rows, streaming=True, **limits)
    with refused("row 1 .line 2 .*: the answer is empty.*--bad_rows skip"):
        problems(strict, range(4))
    with refused("has no usable row: 1 of 1 rows"):
        load(tmp_path, good(solution=""), bad_rows="skip", streaming=True)[0]


def test_a_streamed_run_resumes_exactly(tiny, tmp_path, numbered, monkeypatch):
    def half_right(completions, **columns):
        return [i % 2.0 for i in range(len(completions))]

    def train(name, steps, **changes):
        settings = {"split": "train", "streaming": True, "save_every": 2, "steps": steps} | changes
        train_saei.main(short(tiny, tmp_path / name, dataset=numbered, **settings))

    monkeypatch.setattr(rewards, "accuracy_reward", half_right)
    train("whole", 4)
    train("parts", 2)
    train("parts", 4, resume=True)
    assert len(metrics_of(tmp_path / "parts")) == 4
    whole = parameters(tmp_path / "whole/checkpoints/step-000004")
    parts = parameters(tmp_path / "parts/checkpoints/step-000004")
    assert all(equal(whole[name], parts[name]) for name in whole)


# ----------------------------------------------------------------------------------- fingerprints


def test_fingerprint_of_rows_with_paths(tmp_path):
    paint(tmp_path, a="red", b="blue")
    first, second = good(), good(question="Which?", solution="4")
    cases = {
        "as it was": [first, second],
        "order": [second, first],
        "answer": [first, second | {"solution": "5"}],
        "problem": [first | {"question": "How much?"}, second],
        "picture": [first | {"image": "b.png"}, second],
        "two pictures": [first | {"image": ["a.png", "a.png"]}, second],
        "no picture": [first | {"image": None}, second],
        "fewer": [first],
        "choices": [first | {"choices": ["3", "4"]}, second | {"choices": None}],
        "precision": [first | {"precision": 1}, second],
    }
    found = {name: load(tmp_path, *rows).fingerprint() for name, rows in cases.items()}
    assert len(set(found.values())) == len(cases), found
    assert found["as it was"] == "288959d8"  # on every machine
    again = load(tmp_path, first, second, template="boxed")  # what is stored is the same
    assert again.fingerprint() == found["as it was"]
    kept = load(tmp_path, first, good(question=""), second, bad_rows="skip")
    assert kept.fingerprint() == found["as it was"]


def test_fingerprint_of_stored_pictures(tmp_path):
    def fingerprint(colour, **options):
        content = encoded(Image.new("RGB", (32, 32), colour), "BMP")  # all of one length
        row = {"image": {"bytes": content, "path": "a.bmp"}, "problem": "?", "answer": "1"}
        path = write_parquet(tmp_path, [row], image=datasets.Image())
        return load_rows(path, **options).fingerprint()

    assert fingerprint("red") == fingerprint("red") == fingerprint("red", limit=1, streaming=True)
    assert fingerprint("red") != fingerprint("blue")


def test_fingerprint_of_an_image_folder_does_not_depend_on_its_place(tmp_path):
    """The loader gives absolute paths, of the folder itself or of its cache."""
    paint(tmp_path / "here/train", a="red", b="blue")
    lines = [{"file_name": f"{name}.png", "question": "?", "answer": "1"} for name in "ab"]
    write(tmp_path / "here/train", lines, "metadata.jsonl")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (load_rows(str(tmp_path / name)).fingerprint() for name in ("here", "there"))
    assert here == there
    write(tmp_path / "there/train", lines[::-1], "metadata.jsonl")
    assert load_rows(str(tmp_path / "there")).fingerprint() != here
    assert data.picture_id({"path": "/cache/x/a.png"}, tmp_path) == "a.png"
    assert data.picture_id({"path": "x/a.png"}, tmp_path) == "x/a.png"


def test_fingerprint_of_the_demo_and_of_a_stream(numbered):
    one, other = (load_rows("demo", f"{name}/train").fingerprint() for name in ("plain", "shifted"))
    assert one == load_rows("demo", "plain/train", limit=5).fingerprint() != other
    assert load_rows(numbered, streaming=True).fingerprint() == ""


# -------------------------------------------------------------------------------- order and seeds


def test_every_epoch_has_every_row_once_in_another_order():
    epochs = []
    for start in (0, 3):
        rows = []
        for step in range(start, start + 3):
            rows += data.step_rows(step, 4, 12, seed=0)
        epochs.append(rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
    assert epochs[0] == np.random.default_rng([0, 0]).permutation(12).tolist()


@pytest.mark.parametrize(
    "step, n, order, rows",
    [
        (1, 3, None, [2, 1, 5, 4]),  # 2 1 | 2 1: from the end of epoch 1 and the start of epoch 2
        (0, 1, None, [0, 1, 2, 3]),  # one row, named row + n, row + 2n, row + 3n
        (0, None, None, [0, 1, 2, 3]),  # a stream
        (2, None, None, [8, 9, 10, 11]),
        (0, 9, [5, 3, 8], [5, 3, 8, 14]),  # round again after the last
        (1, 9, [5, 3, 8], [3, 8, 5, 12]),
    ],
)
def test_rows_of_a_step(step, n, order, rows):
    assert data.step_rows(step, 4, n, seed=7, order=order) == rows


def test_load_order(tmp_path):
    path = tmp_path / "order.json"
    path.write_text("[2, 0, 2]")
    assert data.load_order(str(path), data.Rows(None, [0, 1, 2])) == [2, 0, 2]
    assert data.load_order(str(path), load_rows("demo")) == [2, 0, 2]
    with refused("counts all rows, of which 1 are left out here"):
        data.load_order(str(path), data.Rows(None, [0, 2, 3]))
    for text in ("[3]", "[-1]", "[]", "[0.5]", '["0"]'):
        path.write_text(text)
        with refused("order.json must be a JSON list of row numbers from 0 to 2"):
            data.load_order(str(path), data.Rows(None, [0, 1, 2]))


def test_row_seeds():
    """Fixed for ever: a checkpoint's run goes on with the same random numbers."""
    seeds = data.row_seeds(3, 5, [0, 7], 2)
    assert seeds == [6196010988079189285, 6848479997823112078]
    assert data.row_seeds(3, 5, [7], 2) == seeds[1:]
    for changed in ((4, 5, [0], 2), (3, 6, [0], 2), (3, 5, [1], 2), (3, 5, [0], 1)):
        assert data.row_seeds(*changed) != seeds[:1]
