"""Where rows are stored: files of text, tables of the datasets library, hub sets, streams.

    source = open_source("my_data.jsonl", "train")
    source.names, source.length, source.read(0), source.place(0)

.json, .jsonl, .csv and .tsv files are read here, value by value as they are written: the datasets
library makes dates of texts and refuses columns of two types. It reads all other formats, and is
imported for them alone: the demo and text files do not need it.
"""

import csv
import difflib
import io
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runtime.presets import PRESETS

if TYPE_CHECKING:
    import datasets

TEXT = (".json", ".jsonl", ".csv", ".tsv")
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # ending: name of the library's loader
LISTS = ("List", "LargeList")  # the library's features that hold others
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
LFS = b"version https://git-lfs"
FETCH = "is a Git LFS pointer, not the data: run git lfs pull in its folder"


class Source(NamedTuple):
    """A split as it is stored."""

    names: list[str]  # of its columns
    features: dict  # {column: the datasets library's feature}; {} of text files
    length: int | None  # None: a stream of unknown length
    read: Callable[[int], dict] | None  # the stored row i. Raises ValueError. None: a stream
    place: Callable[[int], str]  # how messages name row i
    folders: Callable[[int], list[Path]]  # where the pictures of row i are looked for, in order
    stream: "datasets.IterableDataset | None" = None


def open_source(
    dataset: str, split: str, config: str | None = None, streaming: bool = False
) -> Source:
    """A file, a folder, a set written by save_to_disk or a hub id. Pictures stay undecoded.

    Raises ValueError for what does not exist, cannot be read or has no such split.
    """
    path = Path(dataset)
    if ending(path) in (*TEXT, *TABLES) and not path.exists():
        raise ValueError(does_not_exist(path))
    if path.is_file():
        refuse_file(path)
    if path.is_file() and ending(path) in TEXT:
        return text_source([path], path.parent)
    files = text_files(path, split) if path.is_dir() else []
    if files:
        return text_source(files, path, split)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        table = saved_table(dataset, split, streaming)
    else:
        table = loaded_table(dataset, split, config, streaming)
    folder = path if path.is_dir() else path.parent
    return stream_source(table, folder) if streaming else table_source(table, folder)


def ending(path: Path) -> str:
    return path.suffix.lower()


def does_not_exist(path: Path) -> str:
    """Where it was looked for, and what is called much like it there."""
    text = f"{path} does not exist: looked at {path.absolute()}"
    parent = path.absolute().parent
    there = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"{text}; did you mean {near[0]}?" if near else text


def count_from_0(number: int) -> str:
    return f"row {number} (counted from 0)"


def one_line(error: object, limit: int = 200) -> str:
    """A message on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def refuse_file(path: Path) -> None:
    """Raises ValueError for a file that cannot hold rows: its ending, its size, its first bytes."""
    if ending(path) not in (*TEXT, *TABLES):
        endings = ", ".join((*TEXT, *TABLES))
        raise ValueError(
            f"{path}: only files ending in {endings} can be read; unpack or convert it, or give "
            "its folder"
        )
    with path.open("rb") as file:
        head = file.read(1000)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes)")
    if head.startswith(LFS):
        raise ValueError(f"{path} {FETCH}")
    if head.startswith(b"PAR1"):
        import pyarrow.parquet

        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise ValueError(f"{path} has no rows")


# ---------------------------------------------------------------------------------- files of text


def text_files(folder: Path, split: str) -> list[Path]:
    """The files of text that hold a split in a folder. []: the datasets library finds the files.

    A file belongs to a split if the split is a word of its name or its folder's name. A single file
    is the split train. A file metadata.* beside a folder of the split's name holds the split, too.
    """
    readme = folder / "README.md"
    described = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    if re.search(r"^[\s-]*data_files:", described, re.MULTILINE):
        return []  # the hub's description says which files belong to which split
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if ending(path) in TABLES and not hidden:
            return []
        if ending(path) in TEXT and path.name not in NOT_ROWS and not hidden:
            found.append(path)
    files = []
    for path in found:
        words = [*re.split(r"[\W_]+", path.stem), path.parent.name if path.parent != folder else ""]
        if split in words or (path.stem == "metadata" and (path.parent / split).is_dir()):
            files.append(path)
    if len(found) == 1 and split == "train":
        files = found
    if found and not files:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"no file of {folder} is named after the split {split!r}: {names:.200}; "
            "name a file by --dataset or another split by --split (eval.py: --splits)"
        )
    if len({ending(path) for path in files}) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files)
        raise ValueError(
            f"{folder} holds the split {split!r} in several formats: {names:.200}; "
            "name one of them by --dataset"
        )
    return files


def text_source(files: list[Path], folder: Path, split: str | None = None) -> Source:
    """The rows of files, one file after the other. A picture is looked for beside its file first.

    split: of a metadata file above the splits' folders, only the rows whose file_name is in there.
    """
    tables = []
    for path in files:
        refuse_file(path)
        table = csv_rows(path) if ending(path) in (".csv", ".tsv") else json_rows(path)
        if path.stem == "metadata" and split and (path.parent / split).is_dir():
            table = only_folder(table, split)
        tables.append(table)
    names = dict.fromkeys(itertools.chain.from_iterable(table.names for table in tables))
    starts = list(itertools.accumulate((len(table.lines) for table in tables), initial=0))

    def find(number: int) -> tuple[int, int]:
        k = next(k for k in range(len(tables)) if number < starts[k + 1])
        return k, number - starts[k]

    def read(number: int) -> dict:
        k, i = find(number)
        row = tables[k].read(i)
        if not isinstance(row, dict):
            raise ValueError(f"it is no object but {one_line(repr(row), 80)}")
        return dict.fromkeys(names) | row

    def place(number: int) -> str:
        k, i = find(number)
        line = tables[k].lines[i]
        return f"row {number} (line {line} of {files[k].name})" if line else count_from_0(number)

    def folders(number: int) -> list[Path]:
        return list(dict.fromkeys((files[find(number)[0]].parent, folder)))

    return Source(list(names), {}, starts[-1], read, place, folders)


class TextTable(NamedTuple):
    """The rows of one file."""

    names: list[str]  # of its columns
    lines: Sequence[int]  # where each row begins, counted from 1. 0: not known
    read: Callable[[int], object]  # row i. Raises ValueError


def only_folder(table: TextTable, folder: str) -> TextTable:
    """The rows whose file_name begins with the folder's name, all others left out."""
    kept = []
    for i in range(len(table.lines)):
        row = table.read(i)
        if isinstance(row, dict) and str(row.get("file_name")).startswith(f"{folder}/"):
            kept.append(i)
    return TextTable(table.names, [table.lines[i] for i in kept], lambda i: table.read(kept[i]))


