"""Rows {images, problem, answer} from the embedded demo, local files or the hub, checked before the first step.

    rows = load_rows("demo", "plain/test", limit=100)
    rows = load_rows("my_data.jsonl", "train")        # columns images, problem, answer, or their common other names
    rows[0]["images"][0].size, rows[0]["problem"], rows[0]["answer"]

A row's images are PIL pictures in RGB; other columns pass through. A bad row is refused with its index and the reason,
or, with bad_rows="skip", left out, counted and named. Nothing is ever truncated.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from PIL import Image

import rewards

COLUMNS = {
    "images": ("images", "image"),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "solution", "ground_truth"),
}
DEMO_ROWS = 1_000_000  # rows that a demo split pretends to have; each is drawn when it is asked for


class Rows(Sequence):
    """A list whose items are made when they are asked for: rows[i] = make(keep[i])."""

    def __init__(self, make: Callable[[int], dict], keep: Sequence[int]):
        self.make, self.keep = make, keep

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, i: int) -> dict:
        return self.make(self.keep[i])


def load_rows(
    dataset: str,
    split: str,
    bad_rows: str = "refuse",
    limit: int | None = None,
    prompt_tokens: Callable[[dict], int] | None = None,
    max_prompt_tokens: int | None = None,
) -> Rows:
    """dataset: "demo", a .json/.jsonl/.parquet file, a folder written by save_to_disk, or a hub id; split: its split.

    prompt_tokens(row) > max_prompt_tokens: the row is filtered out, and the number of such rows is said.
    Raises ValueError for an empty set, a missing column or (bad_rows "refuse") the first bad row.
    """
    if dataset == "demo":
        from demo.task import make_row  # the demo's rows are right by construction (tests/test_demo.py)

        make_row(split, 0)  # refuses an unknown split
        return Rows(lambda i: make_row(split, i), range(min(limit or DEMO_ROWS, DEMO_ROWS)))
    table = open_table(dataset, split)
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    if len(table) == 0:
        raise ValueError(f"{dataset} ({split}) has no rows")
    names = find_columns(table.column_names)
    folder = Path(dataset).parent

    def make(i: int) -> dict:
        raw = table[i]
        row = {k: v for k, v in raw.items() if k not in names.values()}
        return row | to_row(raw[names["images"]], raw[names["problem"]], raw[names["answer"]], folder)

    keep, bad, long = [], [], []
    for i in range(len(table)):
        try:
            row = make(i)
        except (ValueError, OSError) as error:
            bad.append(f"row {i}: {error}")
            if bad_rows == "refuse":
                raise ValueError(f"{dataset} ({split}), {bad[-1]}; --bad_rows skip leaves such rows out") from error
            continue
        too_long = prompt_tokens is not None and prompt_tokens(row) > max_prompt_tokens
        (long if too_long else keep).append(i)
    if bad:
        print(f"{dataset} ({split}): skipped {len(bad)} bad rows: " + "; ".join(bad[:5]) + (" ..." if bad[5:] else ""))
    if long:
        print(f"{dataset} ({split}): left out {len(long)} rows with more than {max_prompt_tokens} prompt tokens")
    if not keep:
        raise ValueError(f"{dataset} ({split}) has no usable row: {len(bad)} are bad, {len(long)} are too long")
    return Rows(make, keep)


def open_table(dataset: str, split: str) -> datasets.Dataset:
    """The split as it is stored; images stay undecoded until a row is asked for."""
    path = Path(dataset)
    if path.suffix in (".json", ".jsonl", ".parquet") and path.exists():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            return datasets.load_dataset(kind, data_files=str(path), split="train")  # a file is one split, called so
        except ValueError as error:
            raise ValueError(f"{dataset} cannot be read or has no rows: {error}") from error
    if path.is_dir():
        saved = datasets.load_from_disk(dataset)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(saved)}")
            return saved[split]
        return saved
    return datasets.load_dataset(dataset, split=split)


def find_columns(found: list[str]) -> dict[str, str]:
    """{"images": name, "problem": name, "answer": name}: for each the first of its common names that exists."""
    names = {}
    for wanted, choices in COLUMNS.items():
        present = [name for name in choices if name in found]
        if not present:
            raise ValueError(
                f"no column for {wanted}: looked for {', '.join(choices)}, found {', '.join(sorted(found))}"
            )
        names[wanted] = present[0]
    return names


def to_row(images: object, problem: str, answer: object, folder: Path) -> dict:
    """One checked row. Raises ValueError for an unreadable image, an empty problem, an answer that cannot be parsed."""
    images = images if isinstance(images, list) else [] if images is None else [images]
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("the problem is empty")
    answer = str(answer) if answer is not None else ""
    rewards.grade("", answer)  # raises ValueError on a gold answer that cannot be parsed
    return {"images": [to_image(image, folder) for image in images], "problem": problem, "answer": answer}


def to_image(image: object, folder: Path) -> Image.Image:
    """A PIL picture, a path (relative to the data file) or {"bytes", "path"} -> RGB picture."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    if isinstance(image, str):
        image = folder / image
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        if min(picture.size) == 0:
            raise ValueError("it has zero size")
        return picture.convert("RGB")
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image: {error}") from error
