"""Rows {images, problem, answer, ...} of a data set, checked before the first step.

    rows = load_rows("demo", "plain/test", limit=100)
    rows = load_rows("my_data.jsonl")                                 # columns by common names
    rows = load_rows("demo", preset="mathvista", template="boxed")    # presets.py, from the hub
    rows[0]["images"][0].size, rows[0]["problem"], rows[0]["answer"]

images: PIL pictures in RGB. problem: a text, or messages where there are several. <image> marks
the place of a picture. Pictures without marks come first. answer: the gold answer, a text, or a
list of texts of which any is right. row: the row's number in the set, from 0. columns: the data's
own columns, for rewards and logs. Bad rows are refused with their numbers and the reasons, or left
out and counted with bad_rows="skip". Nothing is truncated.

sources.py reads files and sets, columns.py finds the fields, pictures.py decodes pictures.
"""

import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import yaml

import rewards
from runtime.columns import by_columns, by_preset, parse_columns, to_answer, to_messages
from runtime.pictures import picture_id, to_image
from runtime.presets import PRESETS, Preset
from runtime.sources import Source, first_rows, numbered_stream, one_line, open_source

__all__ = ["load_rows", "parse_columns"]  # the latter for runtime/args.py
THINK = "{problem}\nReason inside <think></think> first, then put the final answer in "
TEMPLATES = {  # a YAML file has the same keys: user and, if wanted, system
    "none": {"user": "{problem}"},
    "boxed": {"user": THINK + "\\boxed{}."},  # EasyR1's way
    "tags": {"user": THINK + "<answer></answer>."},  # R1-V's way
}
DEMO_ROWS = 1_000_000  # length of a demo split, whose rows are drawn on demand
BUFFER = 1000  # rows within which a stream is shuffled
NAMED = 3  # bad rows that a message names


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
            text = f"row {number} was usable at the start; was a file moved, changed or deleted?"
            raise ValueError(f"{text} {error}") from error

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

    def __init__(self, source: Source, check: "Check", seed: int):
        self.source, self.check = source, check
        # a row keeps its number in the set, which names it if it is bad
        self.table = numbered_stream(source).shuffle(seed=seed, buffer_size=BUFFER)
        self.next = 0
        self.rows = self._endless()

    def _endless(self) -> Iterator[dict]:
        for epoch in itertools.count():
            self.table.set_epoch(epoch)
            for number, _, row in self.check.usable(self._stored()):
                yield row | {"row": number}
            self.check.refuse_nothing_usable()

    def _stored(self) -> Iterator[tuple[int, Callable[[], dict]]]:
        for raw in self.table:
            number = raw["__index__"]
            read = self.source.read
            yield number, partial(read, number) if read else partial(dict, raw)

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

    dataset: "demo", a preset's name, a .json/.jsonl/.csv/.tsv/.parquet/.arrow file, a hub id, or a
        folder of such files, of images with metadata, or written by save_to_disk.
    preset: how to read the data set, an entry of presets.py. With "demo": the preset's own set.
    template: a key of TEMPLATES or a YAML file.
    columns: keys of COLUMNS -> names in the data. {"image": "none"}: there is no picture column.
        Unset keys: the first of their common names.
    streaming: a Stream, shuffled by `seed`. With a limit, Rows of its first `limit` rows.
    prompt_tokens(row) > max_prompt_tokens: the row is left out and counted.

    Raises ValueError for an empty set, missing columns (all are named) and bad rows (bad_rows
    "refuse": all are counted, of a stream the first one ends it).
    """
    known, dataset = find_preset(preset, dataset)
    if columns and (known or dataset == "demo"):
        raise ValueError("--columns is for your own data: the demo and presets have their columns")
    if dataset == "demo":
        return demo_rows(split or "shifted/train", limit, template)
    split = split or default_split(known, "train")
    title = f"{dataset} ({split})"
    source = open_source(dataset, split, known.config if known else None, streaming)
    if limit is not None:
        source = first_rows(source, limit)
    if source.length == 0:
        raise ValueError(f"{title} has no rows")
    convert = by_preset(known, source, title) if known else by_columns(source, columns or {}, title)
    template_name = template or (known.template if known else "none")
    template = load_template(template_name)

    def make(number: int, fields: dict) -> dict:
        return to_row(fields, template, source.folders(number))

    streaming = streaming and limit is None
    tokens = (prompt_tokens, max_prompt_tokens)
    check = Check(title, bad_rows, source, convert, make, *tokens, streaming)
    if streaming:
        return Stream(source, check, seed)
    keep, checksum = [], 0
    if template_name not in TEMPLATES:  # the text of a file may change under its name
        checksum = zlib.crc32(json.dumps(template).encode())
    stored = ((number, partial(source.read, number)) for number in range(source.length))
    for number, fields, _ in check.usable(stored):
        keep.append(number)
        checksum = zlib.crc32(row_record(fields, source.folders(number)[-1]), checksum)
    check.refuse_nothing_usable()
    return Rows(lambda i: make(i, convert(source.read(i))), keep, f"{checksum:08x}")


@dataclass
class Check:
    """Which rows can be used, and what is said about the others."""

    title: str
    bad_rows: str  # refuse | skip
    source: Source
    convert: Callable[[dict], dict]  # stored row -> fields
    make: Callable[[int, dict], dict]  # number, fields -> row
    prompt_tokens: Callable[[dict], int] | None
    max_prompt_tokens: int | None
    streaming: bool

    def start(self) -> None:
        """Count anew."""
        self.seen = self.too_long = self.longest = self.prose = 0
        self.bad, self.reasons, self.sentence = 0, [], ""

    def usable(
        self, stored: Iterable[tuple[int, Callable[[], dict]]]
    ) -> Iterator[tuple[int, dict, dict]]:
        """(number, how to read the row) -> (number, fields, row) of the good rows.

        Bad rows are refused, after all rows of a stored set are seen, or named and counted. Rows
        with too long prompts are counted.
        """
        self.start()
        for number, read in stored:
            self.seen += 1
            try:
                fields = self.convert(read())
                row = self.make(number, fields)
                length = self.prompt_tokens(row) if self.prompt_tokens else 0
            except (ValueError, OSError) as error:
                self.note(f"{self.source.place(number)}: {one_line(error, 300)}")
                continue
            if self.prompt_tokens and length > self.max_prompt_tokens:
                self.too_long += 1
                self.longest = max(self.longest, length)
                continue
            self.look_at(row)
            yield number, fields, row
        self.report()

    def note(self, text: str) -> None:
        """A bad row. Of a stream it is refused at once."""
        self.bad += 1
        if len(self.reasons) < NAMED:
            self.reasons.append(text)
        if self.bad_rows == "skip" and (self.bad <= 5 or self.bad % 100 == 0):
            say(f"{self.title}: skipped {text} ({self.bad} so far)")
        if self.bad_rows == "refuse" and self.streaming:
            text += f"; {self.seen - 1} rows came before it, a stream is checked as it is read"
            raise ValueError(f"{self.title}, {text}; --bad_rows skip leaves such rows out")

    def look_at(self, row: dict) -> None:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not row["choices"] and all(is_prose(answer) for answer in answers):
            self.prose += 1
            self.sentence = self.sentence or answers[0]

    def report(self) -> None:
        """What was found in all rows. Raises ValueError for bad rows that are to be refused."""
        if self.bad and self.bad_rows == "refuse":
            raise ValueError(
                f"{self.title}: {self.bad_text()}. Mend them, or leave them out by --bad_rows skip"
            )
        if self.bad:
            say(f"{self.title}: skipped {self.bad} bad rows of {self.seen}")
        if self.too_long and self.too_long + self.bad < self.seen:
            say(
                f"{self.title}: left out {self.too_long} of {self.seen} rows with more than "
                f"{self.max_prompt_tokens} prompt tokens (the longest has {self.longest}): "
                "--max_prompt_tokens is the limit"
            )
        if self.prose and 5 * self.prose >= self.seen:
            say(
                f"warning: {self.title}: {self.prose} of {self.seen} answers are sentences, like "
                f"{self.sentence!r:.80}. Only the same text is right then. Give short answers, or "
                "write a reward function of your own (--reward file.py:function:WEIGHT)"
            )

    def bad_text(self) -> str:
        more = f"; and {self.bad - len(self.reasons)} more" if self.bad > len(self.reasons) else ""
        reasons = "; ".join(self.reasons)
        return f"{self.bad} of {self.seen} rows cannot be used: {reasons}{more}"

    def refuse_nothing_usable(self) -> None:
        """Raises ValueError if no row is usable."""
        if self.seen == 0:
            raise ValueError(f"{self.title} has no rows")
        if self.bad + self.too_long < self.seen:
            return
        text = f"{self.title} has no usable row"
        if self.too_long:
            raise ValueError(
                f"{text}: {self.too_long} of {self.seen} rows have more than "
                f"{self.max_prompt_tokens} prompt tokens (up to {self.longest}): raise "
                "--max_prompt_tokens, or make the pictures smaller"
            )
        raise ValueError(f"{text}: {self.bad_text()}")


def say(text: str) -> None:
    """Print in the first process: all of them read the same rows."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def is_prose(answer: str) -> bool:
    """Whether a gold answer is a sentence. What marks its end result, as GSM8K's ####, is none."""
    if re.search(r"####|\\boxed|<answer>", answer):
        return False
    words = [word for word in answer.split() if re.fullmatch(r"[^\W\d_]{2,}[.,;:!?]*", word)]
    return len(words) >= 6 or len(re.findall(r"[\u3040-\u9fff]", answer)) >= 12


