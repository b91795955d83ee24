"""Rows {images, problem, answer, ...} of a data set, checked before the first step.

    rows = load_rows("demo", "plain/test", limit=100)
    rows = load_rows("my_data.jsonl")                                 # columns by common names
    rows = load_rows("demo", preset="mathvista", template="boxed")    # presets.py, from the hub
    rows[0]["images"][0].size, rows[0]["problem"], rows[0]["answer"]

images: PIL pictures in RGB. problem: a text, or messages where there are several. <image> marks
the place of a picture. Pictures without marks come first. answer: the gold answer, a text. row: the
row's number in the set. Other columns pass through to rewards and logs. A bad row is refused with
its number and the reason, or left out and counted with bad_rows="skip". Nothing is truncated.
"""

import difflib
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
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
THINK = "{problem}\nReason inside <think></think> first, then put the final answer in "
TEMPLATES = {  # a YAML file has the same keys: user and, if wanted, system
    "none": {"user": "{problem}"},
    "boxed": {"user": THINK + "\\boxed{}."},  # EasyR1's way
    "tags": {"user": THINK + "<answer></answer>."},  # R1-V's way
}
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
UNREADABLE = (OSError, TypeError, SyntaxError, EOFError, Image.DecompressionBombError)
DEMO_ROWS = 1_000_000  # length of a demo split, whose rows are drawn on demand
BUFFER = 1000  # rows within which a stream is shuffled


class Rows(Sequence):
    """The usable rows of a stored set: rows[i] = make(keep[i]) plus the column row = keep[i].

    keep: numbers of the usable rows in the set. A row is made each time it is asked for.
    """

    def __init__(self, make: Callable[[int], dict], keep: Sequence[int], checksum: str = ""):
        self.make, self.keep, self.checksum = make, keep, checksum

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, i: int) -> dict:
        number = self.keep[i]
        try:
            return self.make(number) | {"row": number}
        except ValueError as error:
            error.add_note(f"row {number} was readable at the start; was a file moved or deleted?")
            raise

    def fingerprint(self) -> str:
        """Checksum of the rows' texts and pictures as stored (row_record), in their order.

        Equal on all processes and machines. The demo's is a constant for each split.
        """
        return self.checksum


class Stream:
    """stream[i], for i that never falls: the i-th usable row of endless epochs.

    Each row is checked when it comes. The order follows from the seed, so a resumed run gets the
    same rows. It reads the stream again up to its place.
    """

    def __init__(self, table: datasets.IterableDataset, check: Callable, seed: int):
        # a row keeps its number in the set, which names it if it is bad
        table = table.map(lambda _, i: {"__index__": i}, with_indices=True)
        self.table = table.shuffle(seed=seed, buffer_size=BUFFER)
        self.check = check
        self.next = 0
        self.rows = self._endless()

    def _endless(self) -> Iterator[dict]:
        for epoch in itertools.count():
            self.table.set_epoch(epoch)
            empty = True
            for number, _, row in self.check((raw["__index__"], raw) for raw in self.table):
                empty = False
                yield row | {"row": number}
            if empty:
                raise ValueError("the streamed set has no usable row")

    def __getitem__(self, i: int) -> dict:
        if i < self.next - 1:
            raise IndexError(f"a stream goes forward only: row {i} after row {self.next - 1}")
        if i >= self.next:
            skip, self.next = i - self.next, i + 1
            self.last = next(itertools.islice(self.rows, skip, None))
        return self.last

    def fingerprint(self) -> str:
        """Always empty: what is not stored cannot be compared before it is read."""
        return ""


