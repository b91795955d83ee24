r"""Verifiable rewards: find the answer in a completion, compare it with the gold answer, check the format.

Where the rules come from
    paper        nothing: of SaEI's reward only that it is verifiable can be known.
    second-hand  0.9 accuracy + 0.1 format, and the boxed format (NoisyRollout, EasyR1); the tags format (R1-V, VLM-R1).
    ours         the order of extraction, every rule of comparison, and a format stricter than theirs (no repeats).

What equal means: numbers by value, exactly (0.5 = 1/2 = \frac{1}{2}, 1,234 = 1234; a percent sign is dropped, so
35% = 35 and not 0.35); a lone letter in any usual wrapper ((B), B., \text{B}); anything else as text, the same after
clearing away spaces, $ and \text{}, in any case unless LaTeX commands remain. Not compared yet, because a miss costs
less than a hang or a false reward: units, mixed numbers, powers of ten, "x = 3" for 3, sets, 2\sqrt{3} = \sqrt{12}.

Symbols: N = P*G completions (P prompts, G responses each), lists of N in, lists of N floats out, with TRL's signature.
Standard library only; text from the model is never executed; time is linear in its length.

>>> completions = [r"<think>3 + 8</think> \boxed{11}", r"<think>3 + 8</think> \boxed{12}", "<answer> 11. </answer>"]
>>> accuracy_reward(completions, answer=["11", "11", "11"]), format_reward(completions)
([1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
>>> total_reward(completions, answer=["11", "11", "11"])["reward"]
[1.0, 0.1, 0.9]
"""

import re
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from numbers import Real

Completion = str | list[dict]  # plain text, or TRL's conversational list of messages

MAX_CHARS = 512  # a longer answer is no answer; below 640, the lowest limit Python lets one set on digits of an int

_BOX = re.compile(r"\\\\?(?:boxed|fbox)\s*\{")  # one backslash, or two where the model escaped it
_BRACE = re.compile(_BOX.pattern + r"|\\.|[{}]", re.DOTALL)  # \{ and \} are characters, not braces
_TAG = re.compile(r"</?(?:think|answer)>")
_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:bf|it|rm|sf)|mbox)\s*\{([^{}]*)\}")
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(rf"([+-]?)(?:\\frac{{([+-]?{_DIGITS})}}{{([+-]?{_DIGITS})}}|({_DIGITS})(?:/({_DIGITS}))?) ?%?")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[):]?")


def _last_box(text: str) -> str | None:
    """What the balanced box that opens last holds (of nested boxes: the inner one). One pass, so linear."""
    if not _BOX.search(text):
        return None
    open_braces, last = [], (-1, -1)
    for token in _BRACE.finditer(text):
        if token[0] == "}" and open_braces:
            last = max(last, (open_braces.pop(), token.start()))
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token.end() if len(token[0]) > 1 else -1)  # -1: a brace that is no box
    return text[last[0] : last[1]] if last[0] >= 0 else None