def decoded(path: Path, text: bytes, line: int = 1) -> str:
    """The text of bytes that begin at `line` of the file, which have to be UTF-8."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in text[:100]:
        raise ValueError(
            f"{path} is in UTF-16 or UTF-32, not in UTF-8: save it as UTF-8, "
            f"for example by iconv -f UTF-16 -t UTF-8"
        )
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += text.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: byte 0x{text[error.start]:02x} is not UTF-8; the encoding may "
            "be Latin-1 (Windows-1252): save the file as UTF-8, for example by "
            "iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def json_rows(path: Path) -> TextTable:
    """A list of objects, {"data": such a list}, or an object per line: the content decides."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    start = decoded(path, first).lstrip()
    try:
        whole = isinstance(json.loads(start), list)
    except ValueError:  # cut, or an object of several lines
        whole = start.startswith("[") or start.rstrip() == "{"
    if not whole:
        table = json_lines(path)
        only = table.read(0) if len(table.lines) == 1 else None
        if not (isinstance(only, dict) and is_dicts(only.get("data"))):
            return table
    try:
        rows = json.loads(decoded(path, path.read_bytes()))
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not valid JSON: {error.msg}") from error
    if isinstance(rows, dict) and is_dicts(rows.get("data")):
        rows = rows["data"]
    if isinstance(rows, dict):
        keys = one_line(", ".join(rows), 100)
        raise ValueError(
            f"{path} holds one object with the keys {keys}: write a list of objects, a row each, "
            "or an object per line"
        )
    names = dict.fromkeys(itertools.chain.from_iterable(r for r in rows if isinstance(r, dict)))
    if rows and not names:
        raise ValueError(f"{path} must hold objects, a row each, not {one_line(repr(rows[0]), 80)}")
    return TextTable(list(names), [0] * len(rows), rows.__getitem__)


def json_lines(path: Path) -> TextTable:
    """An object per line, parsed when it is asked for: only the places of lines are held.

    A broken line is a bad row. Raises ValueError, which names the first one, if all are broken.
    """
    starts, numbers, names, broken = array("q"), array("q"), {}, ""
    file = path.open("rb")  # stays open: the rows of a file that is replaced are still these
    for number in itertools.count(1):
        start, line = file.tell(), file.readline()
        if not line:
            break
        if not line.strip():
            continue
        starts.append(start)
        numbers.append(number)
        text = decoded(path, line, number)
        try:
            row = parsed(text)
        except ValueError as error:
            broken = broken or f"{path}, line {number}: {error}"
            continue
        if isinstance(row, dict):
            names |= dict.fromkeys(row)
        else:
            broken = broken or f"{path}, line {number}: no object but {one_line(repr(row), 80)}"
    if broken and not names:
        raise ValueError(broken)
    state = os.fstat(file.fileno())

    def read(i: int) -> object:
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
            raise ValueError(f"{path} was changed after it was opened")
        file.seek(starts[i])
        return parsed(decoded(path, file.readline(), numbers[i]))

    return TextTable(list(names), numbers, read)


