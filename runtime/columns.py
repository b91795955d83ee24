"""From the columns of the data to fields: {images, problem, answer, choices, precision, columns}.

    convert = by_columns(source, {"image": "picture"}, "my_data.jsonl")  # or by_preset
    fields = convert(source.read(0))

columns holds the data's own columns by their names, as JSON has them, without pictures.
"""

import ast
import datetime
import decimal
import difflib
import math
import re
from collections.abc import Callable

import numpy as np

from runtime.presets import Preset, with_choices
from runtime.sources import Source, is_dicts, is_media, one_line

COLUMNS = {
    "image": ("images", "image", "file_name", "file_names"),
    "problem": ("problem", "question", "prompt", "conversations", "messages"),
    "answer": ("answer", "solution", "ground_truth", "reward_model.ground_truth"),
    "choices": ("choices", "options"),
}
# What a reward function gets beside the data's columns: none of these may have such a name.
TAKEN = ("completions", "completion_ids", "prompts", "truncated", "rewards")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of them


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
                f"--columns: unknown key {key!r:.80}{hint} The keys are {', '.join(COLUMNS)}"
            )


def find_columns(
    found: list[str], columns: dict[str, str], first: dict, title: str
) -> dict[str, str]:
    """{key of COLUMNS: column in the data}, as asked for or the first common name.

    A name may be of a field in a column: json.question. Choices may be missing, image where
    {"image": "none"} says so. Messages may hold the pictures and the answer themselves: first, a
    stored row, shows that. Raises ValueError that names all other missing columns.
    """
    check_keys(columns)
    names, missing = {}, []
    for key, common in COLUMNS.items():
        candidates = [columns[key]] if key in columns else common
        present = [name for name in candidates if name in found or get(first, name) is not None]
        present.sort(key=lambda name: get(first, name) in (None, [], ""))  # of two, the one in use
        if present:
            names[key] = present[0]
        else:
            missing.append((key, ", ".join(candidates)))
    problem = get(first, names.get("problem", ""))
    for key, candidates in missing.copy():
        not_needed = key == "choices" or stands_in_messages(key, problem)
        if candidates == "none" or (not_needed and key not in columns):
            missing.remove((key, candidates))
    if missing:
        looked = "; ".join(f"no column for {key} (looked for {names})" for key, names in missing)
        options = " ".join(f"{key}=NAME" for key, _ in missing)
        hint = ""
        if "image" in dict(missing):
            hint = " (image=none: text alone, or pictures within messages)"
        there = one_line(", ".join(with_fields(found, first)) or "none")
        raise ValueError(
            f"{title}: {looked}. Found: {there}. Name them by --columns {options}{hint}"
        )
    return names


def get(raw: dict, name: str) -> object:
    """The value of a column, or of a field in it: column.field. None if there is no such."""
    if name in raw:
        return raw[name]
    for part in name.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def with_fields(found: list[str], first: dict) -> list[str]:
    """The names of all columns, in place of columns of objects those of their fields."""
    names = []
    for name in sorted(found):
        value = first.get(name)
        is_object = isinstance(value, dict) and not {"bytes", "path"} & set(value)
        names += [f"{name}.{field}" for field in value] if is_object else [name]
    return names


def stands_in_messages(key: str, problem: object) -> bool:
    """Whether a row's messages hold the answer (the assistant's last turn) or the pictures."""
    try:
        _, pictures, answer = to_messages(problem)
    except ValueError:
        return False
    return bool(pictures) if key == "image" else answer is not None


def check_reward_names(found: list[str]) -> None:
    """Raises ValueError for a column that is called like an argument of the reward functions."""
    clash = sorted(set(TAKEN) & set(found))
    if clash:
        raise ValueError(f"a column must not be called {' or '.join(clash)}: rename it")


def own_columns(source: Source, images: str | None) -> list[str]:
    """The names of the columns that go to rewards and logs: all without pictures and bytes."""
    names = []
    for name in source.names:
        if name != images and not is_media(source.features.get(name)):
            names.append(name)
    return names