def row_record(fields: dict, folder: Path) -> bytes:
    """What Rows.fingerprint covers of a row before it is decoded: its texts and picture_id's."""
    pictures = [picture_id(image, folder) for image in as_list(fields["images"])]
    texts = [fields["problem"], fields["answer"], fields["choices"], fields["precision"]]
    return json.dumps([*texts, *pictures], default=str).encode()


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
    try:
        order = json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"--order {path}: there is no {Path(path).absolute()}") from error
    except ValueError as error:
        raise ValueError(f"--order {path} is no JSON: {one_line(error)}") from error
    n = len(rows)
    if (
        not isinstance(order, list)
        or not order
        or not all(isinstance(row, int) and 0 <= row < n for row in order)
    ):
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
        raise ValueError(f"unknown preset {preset!r:.80}; there are {', '.join(PRESETS)}")
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
        raise ValueError(
            "--dataset is the demo (its default), whose problems say how to answer: no template, "
            f"got {template!r:.80}. Name your own data by --dataset"
        )
    make_row(split, 0)  # refuses an unknown split
    numbers = range(min(limit or DEMO_ROWS, DEMO_ROWS))
    return Rows(lambda i: make_row(split, i), numbers, f"demo {split}")


# --------------------------------------------------------------------------- from fields to a row