def parsed(line: str) -> object:
    """A line of JSON. Raises ValueError."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        cause = error.msg.removesuffix(" at")  # "Invalid control character at"
        raise ValueError(f"not valid JSON: {cause} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # too long a number, too deep a nesting
        raise ValueError(f"not valid JSON: {one_line(error)}") from error


def csv_rows(path: Path) -> TextTable:
    """Rows of texts. An empty cell is None. The header shows what separates the cells."""
    text = decoded(path, path.read_bytes())
    header = text.split("\n", 1)[0]
    separator = max(",", ";", "\t", key=header.count)
    csv.field_size_limit(2**31 - 1)  # a cell may hold a picture
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    rows, lines, begin = [], [], 1
    try:
        for cells in reader:
            if any(cells):
                rows.append([cell if cell.strip() else None for cell in cells])
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no valid CSV: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty: it has no header and no row")
    names, rows, lines = [(name or "").strip() for name in rows[0]], rows[1:], lines[1:]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two columns have one name: {', '.join(names):.200}")

    def read(i: int) -> dict:
        if len(rows[i]) > len(names):
            raise ValueError(
                f"it has {len(rows[i])} cells for {len(names)} columns: a text that holds "
                f'{separator!r} needs quotes ("...")'
            )
        return dict(zip(names, rows[i], strict=False))

    return TextTable(names, lines, read)


def is_dicts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# ------------------------------------------------------------------ tables of the datasets library


def saved_table(
    dataset: str, split: str, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """A set that save_to_disk wrote."""
    import datasets

    try:
        table = datasets.load_from_disk(dataset)
    except Exception as error:  # whatever is wrong with its files
        raise ValueError(f"{dataset} cannot be read: {one_line(error)}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(table)}")
        table = table[split]
    return table.to_iterable_dataset() if streaming else table


def loaded_table(
    dataset: str, split: str, config: str | None, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """A file, a folder or a hub id, read by the library. It takes relative folders for hub ids."""
    import datasets

    path = Path(dataset)
    source, files = dataset, None
    if path.is_file():  # it is a single split, which the library calls train
        source, files, split = TABLES[ending(path)], str(path.absolute()), "train"
    elif path.is_dir():
        source = str(path.absolute())
    elif not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", dataset):
        raise ValueError(does_not_exist(path))
    options = {"data_files": files, "split": split, "streaming": streaming}
    try:
        return datasets.load_dataset(source, config, **options)
    except (FileNotFoundError, ConnectionError) as error:
        if path.exists():
            endings = ", ".join((*TEXT, *TABLES))
            text = f"{dataset} holds no file that can be read ({endings})"
            raise ValueError(f"{text}: {one_line(error)}") from error
        raise ValueError(
            f"{does_not_exist(path)}; as a hub id it cannot be reached either "
            f"({one_line(error, 100)}); presets are {', '.join(PRESETS)}"
        ) from error
    except Exception as error:  # whatever is wrong with the files
        cause = error.__cause__ or error
        text = f"{dataset} ({split}) cannot be read or has no rows"
        raise ValueError(f"{text}: {one_line(cause)}") from error


def table_source(table: "datasets.Dataset", folder: Path) -> Source:
    """A cast of the table would copy all data: each row is decoded on its own."""
    features, arrow = undecoded(table.features), table.with_format("arrow")

    def read(i: int) -> dict:
        return features.decode_example(arrow[i].to_pylist()[0])

    names = list(table.column_names)
    return Source(names, dict(features), len(table), read, count_from_0, lambda _: [folder])


def stream_source(table: "datasets.IterableDataset", folder: Path) -> Source:
    if table.features:
        table = table.cast(undecoded(table.features))
    names = table.column_names or list(next(iter(table), {}))
    features = dict(table.features or {})
    return Source(names, features, None, None, count_from_0, lambda _: [folder], table)


def first_rows(source: Source, limit: int) -> Source:
    """The first `limit` rows, those of a stream held in memory."""
    if source.stream is None:
        return source._replace(length=min(limit, source.length))
    rows = list(source.stream.take(limit))
    return source._replace(length=len(rows), read=rows.__getitem__, stream=None)


def numbered_stream(source: Source) -> "datasets.IterableDataset":
    """Rows with their number __index__ in the set. Of a set that can be read: numbers alone."""
    import datasets

    if source.stream is not None:
        return source.stream.map(lambda _, i: {"__index__": i}, with_indices=True)
    return datasets.IterableDataset.from_generator(count, gen_kwargs={"n": source.length})


def count(n: int) -> Iterator[dict]:
    for i in range(n):
        yield {"__index__": i}


def undecoded(feature):
    """The feature with pictures, sounds and films as stored, {"bytes", "path"}.

    A broken picture is then a bad row. Decoded by the reader, it would end the reading.
    """
    if getattr(feature, "decode", False) is True:
        return replace(feature, decode=False)
    if type(feature).__name__ in LISTS:
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, dict):
        return type(feature)({name: undecoded(inner) for name, inner in feature.items()})
    return feature


def is_media(feature) -> bool:
    """Whether a column holds pictures, sounds, films or other bytes."""
    if type(feature).__name__ in LISTS:
        return is_media(feature.feature)
    return hasattr(feature, "decode") or "binary" in str(getattr(feature, "dtype", ""))