def by_preset(preset: Preset, source: Source, title: str) -> Callable[[dict], dict]:
    """stored row -> {images, problem, answer, choices, precision, ...} by the preset's function."""
    found = sorted(source.names)
    missing = sorted(set(preset.columns) - set(found))
    if missing:
        text = f"{title} is no copy of {preset.dataset}: it lacks {', '.join(missing)}"
        raise ValueError(f"{text} and has {one_line(', '.join(found))}")
    own = own_columns(source, None)

    def convert(raw: dict) -> dict:
        try:
            row = preset.row(raw)
        except (LookupError, TypeError, AttributeError) as error:  # another kind of value, or None
            raise ValueError(f"not as in {preset.dataset}: {error!r:.200}") from error
        return row | {"columns": {name: plain(raw[name]) for name in own}}

    return convert


def by_columns(source: Source, columns: dict[str, str], title: str) -> Callable[[dict], dict]:
    """stored row -> {images, problem, answer, choices, precision, columns} by names of columns."""
    names = find_columns(source.names, columns, first_row(source), title)
    check_reward_names(source.names)
    own = own_columns(source, names.get("image"))
    lettered = [] if columns.get("choices") or "choices" in names else letter_columns(source.names)
    features = source.features

    def convert(raw: dict) -> dict:
        fields = {
            key: as_written(get(raw, name), features.get(name)) for key, name in names.items()
        }
        messages, embedded, said = to_messages(fields["problem"])
        answer = fields.get("answer")
        if answer is None and said is None and "answer" not in names:
            raise ValueError("there is no answer: the last message is the user's")
        answer = said if answer is None else answer
        listed = [raw[name] for name in lettered] if lettered else fields.get("choices")
        choices = to_choices(listed, answer)
        messages[-1]["content"] = with_choices(messages[-1]["content"], choices)
        images = None if is_empty(fields.get("image")) else from_text(fields["image"])
        if embedded and images:
            raise ValueError("pictures stand both in the messages and in the image column")
        row = {"images": embedded or images, "problem": messages, "answer": answer}
        row |= {"choices": choices, "precision": plain(raw.get("precision"))}
        columns = {name: plain(as_written(raw[name], features.get(name))) for name in own}
        return row | {"columns": columns}

    return convert


def first_row(source: Source) -> dict:
    """A stored row, {} if it cannot be read: that is said later, with its number."""
    try:
        return source.read(0) if source.read else next(iter(source.stream), {})
    except ValueError:
        return {}


def letter_columns(found: list[str]) -> list[str]:
    """A, B, C, ...: the columns of choices as MMBench has them. []: fewer than two."""
    letters = []
    while chr(65 + len(letters)) in found and len(letters) < 26:
        letters.append(chr(65 + len(letters)))
    return letters if len(letters) > 1 else []


# ---------------------------------------------------------------------------------- single values