def load_rows(
    dataset: str = "demo",
    split: str | None = None,
    bad_rows: str = "refuse",
    limit: int | None = None,
    prompt_tokens: Callable[[dict], int] | None = None,
    max_prompt_tokens: int | None = None,
    *,
    preset: str | None = None,
    template: str | None = None,
    streaming: bool = False,
    seed: int = 0,
    columns: dict[str, str] | None = None,
) -> Rows | Stream:
    """The checked rows of a split.

    dataset: "demo", a preset's name, a .json/.jsonl/.parquet/.csv file, a hub id, or a folder of
        such files, of images with metadata, or written by save_to_disk.
    preset: how to read the data set, an entry of presets.py. With "demo": the preset's own set.
    template: a key of TEMPLATES or a YAML file.
    columns: keys of COLUMNS -> names in the data. {"image": "none"}: there is no picture column.
        Unset keys: the first of their common names.
    streaming: a Stream, shuffled by `seed`. With a limit, Rows of its first `limit` rows.
    prompt_tokens(row) > max_prompt_tokens: the row is left out and counted.

    Raises ValueError for an empty set, a missing column, or the first bad row (bad_rows "refuse").
    """
    known, dataset = find_preset(preset, dataset)
    if columns and (known or dataset == "demo"):
        raise ValueError("--columns is for your own data: the demo and presets have their columns")
    if dataset == "demo":
        return demo_rows(split or "shifted/train", limit, template)
    split = split or default_split(known, "train")
    title = f"{dataset} ({split})"
    folder = Path(dataset) if Path(dataset).is_dir() else Path(dataset).parent
    table = open_table(dataset, split, known.config if known else None, streaming)
    convert = by_preset(known, table, title) if known else by_columns(table, columns or {})
    template = load_template(template or (known.template if known else "none"))

    def make(raw: dict) -> dict:
        return to_row(convert(raw), template, folder)

    def check(raws: Iterable[tuple[int, dict]]) -> Iterator[tuple[int, dict, dict]]:
        return usable(raws, make, title, bad_rows, prompt_tokens, max_prompt_tokens)

    if streaming and limit is None:
        return Stream(table, check, seed)
    if streaming:
        table = datasets.Dataset.from_list(list(table.take(limit)), features=table.features)
    total = len(table) if limit is None else min(limit, len(table))
    if total == 0:
        raise ValueError(f"{title} has no rows")
    read = reader(table)
    keep, checksum = [], 0
    for number, raw, _ in check((i, read(i)) for i in range(total)):
        keep.append(number)
        checksum = zlib.crc32(row_record(convert(raw), folder), checksum)
    if not keep:
        raise ValueError(f"{title} has no usable row")
    return Rows(lambda number: make(read(number)), keep, f"{checksum:08x}")


def usable(
    raws: Iterable[tuple[int, dict]],
    make: Callable[[dict], dict],
    title: str,
    bad_rows: str,
    prompt_tokens: Callable[[dict], int] | None,
    max_prompt_tokens: int | None,
) -> Iterator[tuple[int, dict, dict]]:
    """(number, stored row) -> (number, stored row, row) of the good rows.

    Bad rows are refused, or named and counted. Rows with too long prompts are counted.
    """
    bad = too_long = 0
    for number, raw in raws:
        try:
            row = make(raw)
            length = prompt_tokens(row) if prompt_tokens else 0
        except (ValueError, OSError) as error:
            if bad_rows == "refuse":
                text = f"{title}, row {number}: {error}; --bad_rows skip leaves such rows out"
                raise ValueError(text) from error
            bad += 1
            if bad <= 5 or bad % 100 == 0:
                print(f"{title}: skipped row {number}: {error} ({bad} so far)")
            continue
        if prompt_tokens and length > max_prompt_tokens:
            too_long += 1
            continue
        yield number, raw, row
    if bad:
        print(f"{title}: skipped {bad} bad rows")
    if too_long:
        print(f"{title}: left out {too_long} rows with more than {max_prompt_tokens} prompt tokens")


def row_record(row: dict, folder: Path) -> bytes:
    """What Rows.fingerprint covers of a row before it is decoded: its texts and picture_id's."""
    pictures = [picture_id(image, folder) for image in as_list(row["images"])]
    texts = [row["problem"], row["answer"], row["choices"], row["precision"]]
    return json.dumps([*texts, *pictures], default=str).encode()


