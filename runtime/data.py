"""Rows {images, problem, answer, ...} from the demo, local data or the hub, checked before the first step.

    rows = load_rows("demo", "plain/test", limit=100)
    rows = load_rows("my_data.jsonl")                                  # columns found by their common names
    rows = load_rows("demo", preset="mathvista", template="boxed")     # a named set of presets.py, from the hub
    rows[0]["images"][0].size, rows[0]["problem"], rows[0]["answer"]

A row's images are PIL pictures in RGB. Its problem is a text, or messages where there is more than one; <image> marks
the place of a picture in it, and pictures whose places are nowhere marked come first. Other columns pass through, to
rewards and logs. A bad row is refused with its index and the reason, or, with bad_rows="skip", left out, counted and
named. Nothing is ever truncated.
"""

import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import signature
from pathlib import Path

import datasets
import numpy as np
import yaml
from PIL import Image, ImageOps

import rewards
from runtime.presets import PRESETS, Preset, with_choices

COLUMNS = {
    "image": ("images", "image"),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution", "ground_truth"),
    "choices": ("choices", "options"),
}
# What the prompt asks for, in EasyR1's (boxed) and R1-V's (tags) way; a file of one's own has the same two keys.
TEMPLATES = {
    "none": {"user": "{problem}"},
    "boxed": {
        "user": "{problem}\nReason inside <think></think> first, then put the final answer in \\boxed{}."
    },
    "tags": {
        "user": "{problem}\nReason inside <think></think> first, then put the final answer in <answer></answer>."
    },
}
OPTIONS = (
    "preset",
    "dataset_config",
    "template",
    "streaming",
    *(f"{name}_column" for name in COLUMNS),
)
DEMO_ROWS = 1_000_000  # rows that a demo split pretends to have; each is drawn when it is asked for
BUFFER = 1000  # a streamed set is shuffled within so many rows


class Rows(Sequence):
    """A list whose items are made when they are asked for: rows[i] = make(keep[i]), with its number in the set, row."""

    def __init__(self, make: Callable[[int], dict], keep: Sequence[int]):
        self.make, self.keep = make, keep

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, i: int) -> dict:
        try:
            return self.make(self.keep[i]) | {"row": self.keep[i]}
        except ValueError as error:
            error.add_note(
                f"row {self.keep[i]}: it could be read when the run began; was a file moved or deleted?"
            )
            raise


class Stream:
    """stream[i], i never falling: the i-th usable row of endless epochs, each checked when it comes.

    The order follows from the seed alone, so that a resumed run gets the same rows: it reads up to its place again.
    """

    def __init__(self, table: datasets.IterableDataset, check: Callable, seed: int):
        table = table.map(
            lambda _, i: {"__index__": i}, with_indices=True
        )  # a bad row is named by its place in the set
        self.table, self.check, self.next = table.shuffle(seed=seed, buffer_size=BUFFER), check, 0
        self.rows = self._endless()

    def _endless(self) -> Iterator[dict]:
        for epoch in itertools.count():
            self.table.set_epoch(epoch)
            empty = True
            for i, row in self.check((raw["__index__"], raw) for raw in self.table):
                empty = False
                yield row | {"row": i}
            if empty:
                raise ValueError("the streamed set has no usable row")

    def __getitem__(self, i: int) -> dict:
        if i < self.next - 1:
            raise IndexError(f"a stream goes forward only: row {i} after row {self.next - 1}")
        if i >= self.next:
            skip, self.next = i - self.next, i + 1
            self.last = next(itertools.islice(self.rows, skip, None))
        return self.last