def plain(value: object) -> object:
    """A stored value as JSON has it: dates and decimals as texts, bytes and pictures as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return None if re.match(r"data:\w+/[\w.+-]+[;,]", value) else value  # a picture's URI
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, bytes) else as_text(value)


def as_text(value: object) -> str:
    """A date, time, decimal or other value of a table. A midnight without a zone is a date."""
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        if value.time() == datetime.time():
            return value.date().isoformat()
        return value.isoformat(" ")
    return str(value)


def as_written(value: object, feature: object) -> object:
    """A class by its name, a short float by its few digits: what the data shows."""
    if type(feature).__name__ == "ClassLabel" and isinstance(value, int):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None
    if isinstance(value, float) and getattr(feature, "dtype", "") in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))
    return value


def from_text(value: object) -> object:
    """A list that is written as a text, as in a table's cell: '["a", "b"]' -> ["a", "b"]."""
    if not (isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL)):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def is_empty(value: object) -> bool:
    """None, NaN or a text of spaces."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def to_choices(choices: object, answer: object) -> list[str] | None:
    """The options as texts. Empty ones at the end are padding and are left out.

    {"A": ..., "B": ...} is such a list, too. Raises ValueError for other values, and for an empty
    option before others if the answer may be a letter: it would name another option.
    """
    choices = from_text(choices)
    if isinstance(choices, dict) and list(choices) == letter_columns(list(choices)):
        choices = list(choices.values())
    if is_empty(choices):
        return None
    if not isinstance(choices, list):
        raise ValueError(f"choices must be a list of texts, got {choices!r:.80}")
    kept = []
    for choice in choices:
        if isinstance(choice, list | dict | bytes):
            raise ValueError(f"choices must be a list of texts, got {choices!r:.80}")
        if not is_empty(choice):
            kept.append(choice if isinstance(choice, str) else as_text(choice))
    if len(kept) > 26:
        raise ValueError(f"there are {len(kept)} choices for the letters A to Z")
    has_gap = any(is_empty(choice) for choice in choices[: len(kept)])
    if has_gap and answer not in kept:
        raise ValueError(f"an empty one of the choices stands before others: {choices!r:.80}")
    return kept or None


def to_answer(answer: object) -> str | list[str]:
    """A gold answer as a text. A list: its only element, or its elements, of which any is right.

    Raises ValueError for nothing, NaN, an infinite number, an object and bytes that are no text.
    """
    if not isinstance(answer, list | tuple):
        return answer_text(answer)
    texts = [answer_text(entry) for entry in answer if not is_empty(entry)]
    texts = list(dict.fromkeys(texts))
    if not texts:
        raise ValueError("the answer is an empty list")
    return texts[0] if len(texts) == 1 else texts


def answer_text(answer: object) -> str:
    if is_empty(answer):
        what = "empty" if answer is None or isinstance(answer, str) else "NaN"
        raise ValueError(f"the answer is {what}")
    if isinstance(answer, str):
        return answer
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, float) and math.isinf(answer):
        raise ValueError("the answer is infinite")
    if isinstance(answer, dict | list | tuple):
        raise ValueError(f"the answer must be a text, a number or a list of them: {answer!r:.80}")
    if isinstance(answer, bytes):
        try:
            return answer.decode()
        except UnicodeDecodeError as error:
            raise ValueError("the answer is bytes that are no UTF-8 text") from error
    return as_text(answer)


def to_messages(problem: object) -> tuple[list[dict], list, str | None]:
    """A text or messages -> messages of text, pictures in them, the assistant's last turn.

    A message is {role, content} or ShareGPT's {from, value}. Its content is a text or parts. A
    picture's place in the text becomes <image>. A last turn of the assistant is taken off.
    """
    if isinstance(problem, str):
        return [{"role": "user", "content": problem}], [], None
    if not problem:
        raise ValueError("the problem is empty")
    if not is_dicts(problem):
        raise ValueError(f"the problem is neither a text nor messages: {problem!r:.80}")
    messages, pictures = [], []
    for message in problem:
        role = message.get("role") or message.get("from")
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(
                f"a message is by {role!r:.80}: it must have a role (or from): system, user (human)"
                " or assistant (gpt)"
            )
        content = message.get("content")
        text, found = to_text(message.get("value") if content is None else content)
        messages.append({"role": role, "content": text})
        pictures += found
    answer = None
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("the messages must end with the user's, or with an answer to it")
    return messages, pictures, answer


def to_text(content: object) -> tuple[str, list]:
    """A message's text or parts -> text with <image> for each picture, the pictures stored there.

    A part is {type: text, text}, {type: image, image} or OpenAI's {type: image_url, image_url}.
    """
    if content is None or isinstance(content, str):
        return content or "", []
    if not is_dicts(content):
        text = "a message's content is neither a text nor a list of parts"
        raise ValueError(f"{text}: {content!r:.80}")
    text, pictures = "", []
    for part in content:
        kind = part.get("type") or ("text" if part.get("text") is not None else "image")
        if kind == "text":
            text += part.get("text") or ""
            continue
        if kind not in ("image", "image_url"):
            raise ValueError(f"a message has a part of type {kind!r:.80}, not text or image")
        picture = part.get(kind)
        if kind == "image_url" and isinstance(picture, dict):
            picture = picture.get("url")
        text += "<image>"
        if picture is not None:
            pictures.append(picture)
    return text, pictures