def picture_id(image: str | bytes | dict, folder: Path) -> str:
    """A path as text, or the length and checksum of bytes.

    The loader's absolute paths become relative to the data's folder, or file names outside of it:
    the same on another machine.
    """
    if isinstance(image, str):
        return image
    content = image if isinstance(image, bytes) else image.get("bytes")
    if content:
        return f"{len(content)} {zlib.crc32(content):08x}"
    folder = folder.absolute()
    path = folder / image["path"]
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


# -------------------------------------------------------------------------------- order and seeds


def step_rows(
    step: int, prompts_per_step: int, n: int | None, seed: int, order: list[int] | None = None
) -> list[int]:
    """The row numbers of a step, for all processes together. No batch is short.

    n rows are shuffled anew each epoch. order: these rows instead, again and again. n None: a
    stream, read as it comes. A row that comes again within a step is named row + n, row + 2n, ...
    so that it has random numbers of its own. The caller reads rows[number % n].
    """
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    if n is None:
        return list(places)
    if order:
        rows = [order[i % len(order)] for i in places]
    else:
        rows = [int(epoch_order(seed, i // n, n)[i % n]) for i in places]
    seen = Counter()
    for i, row in enumerate(rows):
        rows[i] += n * seen[row]
        seen[row] += 1
    return rows


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of n row numbers.   -> (n,)"""
    return np.random.default_rng([seed, epoch]).permutation(n)


def load_order(path: str, rows: Rows) -> list[int]:
    """The row numbers of a JSON list, as extras/curriculum.py writes it.

    Raises ValueError for other content. The file counts all rows of the set: raises ValueError too
    if one before the last usable row was left out.
    """
    order = json.loads(Path(path).read_text())
    n = len(rows)
    if not order or not all(isinstance(row, int) and 0 <= row < n for row in order):
        raise ValueError(f"{path} must be a JSON list of row numbers from 0 to {n - 1}")
    dropped = rows.keep[-1] + 1 - n
    if dropped:
        raise ValueError(f"{path} counts all rows, of which {dropped} are left out here")
    return order


def row_seeds(seed: int, step: int, rows: list[int], branch: int) -> list[int]:
    """A seed for each row from (run's seed, step, row, branch), so each draws its own numbers."""
    seeds = []
    for row in rows:
        high, low = np.random.SeedSequence((seed, step, row, branch)).generate_state(2)
        seeds.append(int(high) << 31 ^ int(low))
    return seeds


# ------------------------------------------------------------------------------------ the sources


def find_preset(preset: str | None, dataset: str) -> tuple[Preset | None, str]:
    """The preset that --preset or --dataset names, and the set to read with it.

    A file or folder called like a preset is that file or folder.
    """
    if preset is None and not Path(dataset).exists() and dataset in PRESETS:
        preset = dataset
    if preset is None:
        return None, dataset
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    known = PRESETS[preset]
    return known, known.dataset if dataset in ("demo", preset) else dataset


def default_split(preset: Preset | None, purpose: str) -> str:
    """The split for a purpose ("train" or "test") where none is named."""
    split = getattr(preset, purpose) if preset else purpose
    if split is None:
        text = f"{preset.dataset} has no split to {purpose} on"
        raise ValueError(f"{text}: name one by --split (eval.py: --splits)")
    return split


def demo_rows(split: str, limit: int | None, template: str | None) -> Rows:
    """Rows of the demo. They need no check (tests/test_demo.py)."""
    from demo.task import make_row

    if template not in (None, "none"):
        raise ValueError(f"the demo's problems say how to answer: no template, got {template!r}")
    make_row(split, 0)  # refuses an unknown split
    numbers = range(min(limit or DEMO_ROWS, DEMO_ROWS))
    return Rows(lambda i: make_row(split, i), numbers, f"demo {split}")


def open_table(
    dataset: str, split: str, config: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The split as it is stored, or a stream of it with undecoded images."""
    path = Path(dataset)
    if path.suffix in FILES and not path.exists():
        raise ValueError(f"{dataset} does not exist")
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(f"{dataset}: only files ending in {', '.join(FILES)} can be read")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        table = datasets.load_from_disk(dataset)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(table)}")
            table = table[split]
        table = table.to_iterable_dataset() if streaming else table
    else:
        table = open_by_loader(dataset, split, config, streaming)
    return table.cast(undecoded(table.features)) if streaming and table.features else table


def open_by_loader(
    dataset: str, split: str, config: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """A file, a folder or a hub id, read by the datasets library."""
    path = Path(dataset)
    if path.is_file():  # it is a single split, which the library calls train
        source, files, split = FILES[path.suffix], str(path), "train"
    else:
        source, files = dataset, json_files(path, split)
    options = {"data_files": files, "split": split, "streaming": streaming}
    try:
        return datasets.load_dataset(source, config, **options)
    except (FileNotFoundError, ConnectionError) as error:
        text = f"{dataset} cannot be found: no local file or folder, and no hub id that can be"
        presets = ", ".join(PRESETS)
        raise ValueError(f"{text} reached ({error}); presets are {presets}") from error
    except (ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{dataset} cannot be read or has no rows: {cause}") from error


def json_files(folder: Path, split: str) -> dict[str, list[str]] | None:
    """{split: its .json/.jsonl files} in a folder that may hold pictures too.

    A file belongs to a split if the split is a word of its name or its folder's name. A single file
    is the split train. None: the loader finds the files itself.
    """
    if not folder.is_dir() or list(folder.rglob("metadata.*")) or (folder / "README.md").exists():
        return None
    found = sorted(p for p in folder.rglob("*.json*") if p.suffix in (".json", ".jsonl"))
    if not found:
        return None
    if len(found) == 1 and split == "train":
        return {split: [str(found[0])]}
    files = []
    for path in found:
        if split in re.split(r"[\W_]+", path.stem) or path.parent.name == split:
            files.append(str(path))
    if not files:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"no file of {folder} is named after the split {split!r}: {names}")
    return {split: files}


def undecoded(feature):
    """The feature with images as stored, {"bytes", "path"}.

    A broken image is then a bad row. Decoded by the reader, it would end the reading.
    """
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, dict):
        return type(feature)({name: undecoded(inner) for name, inner in feature.items()})
    return feature


def reader(table: datasets.Dataset) -> Callable[[int], dict]:
    """i -> row i with undecoded images. A cast of the table would copy all data."""
    features, arrow = undecoded(table.features), table.with_format("arrow")
    return lambda i: features.decode_example(arrow[i].to_pylist()[0])


# ------------------------------------------------------------------------- from columns to fields


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """["image=picture", "problem=query"] -> {"image": "picture", "problem": "query"}

    Raises ValueError for a pair without "=", an unknown key and a key that comes twice.
    """
    columns = {}
    for pair in pairs:
        key, _, column = pair.partition("=")
        if not key or not column:
            raise ValueError(f"--columns takes pairs like image=picture, got {pair!r:.80}")
        if key in columns:
            raise ValueError(f"--columns names {key} twice: {columns[key]} and {column}")
        columns[key] = column
    check_keys(columns)
    return columns


def check_keys(columns: dict[str, str]) -> None:
    """Raises ValueError for a key that is not in COLUMNS."""
    for key in columns:
        if key not in COLUMNS:
            near = difflib.get_close_matches(key, COLUMNS, n=1)
            hint = f". Did you mean {near[0]}?" if near else "."
            raise ValueError(
                f"--columns: unknown key {key!r}{hint} The keys are {', '.join(COLUMNS)}"
            )


def find_columns(found: list[str], columns: dict[str, str]) -> dict[str, str]:
    """{key of COLUMNS: column in the data}, as asked for or the first common name.

    Only choices may be missing, and image where {"image": "none"} says so.
    """
    check_keys(columns)
    names = {}
    for key, common in COLUMNS.items():
        asked = columns.get(key)
        if asked == "none" and key in ("image", "choices"):
            continue
        candidates = [asked] if asked else common
        present = [name for name in candidates if name in found]
        if present:
            names[key] = present[0]
        elif asked or key != "choices":
            text = f"no column for {key}: looked for {', '.join(candidates)}"
            text += f", found {', '.join(sorted(found))}"
            text += f"; name it with --columns {key}=NAME"
            if key == "image":
                text += " (image=none: text alone, or pictures within messages)"
            raise ValueError(text)
    return names


def check_reward_names(found: list[str]) -> None:
    """Raises ValueError for a column that is called like an argument of the reward functions."""
    free = {"answer", "choices", "precision", "columns"}
    taken = {"completion_ids"}
    for function in (rewards.total_reward, rewards.accuracy_reward):
        taken |= set(signature(function).parameters) - free
    clash = sorted(taken & set(found))
    if clash:
        raise ValueError(f"a column must not be called {' or '.join(clash)}: rename it")


def by_preset(preset: Preset, table, title: str) -> Callable[[dict], dict]:
    """stored row -> {images, problem, answer, choices, precision, ...} by the preset's function."""
    found = sorted(table.column_names)
    missing = sorted(set(preset.columns) - set(found))
    if missing:
        text = f"{title} is no copy of {preset.dataset}: it lacks {', '.join(missing)}"
        raise ValueError(f"{text} and has {', '.join(found)}")

    def convert(raw: dict) -> dict:
        try:
            return preset.row(raw)
        except (KeyError, TypeError, AttributeError) as error:  # a value of another kind, or None
            raise ValueError(f"not as in {preset.dataset}: {error!r}") from error

    return convert


def by_columns(table, columns: dict[str, str]) -> Callable[[dict], dict]:
    """stored row -> {images, problem, answer, choices, precision, ...} by names of columns.

    All other columns stay, except further picture columns.
    """
    found = list(table.column_names)
    names = find_columns(found, columns)
    check_reward_names(found)
    features = table.features or {}
    others = []
    for name in found:
        has_pictures = undecoded(features.get(name)) != features.get(name)
        if name not in names.values() and not has_pictures:
            others.append(name)

    def convert(raw: dict) -> dict:
        fields = {key: raw[column] for key, column in names.items()}
        choices, images = fields.get("choices"), fields.get("image")
        if choices is not None and not isinstance(choices, list):
            raise ValueError(f"choices must be a list of texts, got {choices!r:.80}")
        choices = [str(choice) for choice in choices or []] or None
        messages, embedded = to_messages(fields["problem"])
        messages[-1]["content"] = with_choices(messages[-1]["content"], choices)
        if embedded and images:
            raise ValueError("pictures stand both in the messages and in the image column")
        row = {name: raw[name] for name in others}
        row |= {"images": embedded or images, "problem": messages, "answer": fields["answer"]}
        return row | {"choices": choices, "precision": raw.get("precision")}

    return convert


def to_messages(problem: object) -> tuple[list[dict], list]:
    """A text, or messages whose content is a text or parts -> messages of text, pictures in parts.

    A picture's place in the text becomes <image>.
    """
    if isinstance(problem, str):
        return [{"role": "user", "content": problem}], []
    if not problem:
        raise ValueError("the problem is empty")
    if not is_dicts(problem) or not all("role" in message for message in problem):
        raise ValueError(f"the problem is no text: {problem!r:.80}")
    messages, pictures = [], []
    for message in problem:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        if not is_dicts(parts):
            text = "a message's content is neither a text nor a list of parts"
            raise ValueError(f"{text}: {content!r:.80}")
        text = ""
        for part in parts:
            kind = part.get("type")
            if kind not in ("text", "image"):
                raise ValueError(f"a message has a part of type {kind!r}, not text or image")
            text += "<image>" if kind == "image" else part.get("text") or ""
            if kind == "image" and part.get("image") is not None:
                pictures.append(part["image"])
        messages.append({"role": message["role"], "content": text})
    last = messages[-1]["role"]
    if last != "user":
        raise ValueError(f"the prompt must end with the user's message, not with the {last}'s")
    return messages, pictures


def is_dicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# --------------------------------------------------------------------------- from fields to a row


def load_template(name: str) -> dict[str, str]:
    """{"user": text with {problem}, "system": text or absent}"""
    template = TEMPLATES.get(name)
    if template is None:
        if not Path(name).is_file():
            known = ", ".join(TEMPLATES)
            raise ValueError(f"template {name!r} is neither a file nor one of {known}")
        try:
            template = yaml.safe_load(Path(name).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"template {name} is no YAML: {error}") from error
    keys = set(template) if isinstance(template, dict) else set()
    if not {"user"} <= keys <= {"user", "system"} or "{problem}" not in str(template["user"]):
        text = f"template {name}: needs the key user with {{problem}} in it, and may have system"
        raise ValueError(f"{text}; has {keys}")
    return template


def to_row(row: dict, template: dict[str, str], folder: Path) -> dict:
    """{images, problem, answer, choices, precision, ...} as stored -> a checked, decoded row.

    Raises ValueError for an empty problem, <image> marks that do not fit the images, a gold answer
    that cannot be graded, and an unreadable image.
    """
    messages = fill_template(row["problem"], template)
    images = as_list(row["images"])
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks not in (0, len(images)):
        raise ValueError(f"the problem has {marks} <image> marks for {len(images)} images")
    answer, precision = row["answer"], row["precision"]
    if not isinstance(answer, str):
        answer = "" if answer is None else json.dumps(answer)
    if precision is not None:
        if not str(precision).removesuffix(".0").isdigit():
            raise ValueError(f"precision must be a whole number of decimals, got {precision!r:.80}")
        precision = int(precision)
    check_gold(answer, row["choices"], precision)
    return row | {
        "images": [to_image(image, folder) for image in images],
        "problem": messages[0]["content"] if len(messages) == 1 else messages,
        "answer": answer,
        "precision": precision,
    }


def as_list(images: object) -> list:
    """No image, one or a list of them -> a list."""
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def fill_template(problem: str | list[dict], template: dict[str, str]) -> list[dict]:
    """The problem's messages, with the template's texts in the last and before the first."""
    messages, _ = to_messages(problem)
    last = messages[-1]
    if not last["content"].strip():
        raise ValueError("the problem is empty")
    last["content"] = template["user"].replace("{problem}", last["content"])
    if not template.get("system"):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("the row has a system message and so has the template")
    return [{"role": "system", "content": template["system"]}, *messages]


def check_gold(answer: str, choices: list[str] | None, precision: int | None) -> None:
    """Raises ValueError for a gold answer that cannot be parsed or is none of the choices."""
    rewards.accuracy_reward([""], answer=[answer], choices=[choices], precision=[precision])
    if not choices or re.fullmatch(r"[A-Z](?: ?, ?[A-Z])+", answer):  # "A, C": several choices
        return
    letters = [chr(65 + i) for i in range(len(choices))]
    if not any(rewards.grade(letter, answer, choices, precision) for letter in letters):
        raise ValueError(f"the answer {answer!r:.80} is none of the choices {choices}")


def to_image(image: object, folder: Path) -> Image.Image:
    """A PIL picture, bytes, a path (relative to `folder`) or {"bytes", "path"} -> RGB, upright.

    Transparency is laid on white, 16 bits become 8, an animation gives its first frame. A 32-bit
    picture is refused, because its range is unknown.
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
    except (*UNREADABLE, ValueError) as error:
        raise ValueError(f"unreadable image: {error}") from error