def load_rows(
    dataset: str = "demo",
    split: str | None = None,
    bad_rows: str = "refuse",
    limit: int | None = None,
    prompt_tokens: Callable[[dict], int] | None = None,
    max_prompt_tokens: int | None = None,
    *,
    preset: str | None = None,
    dataset_config: str | None = None,
    template: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    **columns: str | None,
) -> Rows | Stream:
    """The rows of a split, checked.

    dataset: "demo", a preset's name, a .json/.jsonl/.parquet/.csv file, a folder (of images with metadata, of such
    files, or written by save_to_disk), or a hub id. preset: read it, or the preset's own set if it is "demo", as this
    entry of presets.py. template: a name of TEMPLATES or a YAML file with the keys user and, if wanted, system.
    image_column, problem_column, answer_column, choices_column: unset, the first of their common names is taken.
    streaming: a Stream; with a limit, Rows that were read up to there.

    prompt_tokens(row) > max_prompt_tokens: the row is left out, and the number of such rows is said.
    Raises ValueError for an empty set, a missing column or (bad_rows "refuse") the first bad row.
    """
    preset, dataset = find_preset(preset, dataset)
    if dataset == "demo":
        return demo_rows(split or "shifted/train", limit, template)
    split = split or default_split(preset, "train")
    title, folder = (
        f"{dataset} ({split})",
        Path(dataset) if Path(dataset).is_dir() else Path(dataset).parent,
    )
    table = open_table(
        dataset, split, dataset_config or (preset.config if preset else None), streaming
    )
    convert = by_preset(preset, table, title) if preset else by_columns(table, columns)
    words = load_template(template or (preset.template if preset else "none"))

    def make(raw: dict) -> dict:
        return to_row(convert(raw), words, folder)

    def check(raws: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
        return usable(raws, make, title, bad_rows, prompt_tokens, max_prompt_tokens)

    if streaming and limit is None:
        return Stream(table, check, seed)
    if streaming:
        table = datasets.Dataset.from_list(list(table.take(limit)), features=table.features)
    read, total = reader(table), len(table) if limit is None else min(limit, len(table))
    if total == 0:
        raise ValueError(f"{title} has no rows")
    keep = [i for i, _ in check((i, read(i)) for i in range(total))]
    if not keep:
        raise ValueError(f"{title} has no usable row")
    return Rows(lambda i: make(read(i)), keep)


def usable(
    raws: Iterable[tuple[int, dict]],
    make: Callable[[dict], dict],
    title: str,
    bad_rows: str,
    prompt_tokens: Callable[[dict], int] | None,
    max_prompt_tokens: int | None,
) -> Iterator[tuple[int, dict]]:
    """(index, stored row) -> (index, row) of the good ones; others are refused, or named as they come and counted."""
    bad = long = 0
    for i, raw in raws:
        try:
            row = make(raw)
            length = prompt_tokens(row) if prompt_tokens else 0
        except (ValueError, OSError) as error:
            if bad_rows == "refuse":
                raise ValueError(
                    f"{title}, row {i}: {error}; --bad_rows skip leaves such rows out"
                ) from error
            bad += 1
            if bad <= 5 or bad % 100 == 0:
                print(f"{title}: skipped row {i}: {error} ({bad} so far)")
            continue
        if prompt_tokens and length > max_prompt_tokens:
            long += 1
            continue
        yield i, row
    if bad:
        print(f"{title}: skipped {bad} bad rows")
    if long:
        print(f"{title}: left out {long} rows with more than {max_prompt_tokens} prompt tokens")


# ------------------------------------------------------------------------------------------------- where rows come from


def find_preset(preset: str | None, dataset: str) -> tuple[Preset | None, str]:
    """The preset that is named, by --preset or as the data set, and what to read with it."""
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    found = PRESETS.get(
        preset or ("" if Path(dataset).exists() else dataset)
    )  # a folder of that name is that folder
    return found, found.dataset if found and dataset in ("demo", preset or dataset) else dataset


def default_split(preset: Preset | None, purpose: str) -> str:
    """The split to train on or to evaluate ("test") on, where none is named."""
    split = getattr(preset, purpose) if preset else purpose
    if split is None:
        raise ValueError(
            f"{preset.dataset} has no split for this purpose ({purpose}); name one by --split or --splits"
        )
    return split


def demo_rows(split: str, limit: int | None, template: str | None) -> Rows:
    from demo.task import make_row  # the demo's rows are right by construction (tests/test_demo.py)

    if template not in (None, "none"):
        raise ValueError(
            f"the demo's problems say how to answer already: no template, got {template!r}"
        )
    make_row(split, 0)  # refuses an unknown split
    return Rows(lambda i: make_row(split, i), range(min(limit or DEMO_ROWS, DEMO_ROWS)))


def open_table(
    dataset: str, split: str, config: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The split as it is stored, or a stream of it with images undecoded."""
    path, kinds = (
        Path(dataset),
        {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"},
    )
    if path.suffix in kinds and not path.exists():
        raise ValueError(f"{dataset} does not exist")
    if path.is_file() and path.suffix not in kinds:
        raise ValueError(f"{dataset}: only files ending in {', '.join(kinds)} can be read")
    if path.is_dir() and any(
        (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")
    ):
        table = datasets.load_from_disk(dataset)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(table)}")
            table = table[split]
        table = table.to_iterable_dataset() if streaming else table
    else:
        options = {"split": split, "streaming": streaming}
        source, files = (
            (kinds[path.suffix], str(path))
            if path.is_file()
            else (dataset, json_files(path, split))
        )
        if path.is_file():
            options["split"] = "train"  # a file is one split, called so
        try:
            table = datasets.load_dataset(source, config, data_files=files, **options)
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(
                f"{dataset} cannot be found: no local file or folder, and no hub id that can be reached ({error}); "
                f"presets are {', '.join(PRESETS)}"
            ) from error
        except (ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(
                f"{dataset} cannot be read or has no rows: {error.__cause__ or error}"
            ) from error
    return table.cast(undecoded(table.features)) if streaming and table.features else table


def json_files(folder: Path, split: str) -> dict[str, list[str]] | None:
    """The .json/.jsonl files of a split in a folder that may hold pictures too; None: the loader knows what to do."""
    if not folder.is_dir() or list(folder.rglob("metadata.*")) or (folder / "README.md").exists():
        return None
    found = sorted(p for p in folder.rglob("*.json*") if p.suffix in (".json", ".jsonl"))
    if not found:
        return None
    mine = [str(p) for p in found if split in re.split(r"[\W_]+", p.stem) or p.parent.name == split]
    mine = (
        [str(p) for p in found] if len(found) == 1 and split == "train" else mine
    )  # a file is one split, called so
    if not mine:
        raise ValueError(
            f"no file of {folder} is named after the split {split!r}: {', '.join(p.name for p in found)}"
        )
    return {split: mine}


def undecoded(feature):
    """The feature with images as stored, {"bytes", "path"}: a broken one is then a bad row, not the reader's end."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, dict):
        return type(feature)({name: undecoded(inner) for name, inner in feature.items()})
    return feature


def reader(table: datasets.Dataset) -> Callable[[int], dict]:
    """i -> row i with images undecoded, without the copy of all data that a cast would make."""
    features, arrow = undecoded(table.features), table.with_format("arrow")
    return lambda i: features.decode_example(arrow[i].to_pylist()[0])


# ------------------------------------------------------------------------------------------------ from columns to a row


def by_preset(preset: Preset, table, title: str) -> Callable[[dict], dict]:
    found = sorted(table.column_names)
    if missing := sorted(set(preset.columns) - set(found)):
        raise ValueError(
            f"{title} is no copy of {preset.dataset}: it lacks {', '.join(missing)} and has {', '.join(found)}"
        )

    def convert(raw: dict) -> dict:
        try:
            return preset.row(raw)
        except (
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # None or another kind of value in a column
            raise ValueError(f"not as in {preset.dataset}: {error!r}") from error

    return convert


def by_columns(table, columns: dict[str, str | None]) -> Callable[[dict], dict]:
    """raw row -> {images, problem, answer, choices, precision} by column names, and the other columns but pictures."""
    found = list(table.column_names)
    names = find_columns(
        found, {name.removesuffix("_column"): column for name, column in columns.items()}
    )
    arguments = {
        **signature(rewards.total_reward).parameters,
        **signature(rewards.accuracy_reward).parameters,
    }
    free = {"answer", "choices", "precision", "columns"}
    if clash := sorted((set(arguments) - free | {"completion_ids"}) & set(found)):
        raise ValueError(f"a column must not be called {' or '.join(clash)}: rename it")
    features = table.features or {}
    others = [
        x
        for x in found
        if x not in names.values() and undecoded(features.get(x)) == features.get(x)
    ]

    def convert(raw: dict) -> dict:
        choices = raw[names["choices"]] if "choices" in names else None
        if choices is not None and not isinstance(choices, list):
            raise ValueError(f"choices must be a list of texts, got {choices!r:.80}")
        choices = [str(choice) for choice in choices or []] or None
        row = {name: raw[name] for name in others} | {
            "images": raw[names["image"]] if "image" in names else None
        }
        row |= {
            "problem": raw[names["problem"]],
            "answer": raw[names["answer"]],
            "choices": choices,
        }
        messages, embedded = to_messages(row["problem"])
        messages[-1]["content"] = with_choices(messages[-1]["content"], row["choices"])
        if embedded and row["images"]:
            raise ValueError("pictures stand both in the messages and in the image column")
        return row | {
            "problem": messages,
            "images": embedded or row["images"],
            "precision": raw.get("precision"),
        }

    return convert


def find_columns(found: list[str], wanted: dict[str, str | None]) -> dict[str, str]:
    """{"image", "problem", "answer", and "choices" if there is one: column}: as wanted, or the first common name."""
    if unknown := sorted(set(wanted) - set(COLUMNS)):
        raise TypeError(f"unknown options: {', '.join(name + '_column' for name in unknown)}")
    names = {}
    for name, common in COLUMNS.items():
        column = wanted.get(name)
        if column == "none" and name in ("image", "choices"):
            continue
        present = [x for x in ([column] if column else common) if x in found]
        if present:
            names[name] = present[0]
        elif column or name != "choices":
            looked = column or ", ".join(common)
            cure = (
                " (text alone, or pictures within messages: --image_column none)"
                if name == "image"
                else ""
            )
            raise ValueError(
                f"no column for {name}: looked for {looked}, found {', '.join(sorted(found))}{cure}"
            )
    return names


def to_messages(problem: object) -> tuple[list[dict], list]:
    """A text, or messages whose content is text or parts, -> messages of text with <image> marks, pictures in parts."""
    if isinstance(problem, str):
        return [{"role": "user", "content": problem}], []
    if (
        not isinstance(problem, list)
        or not all(isinstance(m, dict) and "role" in m for m in problem)
        or not problem
    ):
        raise ValueError(
            "the problem is empty" if not problem else f"the problem is no text: {problem!r:.80}"
        )
    messages, pictures = [], []
    for message in problem:
        content, text = message.get("content"), ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"a message's content is neither a text nor a list of parts: {content!r:.80}"
            )
        for part in parts:
            if part.get("type") not in ("text", "image"):
                raise ValueError(
                    f"a message has a part of type {part.get('type')!r}: only text and image are known"
                )
            text += "<image>" if part["type"] == "image" else part.get("text") or ""
            if part["type"] == "image" and part.get("image") is not None:
                pictures.append(part["image"])
        messages.append({"role": message["role"], "content": text})
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"the prompt must end with the user's message, not with the {messages[-1]['role']}'s"
        )
    return messages, pictures


def load_template(name: str) -> dict[str, str]:
    """{"user": text with {problem}, "system": text or absent}"""
    template = TEMPLATES.get(name)
    if template is None:
        if not Path(name).is_file():
            raise ValueError(
                f"template {name!r} is neither a file nor one of {', '.join(TEMPLATES)}"
            )
        try:
            template = yaml.safe_load(Path(name).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"template {name} is no YAML: {error}") from error
    keys = set(template) if isinstance(template, dict) else set()
    if not {"user"} <= keys <= {"user", "system"} or "{problem}" not in str(template["user"]):
        raise ValueError(
            f"template {name}: needs the key user with {{problem}} in it, and may have system; has {keys}"
        )
    return template


def to_row(row: dict, template: dict[str, str], folder: Path) -> dict:
    """One checked row, decoded. Raises ValueError for an unreadable image, an empty problem, a gold answer that cannot
    be parsed, and where the number of <image> marks is neither 0 nor that of the images.
    """
    messages, _ = to_messages(row["problem"])
    if not messages[-1]["content"].strip():
        raise ValueError("the problem is empty")
    messages[-1]["content"] = template["user"].replace("{problem}", messages[-1]["content"])
    if template.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError("the row has a system message and so has the template")
        messages.insert(0, {"role": "system", "content": template["system"]})
    images = (
        row["images"]
        if isinstance(row["images"], list)
        else []
        if row["images"] is None
        else [row["images"]]
    )
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks not in (0, len(images)):
        raise ValueError(f"the problem has {marks} <image> marks for {len(images)} images")
    answer, choices, precision = row["answer"], row["choices"], row["precision"]
    answer = "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)
    if precision is not None and not str(precision).removesuffix(".0").isdigit():
        raise ValueError(f"precision must be a whole number of decimals, got {precision!r:.80}")
    precision = None if precision is None else int(precision)
    rewards.accuracy_reward(
        [""], answer=[answer], choices=[choices], precision=[precision]
    )  # the gold can be parsed
    several = re.fullmatch(r"[A-Z](?: ?, ?[A-Z])+", answer)  # "A, C": more than one choice
    letters = [chr(65 + i) for i in range(len(choices or []))]
    if (
        letters
        and not several
        and not any(rewards.grade(x, answer, choices, precision) for x in letters)
    ):
        raise ValueError(
            f"the answer {answer!r:.80} is none of the choices {choices}: give its letter or its text"
        )
    problem = messages[0]["content"] if len(messages) == 1 else messages
    done = {
        "images": [to_image(image, folder) for image in images],
        "problem": problem,
        "answer": answer,
    }
    return row | done | {"precision": precision}


def to_image(image: object, folder: Path) -> Image.Image:
    """A PIL picture, bytes, a path (relative to `folder`) or {"bytes", "path"} -> RGB picture, upright.

    Transparency is laid on white, 16 bits become 8, of an animation the first frame is taken. A 32-bit picture is
    refused: nobody knows its range.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else folder / image)
        if min(image.size) == 0:
            raise ValueError("it has zero size")
        if image.mode in ("I", "F"):
            raise ValueError(f"it has 32-bit pixels (mode {image.mode}): save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (
        OSError,
        ValueError,
        TypeError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"unreadable image: {error}") from error