def _last_tag(text: str) -> str | None:
    """What the last closed <answer>...</answer> holds."""
    start, found = None, None
    for tag in re.finditer("</?answer>", text):
        if tag[0] == "<answer>":
            start = tag.end()
        elif start is not None:
            start, found = None, (start, tag.start())
    return text[found[0] : found[1]] if found else None


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion states, or None: the first of these that is found.

    1. after the last </think>, if there is one: the last balanced \boxed{...} or \fbox{...} (inside tags or not);
    2. after the last </think>: the last <answer>...</answer>;
    3. and 4. the same two before the last </think>.
    An empty box counts as found and is returned as "": a later answer replaces an earlier one even if it is worse.
    """
    thinking, _, tail = text.rpartition("</think>")
    for part in (tail, thinking):
        for find in (_last_box, _last_tag):
            if (answer := find(part)) is not None:
                return answer.strip()
    return None


def _normalise(text: str) -> str:
    r"""The answer without what changes only its look. A removed command leaves a space: \text{1}2 is not 12."""
    text = text.replace("\u2212", "-").replace(r"\!", "").replace("{,}", ",").replace(r"\%", "%")
    text = re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", ",", text)  # 4\,321
    text = re.sub(r"\\?\$|\\[,;: ()\[\]]|~|\\(?:q?quad|left|right)(?![a-zA-Z])", " ", text)
    while (unwrapped := _WRAPPER.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac ?([0-9])", r"\\frac{\1}", text)  # \frac12 and \frac1{2}
    text = re.sub(r"(\\frac{[^{}]*}) ?([0-9])", r"\1{\2}", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" (?=\\)| ?([-+*/=^{}()]) ?", r"\1", text)  # not at commas: "1, 234" is a pair
    text = text.strip().removeprefix("**").removesuffix("**").strip()  # Markdown bold
    return text.removesuffix(".").rstrip()


def _canonical(text: str) -> tuple[str, Fraction | str] | None:
    """An answer as (kind, value), the same for equal answers; None for an empty, over-long or undefined (1/0) one."""
    text = _normalise(text) if len(text) <= MAX_CHARS else ""
    if number := _NUMBER.fullmatch(text):
        sign, *parts = (part.replace(",", "") if part else "" for part in number.groups())
        top, bottom = Fraction(parts[0] or parts[2]), Fraction(parts[1] or parts[3] or 1)
        return ("number", (-1 if sign == "-" else 1) * top / bottom) if bottom else None
    if choice := _CHOICE.fullmatch(text):
        return "choice", (choice[1] or choice[2]).lower()
    text = re.sub(" ?, ?", ",", text)
    return ("text", text if "\\" in text else text.casefold()) if text else None


@lru_cache(maxsize=65536)
def _parse_gold(answer: str) -> tuple[str, Fraction | str]:
    """A gold answer in canonical form; ValueError where no completion could ever earn it."""
    found = extract_answer(answer)  # data sets box or tag some of their answers
    found = answer.strip() if found is None else found
    gold = _canonical(found)
    if gold is None:
        raise ValueError(f"gold answer {answer!r:.80} cannot be parsed: empty, over {MAX_CHARS} characters, or 1/0")
    if extract_answer(rf"\boxed{{{found}}}") != found:
        raise ValueError(f"gold answer {answer!r:.80} cannot be parsed: its braces or tags are not balanced")
    return gold


def grade(prediction: str | None, answer: str | Real) -> bool:
    """Whether an extracted answer (None: nothing was found) equals the gold answer; the module's header says how.

    Any prediction gets a verdict. A gold answer that cannot be parsed is an error in the data and raises ValueError,
    whatever the prediction: grade(None, answer) checks a gold answer alone.
    """
    if isinstance(answer, Real) and not isinstance(answer, bool):
        try:
            answer = str(Fraction(str(answer)))  # through str, so that 0.1 is 1/10
        except ValueError as error:
            raise ValueError(f"gold answer {type(answer).__name__} cannot be parsed: {error}") from error
    if not isinstance(answer, str):
        raise ValueError(f"gold answer {answer!r:.80} cannot be parsed: {type(answer).__name__} is no string or number")
    gold = _parse_gold(answer)
    if prediction is None:
        return False
    found = extract_answer(prediction)
    return _canonical(prediction.strip() if found is None else found) == gold


def _text(completion: Completion) -> str:
    """The text of a completion: of a conversational one, the content of its last message."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    if not isinstance(text, str):
        raise TypeError(f"a completion must be text or messages whose content is text, got {completion!r:.200}")
    return text


def accuracy_reward(completions: list[Completion], answer: list[str | Real], **columns) -> list[float]:
    """1 where the extracted answer equals the gold answer, else 0.   N, N -> N"""
    if isinstance(answer, str) or len(answer) != len(completions):
        raise ValueError(f"answer must be a list, one for each of {len(completions)} completions, got {answer!r:.80}")
    return [float(grade(extract_answer(_text(c)), a)) for c, a in zip(completions, answer, strict=True)]


def format_reward(completions: list[Completion], **columns) -> list[float]:
    r"""1 for `<think>...</think> ... \boxed{...} ...` or `<think>...</think> <answer>...</answer>`, else 0.   N -> N

    The thinking comes first; every tag comes once and in this order; after it there is one answer, not empty, in a
    box (words around it are allowed) or in tags (alone), not in both. The thinking itself may mention boxes.
    """
    return [float(_well_formed(_text(completion).strip())) for completion in completions]


def _well_formed(text: str) -> bool:
    tags, parts = _TAG.findall(text), _TAG.split(text)
    if parts[0] or tags[:2] != ["<think>", "</think>"]:
        return False
    if tags[2:] == ["<answer>", "</answer>"]:
        _, _, between, answer, after = parts
        return bool(answer.strip()) and not between.strip() and not after and not _BOX.search(answer)
    return len(tags) == 2 and len(_BOX.findall(parts[2])) == 1 and bool((_last_box(parts[2]) or "").strip())


Rewards = Mapping[str, tuple[Callable[..., list[float]], float]]
REWARDS: Rewards = {"accuracy": (accuracy_reward, 0.9), "format": (format_reward, 0.1)}  # second-hand


def total_reward(
    completions: list[Completion], answer: list[str | Real], rewards: Rewards = REWARDS, **columns
) -> dict[str, list[float]]:
    """reward_i = sum_k w_k r_k,i, with each r_k beside it under its own name.   N, N -> {name: N}"""
    parts = {name: function(completions, answer=answer, **columns) for name, (function, _) in rewards.items()}
    weights = [weight for _, weight in rewards.values()]
    totals = [sum(w * r for w, r in zip(weights, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    return {"reward": totals, **parts}


if __name__ == "__main__":  # python rewards.py "completion" "gold"
    completion, gold = sys.argv[1:]
    extracted = extract_answer(completion)
    print(f"extracted {extracted!r}, gold {gold!r}: {'right' if grade(extracted, gold) else 'wrong'}")
