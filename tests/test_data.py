"""data.py: the sources, the columns, and what a bad row gets (DESIGN.md's table)."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image
from test_train import metrics_of, parameters, short
from torch import equal

import rewards
import train_saei
from runtime import data
from runtime.data import load_rows


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
    rows = {
        "images": [[Image.fromarray(picture)] * 2],
        "problem": ["Two of them"],
        "answer": ["\\frac{1}{2}"],
    }
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
        ValueError,
        match="no column for answer: looked for answer, solution, ground_truth, found image, q",
    ):
        load_rows(write(tmp_path, [{"image": "a.png", "question": "?"}]), "train")


def test_empty_set_is_refused(tmp_path):
    datasets.Dataset.from_dict({"images": [], "problem": [], "answer": []}).to_parquet(
        tmp_path / "empty.parquet"
    )
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
def test_bad_row_is_refused_with_its_index_or_skipped_and_named(
    tmp_path, picture, capsys, changes, reason
):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    path = write(tmp_path, [good(), good(**changes), good(solution="4")])
    with pytest.raises(ValueError, match=f"row 1: {reason}.*--bad_rows skip"):
        load_rows(path, "train")
    rows = load_rows(path, "train", bad_rows="skip")
    assert [row["answer"] for row in rows] == ["3", "4"] and [row["row"] for row in rows] == [0, 2]
    said = capsys.readouterr().out
    assert "skipped row 1: " in said and "skipped 1 bad rows" in said


def test_all_rows_bad_is_refused(tmp_path, picture):
    with pytest.raises(ValueError, match="has no usable row"):
        load_rows(write(tmp_path, [good(question="")]), "train", bad_rows="skip")


def test_trap_04_long_prompts_are_filtered_and_counted(tmp_path, picture, policy, capsys):
    path = write(tmp_path, [good(), good(question="How many? " * 50)])
    (row,) = load_rows(path, "train", prompt_tokens=policy.prompt_tokens, max_prompt_tokens=60)
    assert row["problem"] == "How many?"
    assert "left out 1 rows with more than 60 prompt tokens" in capsys.readouterr().out
    assert (
        policy.prompt_tokens(row) == policy.encode([row["problem"]], [row["images"]]).ids.shape[1]
    )


def test_zero_size_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unreadable image: it has zero size"):
        data.to_image(Image.new("RGB", (0, 5)), tmp_path)


# -------------------------------------------------------------------------------------------------------------- sources


def colours(images):
    return [image.getpixel((0, 0)) for image in images]


def paint(folder, **named):
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in named.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{name}.png")


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_folder_of_pictures_with_metadata(tmp_path):
    """The layout that the datasets library calls an image folder: file_name becomes the image column."""
    for split, colour in (("train", "red"), ("test", "blue")):
        paint(tmp_path / split, a=colour)
        line = {"file_name": "a.png", "question": "Which colour?", "answer": colour}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(line))
    for streaming in (False, True):
        (row,) = load_rows(str(tmp_path), "test", limit=1, streaming=streaming)
        assert (row["answer"], colours(row["images"])) == ("blue", [BLUE])


def test_folder_of_json_files_beside_pictures(tmp_path):
    """Split by file name, paths relative to the folder; pictures in the majority do not make it a picture set."""
    paint(tmp_path / "images", a="red", b="blue", c="red")
    for split in ("train", "test"):
        row = {
            "images": ["images/a.png", "images/b.png"],
            "problem": f"<image> or <image>, {split}?",
            "answer": "b",
        }
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    (row,) = load_rows(str(tmp_path), "test")
    assert row["problem"] == "<image> or <image>, test?" and colours(row["images"]) == [RED, BLUE]
    with pytest.raises(
        ValueError, match="no file of .* is named after the split 'val': test.jsonl, train.jsonl"
    ):
        load_rows(str(tmp_path), "val")
    (tmp_path / "train.jsonl").rename(tmp_path / "rows.jsonl")
    (tmp_path / "test.jsonl").unlink()
    assert load_rows(str(tmp_path))[0]["problem"] == "<image> or <image>, train?"


def test_folder_of_parquet_shards_as_the_hub_has_them(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        table = datasets.Dataset.from_dict(
            {"image": [None], "problem": [f"{shard}?"], "answer": [shard]}
        )
        table.to_parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet")
    assert [row["problem"] for row in load_rows(str(tmp_path), "train")] == ["0?", "1?"]
    assert [row["answer"] for row in load_rows(str(tmp_path), "train")] == [
        "0",
        "1",
    ]  # whole numbers become texts


def test_csv_with_paths(tmp_path, picture):
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,How many?,3\n")
    (row,) = load_rows(str(tmp_path / "rows.csv"))
    assert (row["problem"], row["answer"], row["images"][0].size) == ("How many?", "3", (60, 40))


def test_json_array_and_absolute_paths(tmp_path):
    paint(tmp_path / "elsewhere", a="blue")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good(image=str(tmp_path / "elsewhere/a.png"))]))
    assert colours(load_rows(str(path))[0]["images"]) == [BLUE]


def test_what_cannot_be_found_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        load_rows("nowhere.jsonl")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="a.xlsx: only files ending in .json, .jsonl, .parquet, .csv can be read"
    ):
        load_rows(str(tmp_path / "a.xlsx"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="nobody/nothing cannot be found: no local file.*presets are geometry3k"
    ):
        load_rows("nobody/nothing")


def test_every_form_of_image(tmp_path, picture):
    png = (tmp_path / "a.png").read_bytes()
    for form in (
        png,
        {"bytes": png, "path": None},
        {"bytes": None, "path": "a.png"},
        "a.png",
        Image.open(tmp_path / "a.png"),
    ):
        assert np.array_equal(np.asarray(data.to_image(form, tmp_path)), picture)
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="unreadable image"):
            data.to_image(nothing, tmp_path)


def test_further_pictures_do_not_go_to_rewards_and_logs(tmp_path, picture):
    row = {
        "image": "a.png",
        "thumbnail": str(tmp_path / "a.png"),
        "problem": "?",
        "answer": "1",
        "source": "mine",
    }
    features = datasets.Features(
        {name: datasets.Value("string") for name in row} | {"thumbnail": datasets.Image()}
    )
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "t.parquet")
    (row,) = load_rows(str(tmp_path / "t.parquet"))
    assert "thumbnail" not in row and row["source"] == "mine" and len(row["images"]) == 1


def test_a_broken_picture_in_an_image_column_is_a_bad_row(tmp_path, picture, capsys):
    """Not the end of the reader: images are stored undecoded until a row is checked."""
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("problem", "answer")}
        | {"images": datasets.List(datasets.Image())}
    )
    stored = [
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
        {"bytes": b"no picture", "path": None},
    ]
    rows = {"images": [[x] for x in stored], "problem": ["?", "?"], "answer": ["1", "2"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="row 1: unreadable image: cannot identify"):
            load_rows(str(tmp_path / "t.parquet"), limit=2, streaming=streaming)
        (row,) = load_rows(
            str(tmp_path / "t.parquet"), bad_rows="skip", limit=2, streaming=streaming
        )
        assert row["answer"] == "1"


# -------------------------------------------------------------------------------------------------------------- columns


def test_columns_by_option(tmp_path, picture):
    path = write(
        tmp_path,
        [good(photo="a.png", image="missing.png", task="Which?", gold="b", answers=["x", "y"])],
    )
    names = {
        "image_column": "photo",
        "problem_column": "task",
        "answer_column": "gold",
        "choices_column": "answers",
    }
    (row,) = load_rows(path, **names)
    assert (row["problem"], row["answer"], row["choices"]) == (
        "Which?\nChoices:\nA. x\nB. y",
        "b",
        ["x", "y"],
    )
    assert len(row["images"]) == 1 and row["question"] == "How many?"
    with pytest.raises(
        ValueError, match="no column for image: looked for foto, found .*--image_column none"
    ):
        load_rows(path, image_column="foto")
    with pytest.raises(ValueError, match="no column for choices: looked for optoins"):
        load_rows(path, choices_column="optoins")
    with pytest.raises(TypeError, match="unknown options: images_column|picture"):
        load_rows(path, picture_column="a")


def test_text_alone_has_to_be_asked_for(tmp_path):
    path = write(tmp_path, [{"question": "1 + 1?", "answer": "2"}])
    with pytest.raises(
        ValueError, match="no column for image: looked for images, image, found answer, question"
    ):
        load_rows(path)
    assert load_rows(path, image_column="none")[0]["images"] == []


@pytest.mark.parametrize("name", ["choices", "options"])
def test_choices_are_listed_and_go_to_the_reward(tmp_path, picture, name):
    path = write(tmp_path, [good(**{name: [7, 8]}, solution="8"), good(**{name: None})])
    listed, plain = load_rows(path)
    assert (listed["problem"], listed["choices"]) == ("How many?\nChoices:\nA. 7\nB. 8", ["7", "8"])
    assert (plain["problem"], plain["choices"], plain["precision"]) == ("How many?", None, None)


def test_choices_that_are_no_list_are_refused(tmp_path, picture):
    with pytest.raises(ValueError, match="row 0: choices must be a list of texts, got 'A. x;B. y'"):
        load_rows(write(tmp_path, [good(options="A. x;B. y")]))


def test_columns_named_like_the_rewards_arguments_are_refused(tmp_path, picture):
    for name in ("completions", "completion_ids"):
        with pytest.raises(ValueError, match=f"a column must not be called {name}: rename it"):
            load_rows(write(tmp_path, [good(**{name: "x"})]))
    assert load_rows(write(tmp_path, [good(columns="x")]))[0]["columns"] == "x"


def test_all_columns_reach_the_rewards(tiny, tmp_path, picture, monkeypatch):
    path, seen = write(tmp_path, [good(choices=["3", "4"], precision=2, source="mine")]), []

    def accuracy(completions, answer, **columns):
        if len(completions) > 1:  # a single one: the check of the gold answer
            seen.append(columns | {"answer": answer})
        return [0.0] * len(completions)

    monkeypatch.setattr(rewards, "accuracy_reward", accuracy)
    train_saei.main(short(tiny, tmp_path / "out", dataset=path, split="train", steps=1))
    (columns,) = seen
    assert (
        columns["choices"] == [["3", "4"]] * 8
        and columns["precision"] == [2] * 8
        and columns["answer"] == ["3"] * 8
    )
    assert columns["source"] == ["mine"] * 8


# ------------------------------------------------------------------------------------------ places, messages, templates


@pytest.mark.parametrize(
    "problem, count, marks",
    [("<image> and <image>?", 1, 2), ("<image>?", 2, 1), ("Is <image> red?", 0, 1)],
)
def test_marks_that_do_not_match_the_images_are_refused(
    tmp_path, picture, policy, problem, count, marks
):
    path = write(tmp_path, [good(image=["a.png"] * count, question=problem)])
    with pytest.raises(
        ValueError, match=f"row 0: the problem has {marks} <image> marks for {count} images"
    ):
        load_rows(path)
    with pytest.raises(
        ValueError, match=f"the problem has {marks} <image> marks for {count} images"
    ):
        policy.chat_text(problem, count)


def shown(policy, problem, images):
    """The prompt's text with each picture's block as [I]."""
    return policy.chat_text(problem, images).replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "[I]"
    )


def test_pictures_stand_where_they_are_marked(policy):
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(policy, "Is <image> or <image> red?", 2) == user.format("Is [I] or [I] red?")
    assert (
        shown(policy, "Which?", 2)
        == shown(policy, "<image><image>Which?", 2)
        == user.format("[I][I]Which?")
    )
    assert shown(policy, "1 + 1?", 0) == user.format("1 + 1?")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "See <image>"}]
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And <image>?"}]
    assert shown(policy, talk, 2) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSee [I]<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n" + user.format("And [I]?")
    )
    talk[1]["content"], talk[3]["content"] = "See", "And?"
    assert "user\n[I][I]See<" in shown(policy, talk, 2) and "user\nAnd?<" in shown(policy, talk, 2)


def test_places_reach_the_tokens(policy):
    """Image tokens in the encoded prompt follow the marks: text, picture, text, picture."""
    images = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (64, 32), "blue")]
    prompts = policy.encode(["Is <image> or <image> red?"], [images])
    token = policy.processor.tokenizer.convert_tokens_to_ids
    ids = [
        x
        for x in prompts.ids[0].tolist()
        if x in (token("<|image_pad|>"), token("?"), token("<|vision_start|>"))
    ]
    pad, start, mark = token("<|image_pad|>"), token("<|vision_start|>"), token("?")
    assert ids == [start, pad, start, pad, pad, mark]
    assert (
        policy.prompt_tokens({"problem": "Is <image> or <image> red?", "images": images})
        == prompts.ids.shape[1]
    )


PARTS = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " red?"}]


def test_conversational_prompts_as_in_trl(tmp_path, picture):
    system = {"role": "system", "content": "Be brief."}
    prompts = [
        [{"role": "user", "content": PARTS}],
        [system, {"role": "user", "content": "Which?"}],
        [{"role": "user", "content": "What is 1 + 1?"}],
    ]
    images = [["a.png"], ["a.png", "a.png"], None]
    rows = [
        {"prompt": p, "images": i, "solution": "3"} for p, i in zip(prompts, images, strict=True)
    ]
    first, second, third = load_rows(write(tmp_path, rows))
    assert (first["problem"], len(first["images"])) == ("Is <image> red?", 1)
    assert (
        second["problem"] == [system, {"role": "user", "content": "Which?"}]
        and len(second["images"]) == 2
    )
    assert (third["problem"], third["images"]) == ("What is 1 + 1?", [])


def test_conversational_prompts_in_parquet_have_empty_fields_too(tmp_path, picture):
    """Arrow gives every part every field: text None in an image part, image None in a text part."""
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features(
        {
            "prompt": [{"role": datasets.Value("string"), "content": [part]}],
            "images": datasets.List(datasets.Image()),
        }
        | {"answer": datasets.Value("string")}
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": PARTS}],
            "images": [str(tmp_path / "a.png")],
            "answer": "yes",
        }
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    (row,) = load_rows(str(tmp_path / "t.parquet"))
    assert (row["problem"], row["images"][0].size) == ("Is <image> red?", (60, 40))


def test_pictures_within_messages(tmp_path, picture):
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Red?"}]
    row = {"messages": [{"role": "user", "content": content}], "answer": "yes"}
    (row,) = load_rows(write(tmp_path, [row]), problem_column="messages", image_column="none")
    assert (row["problem"], row["images"][0].size) == ("<image>Red?", (60, 40))
    row = {"messages": [{"role": "user", "content": content}], "answer": "yes", "image": "a.png"}
    with pytest.raises(
        ValueError, match="row 0: pictures stand both in the messages and in the image column"
    ):
        load_rows(write(tmp_path, [row]), problem_column="messages")


@pytest.mark.parametrize(
    "messages, reason",
    [
        (
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
            "end with the user's message",
        ),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of type 'video'"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "the problem is empty"),
        ([{"role": "user", "content": None}], "the problem is empty"),
        ([], "the problem is empty"),
    ],
)
def test_messages_that_are_no_prompt_are_refused(tmp_path, picture, messages, reason):
    rows = [{"prompt": [{"role": "user", "content": "ok?"}], "image": None, "answer": "1"}]
    rows += [{"prompt": messages, "image": None, "answer": "1"}]
    with pytest.raises(ValueError, match=f"row 1: .*{reason}"):
        load_rows(write(tmp_path, rows))


def test_templates(tmp_path, picture):
    path = write(tmp_path, [good(question="<image>How many?")])
    assert (
        load_rows(path, template="none")[0]["problem"]
        == load_rows(path)[0]["problem"]
        == "<image>How many?"
    )
    for name, asked in (("boxed", "\\boxed{}"), ("tags", "<answer></answer>")):
        problem = load_rows(path, template=name)[0]["problem"]
        assert (
            problem.startswith("<image>How many?\n")
            and asked in problem
            and "<think></think>" in problem
        )
    own = tmp_path / "own.yaml"
    own.write_text("system: You count.\nuser: 'Q: {problem} \\boxed{}!'\n")
    (row,) = load_rows(path, template=str(own))
    assert row["problem"] == [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "Q: <image>How many? \\boxed{}!"},
    ]


@pytest.mark.parametrize(
    "text", ["user: no place", "system: '{problem}'", "user: '{problem}'\nassistant: x", "- a"]
)
def test_templates_that_lose_the_problem_are_refused(tmp_path, picture, text):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match="needs the key user with {problem} in it"):
        load_rows(write(tmp_path, [good()]), template=str(tmp_path / "own.yaml"))


def test_unfit_templates_are_refused(tmp_path, picture):
    path = write(
        tmp_path,
        [good(question=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])],
    )
    with pytest.raises(
        ValueError, match="template 'boxd' is neither a file nor one of none, boxed, tags"
    ):
        load_rows(path, template="boxd")
    (tmp_path / "own.yaml").write_text("system: x\nuser: '{problem}'")
    with pytest.raises(
        ValueError, match="row 0: the row has a system message and so has the template"
    ):
        load_rows(path, template=str(tmp_path / "own.yaml"))
    with pytest.raises(ValueError, match="no template, got 'boxed'"):
        load_rows("demo", template="boxed")


# --------------------------------------------------------------------------------------------------------------- images


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_exif_orientation(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste((0, 0, 255), (0, 0, 20, 20))  # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise by 90 degrees
    upright = data.to_image(saved(lying, "PNG", exif=exif), tmp_path)
    assert (
        upright.size == (20, 40)
        and upright.getpixel((10, 5)) == BLUE
        and upright.getpixel((10, 35)) == RED
    )


def test_transparency_is_laid_on_white(tmp_path):
    for mode in ("RGBA", "LA"):
        drawing = Image.new(mode, (4, 4))  # black, all of it transparent
        drawing.putpixel((1, 1), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        picture = data.to_image(saved(drawing, "PNG"), tmp_path)
        assert (picture.getpixel((0, 0)), picture.getpixel((1, 1))) == ((255, 255, 255), (0, 0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    assert colours([data.to_image(saved(palette, "PNG", transparency=0), tmp_path)]) == [
        (255, 255, 255)
    ]
    assert data.to_image(saved(palette, "PNG"), tmp_path).getpixel((1, 1)) == BLUE


def test_cmyk_grey_and_sixteen_bits(tmp_path):
    cmyk = data.to_image(
        saved(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG", quality=100), tmp_path
    )
    assert np.allclose(cmyk.getpixel((8, 8)), RED, atol=3)
    ramp = (np.arange(65536, dtype=np.uint16).reshape(256, 256),)
    deep = data.to_image(saved(Image.fromarray(*ramp), "PNG"), tmp_path)
    assert np.array_equal(
        np.asarray(deep)[..., 0], ramp[0] >> 8
    )  # a plain conversion would cut at 255
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"32-bit pixels \\(mode {mode}\\)"):
            data.to_image(saved(Image.new(mode, (4, 4)), "TIFF"), tmp_path)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"save_all": True, "append_images": frames[1:]} | (
            {"lossless": True} if kind == "WEBP" else {}
        )
        assert colours([data.to_image(saved(frames[0], kind, **options), tmp_path)]) == [RED]


@pytest.mark.parametrize("size", [(1, 1), (5400, 3700)], ids=["one pixel", "20 megapixels"])
def test_extreme_sizes_are_resized_by_the_processor(tmp_path, policy, size):
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    (row,) = load_rows(
        write(tmp_path, [good()]), prompt_tokens=policy.prompt_tokens, max_prompt_tokens=200
    )
    (image,) = policy.encode([row["problem"]], [row["images"]]).images
    assert (
        32 * 32 <= image.shape[1] * image.shape[2] <= 256 * 256
        and image[0].min() > 0.99
        and image[1].max() < 0.01
    )


def test_a_shape_that_the_processor_refuses_is_a_bad_row(tmp_path, policy):
    Image.new("RGB", (1000, 1), "red").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="row 0: .*aspect ratio"):
        load_rows(
            write(tmp_path, [good()]), prompt_tokens=policy.prompt_tokens, max_prompt_tokens=200
        )


def test_more_pixels_than_a_picture_can_have_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="unreadable image: .*decompression bomb"):
        data.to_image(saved(Image.new("RGB", (20, 20)), "PNG"), tmp_path)


# -------------------------------------------------------------------------------------------------------------- streams


def numbered(tmp_path, n=20):
    paint(tmp_path, a="red")
    return write(tmp_path, [good(question=f"{i}?") for i in range(n)])


def problems(rows, indices):
    return [rows[i]["problem"] for i in indices]


def test_a_stream_gives_every_row_of_every_epoch_once_and_repeats_itself(tmp_path):
    path = numbered(tmp_path)
    first = problems(load_rows(path, streaming=True, seed=3), range(40))
    assert sorted(first[:20]) == sorted(first[20:]) == sorted(f"{i}?" for i in range(20))
    assert first[:20] != first[20:] != [f"{i}?" for i in range(20)]
    assert problems(load_rows(path, streaming=True, seed=3), range(40)) == first
    assert problems(load_rows(path, streaming=True, seed=4), range(40)) != first


def test_a_stream_is_read_from_any_place_and_never_back(tmp_path):
    path = numbered(tmp_path)
    whole = problems(load_rows(path, streaming=True), range(30))
    later = load_rows(path, streaming=True)  # as a resumed run, or one process of two, reads it
    assert problems(later, [7, 9, 25]) == [whole[7], whole[9], whole[25]]
    assert problems(later, [25]) == [whole[25]]  # the last one again
    with pytest.raises(IndexError, match="forward only: row 24 after row 25"):
        later[24]


def test_a_stream_checks_rows_as_they_come(tmp_path, policy, capsys):
    paint(tmp_path, a="red")
    path = write(
        tmp_path, [good(), good(solution=""), good(question="How many? " * 50), good(solution="4")]
    )
    limits = {"prompt_tokens": policy.prompt_tokens, "max_prompt_tokens": 60}
    rows = load_rows(path, bad_rows="skip", streaming=True, **limits)
    assert sorted((rows[i]["answer"], rows[i]["row"]) for i in range(2)) == [("3", 0), ("4", 3)]
    rows[3]
    said = capsys.readouterr().out
    assert "skipped row 1: gold answer '' cannot be parsed" in said and "skipped 1 bad rows" in said
    assert "left out 1 rows with more than 60 prompt tokens" in said
    with pytest.raises(
        ValueError, match=r"row 1: gold answer '' cannot be parsed.*--bad_rows skip"
    ):
        strict = load_rows(path, streaming=True, **limits)
        [strict[i] for i in range(4)]
    with pytest.raises(ValueError, match="the streamed set has no usable row"):
        load_rows(write(tmp_path, [good(solution="")]), bad_rows="skip", streaming=True)[0]


def test_a_streamed_run_resumes_exactly(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rewards,
        "accuracy_reward",
        lambda completions, **_: [i % 2.0 for i in range(len(completions))],
    )
    settings = {"dataset": numbered(tmp_path), "split": "train", "streaming": True, "save_every": 2}
    train_saei.main(short(tiny, tmp_path / "whole", steps=4, **settings))
    train_saei.main(short(tiny, tmp_path / "parts", steps=2, **settings))
    train_saei.main(short(tiny, tmp_path / "parts", steps=4, resume=True, **settings))
    assert len(metrics_of(tmp_path / "parts")) == 4
    whole, parts = (
        parameters(tmp_path / run / "checkpoints/step-000004") for run in ("whole", "parts")
    )
    assert all(equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "answer, choices, fits",
    [
        ("A", ["red", "blue"], True), ("blue", ["red", "blue"], True), ("A, C", ["a1", "b1", "c1"], True),
        ("C", ["red", "blue"], False), ("1", ["red", "blue"], False), ("green", ["red", "blue"], False),
        ("2", ["1", "2"], True), ("B", ["A. red", "B. blue"], True), ("3.0", ["3", "4"], True),
    ],
)  # fmt: skip
def test_a_gold_that_is_none_of_the_choices_is_refused(tmp_path, picture, answer, choices, fits):
    path = write(tmp_path, [good(solution=answer, choices=choices)])
    if fits:
        assert load_rows(path, "train")[0]["choices"] == choices
    else:
        with pytest.raises(ValueError, match="row 0: the answer .* is none of the choices"):
            load_rows(path, "train")


def test_splits_are_whole_words_of_a_files_name(tmp_path, picture):
    for name, count in (("my.train", 1), ("constraint_test", 2), ("latest", 3)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(good()) + "\n" for _ in range(count))
        )
    assert (
        len(load_rows(str(tmp_path), "train")) == 1 and len(load_rows(str(tmp_path), "test")) == 2
    )


@pytest.mark.parametrize("content", [{"type": "text"}, ["plain"]])
def test_malformed_messages_are_bad_rows(tmp_path, picture, content):
    bad = {"image": "a.png", "prompt": [{"role": "user", "content": content}], "solution": "3"}
    with pytest.raises(
        ValueError, match="row 0: a message's content is neither a text nor a list of parts"
    ):
        load_rows(write(tmp_path, [bad]), "train")


@pytest.mark.parametrize("text", ['{"image": "a.png", "question": ', ""])
def test_a_broken_or_empty_file_is_named(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match="rows.jsonl cannot be read or has no rows"):
        load_rows(str(tmp_path / "rows.jsonl"), "train")


def test_a_precision_that_is_no_number_is_named(tmp_path, picture):
    with pytest.raises(
        ValueError, match="row 0: precision must be a whole number of decimals, got 'high'"
    ):
        load_rows(write(tmp_path, [good(precision="high")]), "train")