def load_template(name: str) -> dict[str, str]:
    """{"user": text with {problem}, "system": text or absent}"""
    template = TEMPLATES.get(name)
    if template is None:
        if not Path(name).is_file():
            known = ", ".join(TEMPLATES)
            raise ValueError(
                f"template {name!r} is neither one of {known} nor a file: looked at "
                f"{Path(name).absolute()}"
            )
        try:
            template = yaml.safe_load(Path(name).read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"template {name} is no YAML: {one_line(error)}") from error
    keys = set(template) if isinstance(template, dict) else set()
    if not {"user"} <= keys <= {"user", "system"} or "{problem}" not in str(template["user"]):
        text = f"template {name}: needs the key user with {{problem}} in it, and may have system"
        raise ValueError(f"{text}; has {keys}")
    return template


def to_row(fields: dict, template: dict[str, str], folders: list[Path]) -> dict:
    """{images, problem, answer, choices, precision, ...} as stored -> a checked, decoded row.

    Raises ValueError for an empty problem, <image> marks that do not fit the images, a gold answer
    that cannot be graded, and an unreadable image.
    """
    messages = fill_template(fields["problem"], template)
    images = as_list(fields["images"])
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks not in (0, len(images)):
        raise ValueError(f"the problem has {marks} <image> marks for {len(images)} images")
    answer, precision = to_answer(fields["answer"]), fields["precision"]
    if precision is not None:
        if not str(precision).removesuffix(".0").isdigit():
            raise ValueError(f"precision must be a whole number of decimals, got {precision!r:.80}")
        precision = int(float(precision))
    for text in as_list(answer):
        check_gold(text, fields["choices"], precision)
        text.encode()  # ValueError: half a surrogate pair, which no tokenizer and no file takes
    for message in messages:
        message["content"].encode()
    return fields | {
        "images": [to_image(image, folders) for image in images],
        "problem": messages[0]["content"] if len(messages) == 1 else messages,
        "answer": answer,
        "precision": precision,
    }


def as_list(value: object) -> list:
    """Nothing, one or a list of them -> a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def fill_template(problem: str | list[dict], template: dict[str, str]) -> list[dict]:
    """The problem's messages, with the template's texts in the last and before the first."""
    messages, _, _ = to_messages(problem)
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
        raise ValueError(f"the answer {answer!r:.80} is none of the choices {choices!r:.200}")
