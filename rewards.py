r"""Verifiable rewards: find an answer, compare it with the gold answer, check the format.

Sources. Second-hand: 0.9 accuracy + 0.1 format and the boxed format (NoisyRollout, EasyR1), the
tags format (R1-V, VLM-R1), the overlong penalty (DAPO). Ours: all rules of reading and comparing.
What equal means (`grade`). Prediction and gold are parsed by the same rules.
    numbers   by value, exactly: 0.5 = \frac12, 1,234 = 1 234, 3 1/4 = 13/4, 3:4 = 3/4, 5\times10^3
              = 5000, 35% = 35 and = 0.35. Rounded only to the `precision` that the data set states.
    no sums   18-24 (18 to 24), 3 \times 2 (3 by 2), 3:45, 10.0.0.1 and A-C-B equal only themselves.
    units     may be missing on one side. Two different units differ. Nothing is converted.
    names     may be missing on one side (x = 3, x \in S). Two names differ, but y and f(x).
    choices   a letter in any usual wrapper (B, (B), B. red, option B), or the text of the option.
    lists     numbers and sets in any order, words, tuples, intervals in order. x>3 = (3, \infty).
    text      in any case unless LaTeX commands remain, without articles and final punctuation.
    the rest  by algebra where both are real: 2\sqrt{3} = \sqrt{12}, \sqrt{1/n} = 1/\sqrt{n}.
A doubtful answer is wrong: a miss costs less than a false reward.
Model text is never executed. The rules take linear time. Formulas are compared in a process of its
own, with 0.5 s of CPU time, 1.5 s of wall time and 1 GiB; beyond them the answer is wrong. A grade
takes at most 2 s, in any thread or process; the first formula starts the worker, one or two seconds
more. Needs os.fork (Linux, macOS), and math-verify for formulas.
Rewards have TRL's signature: lists of N = P*G completions (P prompts, G responses) -> N floats.
>>> completions = [r"<think>3 + 8</think> \boxed{11}", r"<think>3 + 8</think> \boxed{12}", "11"]
>>> accuracy_reward(completions, answer=["11", "11", "11"]), format_reward(completions)
([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])
>>> total_reward(completions, answer=["11", "11", "11"])["reward"]
[1.0, 0.1, 0.0]
"""

import difflib
import importlib.util
import json
import math
import os
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from numbers import Real

Completion = str | list[dict]  # plain text, or TRL's conversational list of messages
Gold = str | Real | list[str]  # a list of two or more: alternatives, each of which is right

# ------------------------------------------------------------------------------------ 1. extraction
MAX_CHARS = 512  # a longer answer is wrong; below Python's lowest limit on the digits of an int
_BOX = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|<\|begin_of_box\|>")  # or \\boxed; GLM's box
_BRACE = re.compile(r"\\.|[{}]|<\|end_of_box\|>", re.DOTALL)  # \{ and \} are characters
_TAG = re.compile(r"</?(?:think|answer)>")
_PHRASE = re.compile(r"(?i)\banswer(?: is(?: choice| option)?\b|(?=\s*[:=]))(?:\s*[:=])?[\s*]*")
_LONE_LETTER = re.compile(r"(?<![^\s(*])\(?\*{0,3}([A-Z])\*{0,3}(?:\)|(?=[.,:;!]?(?:\s|$)))")


def _last_box(text: str) -> tuple[int, int]:
    """Where the content of the box that opens last starts and ends; ends at -1 where it is cut."""
    start, depth = max((box.end() for box in _BOX.finditer(text)), default=-1), 1
    signs = {"<|end_of_box|>": -1} if text[:start].endswith(">") else {"{": 1, "}": -1}
    for brace in _BRACE.finditer(text, start) if start >= 0 else ():
        depth += signs.get(brace[0], 0)
        if depth == 0:
            return start, brace.start()
    return start, -1


def _last_prose(text: str) -> str | None:
    """The rest of the sentence after the last "answer is", else the one lone capital."""
    if phrases := list(_PHRASE.finditer(text)):
        sentence = re.match(r"(?:[^.\n]|\.(?=\S))*", text[phrases[-1].end() :])[0]
        return sentence.strip().strip("*").strip() or None
    article = re.search(r"\bA (?!or\b|and\b)[a-z]", text)
    letters = set(_LONE_LETTER.findall(text)) - {"I", "A" if article else ""}
    return letters.pop() if len(letters) == 1 else None


def extract_answer(text: str, prose: bool = False) -> str | None:
    r"""The answer that a completion states, or None.

    What the \boxed{...}, \fbox{...}, <answer>...</answer> or GLM's box holds that opens last, after
    the last </think> or else before it. None if it or a <think> is cut. With prose, where nothing
    opens: the rest of the sentence after the last "answer is", or the one lone capital.
    """
    thinking, _, tail = text.rpartition("</think>")
    if "<think>" in tail:
        return None
    for part in (tail, thinking):
        before, tag, rest = part.rpartition("<answer>")
        start, end = _last_box(part)
        if tag and max(start, end) < len(before):
            start, end = len(before + tag), part.find("</answer>", len(before))
        if start >= 0:
            cut = end < 0 or tag and "</answer>" not in rest
            return None if cut else part[start:end].strip()
    return _last_prose(tail) if prose else None


# ------------------------------------------------------------------------- 2. normal form of a text
def _by_spelling(table: dict[str, str]) -> dict[str, str]:
    return {spelling: normal for normal in table for spelling in table[normal].split(" ")}


_SYNONYMS = _by_spelling({
    r"\leq ": r"≤ <= =< \le \leqslant", r"\geq ": r"≥ >= \ge \geqslant", "<": r"\lt", ">": r"\gt",
    r"\neq ": r"≠ != \ne \not=", r"\approx ": "≈", r"\times ": "×", r"\cdot ": "· ⋅", "/": "÷ ⁄",
    r"\pm ": "±", "-": "− – — ‐ ‑ ‒ ―", r"\sqrt ": "√", r"\infty ": "∞", r"\pi ": "π", " 1/4": "¼",
    r"\alpha ": "α", r"\beta ": "β", r"\theta ": "θ", r"\frac": r"\dfrac \tfrac \cfrac",
    " 1/2": "½", " 3/4": "¾", r"\cup ": "∪", r"\cap ": "∩", r"\emptyset ": r"∅ \varnothing",
    r"\subset ": "⊂", r"\setminus ": r"\backslash", r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ",
    r"\{": r"\lbrace", r"\}": r"\rbrace", "(": r"\langle", ")": r"\rangle",
    "|": r"\vert \lvert \rvert \mid", r"\land ": r"∧ \wedge", r"\lor ": r"∨ \vee",
    r"\neg ": r"¬ \lnot", r"\to ": r"→ -> \rightarrow", r"\forall ": "∀", r"\angle ": "∠",
    r"\triangle ": "△", r"\parallel ": "∥", '"': "“ ” 「 」", "'": "‘ ’", "%": r"\%",
    r"\in ": "∈", "°": r"\degree", ",": r"、 {,} {\,}", ".": "。", "[": "【", "]": "】",
    " ": "\u00a0 ~ " + r"\quad \qquad \thinspace \, \; \: \( \) \[ \]", "": r"\bf \rm "
    r"\! \left. \right. \left \right \displaystyle \textstyle \scriptstyle \limits \large",
})  # fmt: skip
# the longest first; a command ends where its letters do
_SYNONYM = "|".join(re.escape(x) + r"(?<![a-zA-Z](?=[a-zA-Z]))" for x in sorted(_SYNONYMS)[::-1])
_REWRITES = [  # (pattern, replacement) in this order; @ stands for the end of a LaTeX command
    (r"\\[bB]igg?[lr]?@|\\(?:text)?color\{[a-z]+\}", ""),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ@)", "°"),
    (r"\\binom ?([0-9])([0-9])", r"\\binom{\1}{\2}"),
    (r"(?<![a-zA-Z\\])abs\(([^()|]*)\)", r"|\1|"),
    (r"^[ $]*(?:[Tt]he )?empty set[ $.]*$", r"\\emptyset "),
    (r"\b[Aa]ll real numbers\b", r"\\mathbb{R}"),
    (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    (r"(?<=[0-9)}a-zA-Z])\*\*(?=[-0-9({a-zA-Z])", "^"),  # Python's power
    (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)@", r"\\infty "),
    (r"(?<![a-zA-Z\\])(sqrt|pi|theta|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp)@", r"\\\1 "),
    (r"\^ ?(-?[0-9]{2,}|-[0-9a-zA-Z])", r"^{\1}"),  # x^12 and x^-1 as TeX would not read them
    (r"\\(sqrt(?:\[ ?\w+ ?\])?|vec|bar|hat) ?([0-9]+|[a-zA-Z]@)", r"\\\1{\2}"),
    (r"\{([^{}]*[^{} ]) ?\\choose@ ?([^{}]+)\}", r"\\binom{\1}{\2}"),
    (r"(?i)(:[0-5][0-9](?= ?[ap]m)|[0-9](?= ?[ap]\.m)) ?([ap])\.?m\b\.?", r"\1 \2m"),
    (r"(?i)(:[0-5][0-9](?: [ap]m)?) ?(?:-|\bto\b) ?(?=[0-9]{1,2}:[0-5][0-9])", r"\1-"),
    (r"(?<![0-9:.])0(?=[0-9]:[0-5][0-9](?![0-9:]))", ""),  # 03:45
    (r"\\frac ?([0-9]|\\pi@|[a-zA-Z](?=[a-zA-Z]?@))", r"\\frac{\1}"),  # \frac12, \frac ab
    (r"(\\frac\{[^{}]*\}) ?([0-9]|[a-zA-Z]@)", r"\1{\2}"),
]
_REWRITES = [(re.compile(old.replace("@", "(?![a-zA-Z])")), new) for old, new in _REWRITES]
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox|operatorname|bm|underline)\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}")  # fmt: skip
_GROUPS = re.compile(r"(?<![\w.,/])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/]| [0-9])")  # 2 500
_PARENTHESES = re.compile(r"(\\sqrt|\^)\s*\(((?:[^()]|\([^()]*\))*)\)")  # e^(x+1) is e^{x+1}
_LEAD = re.compile(
    r"(?i)(?:最终)?答案(?:是|为)?:? ?|(?:(?:so|thus|therefore|hence),? )?(?:(?:the|my) )?"
    r"(?:(?:correct|final|right) )?(?:answer|choice|option)(?: is|:|=)+:? ?|= ?|\\approx ?"
    r"|\\therefore ?|(?:approximately|about) (?=[0-9])")  # fmt: skip


def _normalise(text: str) -> str:
    r"""The answer without what changes only its look. A removed command leaves a space."""
    if text.isascii() and (text.isdigit() or len(text) == 1 and text.isalpha()):  # most answers
        return text
    text = unicodedata.normalize("NFC", re.sub(r"(?<!\\)\\\s*$", "", text))
    plain = lambda m: unicodedata.normalize("NFKC", m[0])  # noqa: E731
    text = re.sub("[！-～￠-￦　]", plain, text)  # full-width
    text = re.sub("[²³¹⁰-⁻]+|([₀-₉]+)", lambda m: f"{'_' if m[1] else '^'}{{{plain(m)}}}", text)
    text = re.sub(r"(?<=[0-9°%]) ?[~〜] ?(?=[0-9])", "-", text)  # a range; in TeX ~ is a space
    if r"\begin" in text:  # two backslashes end a row of a matrix
        text = re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\cr ", text)
    text = text.replace("\\\\", "\\").replace("\\ ", " ")  # elsewhere a model escapes its backslash
    text = re.sub(_SYNONYM, lambda spelling: _SYNONYMS[spelling[0]], text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    before = None
    while text != before:
        before, text = text, _WRAPPER.sub(r" \1 ", _PARENTHESES.sub(r"\1{\2}", text))
    text = re.sub(r"(?<!\\)\$([^$]*)\$", r" \1 ", text)  # formulas, then money
    text = re.sub(r"\s+", " ", text.replace(r"\$", "$"))
    text = _GROUPS.sub(lambda groups: groups[0].replace(" ", ""), text)
    # no spaces at signs, but at commas: "1, 234" is a pair
    text = re.sub(r" (?=\\)| ?([-+*/=^_{()<>|]) ?| ?(\}) ?(?![a-zA-Z ])| (?=\})", r"\1\2", text)
    text = text.strip().removeprefix("**").removesuffix("**").strip()  # Markdown bold
    text = re.sub(r"""^(["'`])(.*)\1\.?$""", r"\2", text).removesuffix(".").rstrip()
    return _LEAD.sub("", text, count=1).strip() if _LEAD.match(text) else text


def _outside(text: str) -> str:
    """The text with all that stands inside of brackets blanked out: (1,2),3 -> (000),3"""
    pieces, depth = [], 0
    for token in re.findall(r"\\?[(\[{]|\\?[)\]}]|[^()\[\]{}\\]+|\\", text):
        depth -= token[-1] in ")]}"
        pieces.append("\0" * len(token) if depth else token)
        depth += token[-1] in "([{"
    return "".join(pieces)


def _split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """The pieces of a text and the separators between them, those inside of brackets left out."""
    pieces, separators, start = [], [], 0
    for match in re.finditer(separator, _outside(text)):
        pieces.append(text[start : match.start()].strip())
        separators.append(match[0].strip())
        start = match.end()
    return [*pieces, text[start:].strip()], separators


# --------------------------------------------------------------------------------------- 3. parsing
_DIGITS = (
    r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?")  # fmt: skip
_NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>(?:[$€£¥] ?)?)(?:"
    rf"(?:(?P<whole>[0-9]+) )?(?P<top>[+-]?{_DIGITS})/(?P<bottom>[+-]?{_DIGITS})(?![0-9/])"
    r"|(?P<fixed>[0-9]*\.[0-9]*)\\(?:overline|bar){(?P<repeated>[0-9]+)}"  # 0.1\overline{6}
    rf"|(?P<decimal>{_DIGITS})"
    r"(?: ?(?:\\times|\\cdot|\*|x) ?10\^\{?(?P<power>[+-]?[0-9]{1,3})(?![0-9])\}?)?)"
    r"(?: ?(?P<scale>hundred|thousand|million|billion|trillion)\b)?")  # fmt: skip
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNITS = _by_spelling({
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre",
    "m": "meter metre", "in": "inch", "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram gm",
    "kg": "kilogram kilo", "mg": "milligram", "lb": "pound", "oz": "ounce", "s": "second sec",
    "min": "minute", "h": "hour hr", "year": "yr", "l": "liter litre", "°": "degree deg",
    "ml": "milliliter millilitre", "rad": "radian", "c": "celsius", "f": "fahrenheit",
    "k": "kelvin", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "a": "ampere amp",
    "pa": "pascal", "hz": "hertz", "mol": "mole", "%": "percent pct", "cent": "¢", "/": "per",
    "$": "dollar usd", "€": "euro eur", "£": "gbp", "¥": "yen", "": "unit",
})  # fmt: skip
_UNITS |= {unit: unit for unit in _UNITS.values() if unit}
_NO_UNITS = re.compile(  # words that make of "11 ..." something else than 11 of a kind
    "is|isnt|are|was|were|be|not|no|nope|never|or|and|the|an?|to|than|then|but|if|of|off|at|by|with"
    "|without|for|from|on|when|where|unless|instead|except|about|exactly|least|most|any|all|none"
    "|maybe|perhaps|possibly|only|wrong|false|true|incorrect|versus|vs|alternatively|more|less|other"
    "|plus|minus|negative|below|under|times|twice|divided|over|mod|modulo|choose|squared|cubed"
    "|factorial|base|binary|power|root|sqrt|log|hal(?:f|ves)|thirds?|quarters?|dozens?|pairs?|scores?"
    "|tens|actually|wait|oops|sorry|hm+|impossible|untrue|rejected|withdrawn|cancell?ed|(?:doubl"
    "|tripl|halv)ed|repeating|recurring|hex(?:adecimal)?|octal|something|ish|.*wards|permille|one"
    "|twos?|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundreds?|thousands?|.*teen"
    "|.*[nrfxy]ty|.*(?<!mon)ths?|.*illion(?:s|en)?|through|thru|until|lakhs?|crores?|[mb]n"
    "|mil(?:l[ei]|lones)?|tausend|(?:тыс|мл[нр]).*|[十百万亿半分].*|千(?!克).*")  # fmt: skip
_MATRIX = re.compile(r"(?s)\\begin\{((?:[pbB]|small)?matrix|array)\}(?:\{[^}]*\})?(.*)\\end\{\1\}")
_FACTOR = (r"(?:(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])|\\(?:[lg]am(?:bd|m)a|alpha|beta|delta|mu|pi|rho"
           r"|omega|phi|sigma|tau|theta)(?![a-z]))(?:'|_\w|_\{[^{}]*\}|\([^()]*\))*")  # fmt: skip
_NAME = re.compile(  # x_1, f(x), area, \angle ABC; (x, y); A^{-1}, f^{-1}(x); no expression
    r"(?!.*(?:\\(?:sqrt|(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|lg|exp|frac(?!\{d)|cdot|times"
    r"|div|ast|star|circ|bullet|b?mod|choose|binom|sum|prod|int|lim|[lr]floor|[lr]ceil|not|pm)(?![a-z])"
    r"|[!%]|\bnot?\b|n't|\b(?:than|plus|minus|times|divided)\b|: ?[0-9]|\) ?\("
    rf"|{_FACTOR} ?{_FACTOR})|(?:[a-z]{{2}}|abcd?|xyz|pqr|\|[a-z](?:_\{{?\w+\}}?)?\|)$)"
    r"(?=.*[a-zA-Z])[^-+*/^=<>,;0-9{][^-+*/^=<>,;]*"
    r"|\([a-z](?:, ?[a-z])+\)|[A-Z]\^(?:T|{-1})|[a-zA-Z]\^\{-1\}\([^()]*\)")  # fmt: skip
_SPANS = [(":", r" ?(?::|\\colon)"), ("x", r" ?\\times| ?[xX](?= ?[0-9])|\bby\b"),  # no arithmetic
          ("-", r"(?<=[\w.%°$)} ])-{1,3}|\b(?:to|through|thru)\b")]  # fmt: skip
_VERBATIM = re.compile(  # dates, versions, times, orders, B2B; what algebra would misread
    r"[0-9]([-/])[0-9]+\1[0-9]|[0-9]\.[0-9]+\.[0-9]|[0-9]:[0-9]{2} ?[aApP]\.?[mM]|phantom"
    r"|^[0-9]{1,2}(?: ?: ?[0-5][0-9]){1,2}$|^(?:(?:[A-Za-z]-){2,}|(?:[0-9A-Z]+-){2,}[0-9A-Z]*)\w$"
    r"|\{ ?\}[0-9a-zA-Z(]|%(?!-| to).|ldots|==|__|[a-zA-Z]\.[a-zA-Z]|^[a-zA-Z]+[0-9]+[a-zA-Z]"
    r"|^0[0-9]+-|-0[0-9]")  # fmt: skip
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")  # not of a command
_WORD = re.compile(r"(?<!\\)(?<![^\W\d_])[^\W\d_]{3,}")
_VARIABLE = re.compile(r"[a-df-zA-Z]|\\(?!infty|pi)[a-zA-Z]+")


@dataclass(frozen=True)
class Parsed:
    """An answer as the comparison sees it."""

    kind: str  # number choice text list tuple interval set union matrix named formula
    value: object  # Fraction, str, or a tuple of Parsed (matrix: of rows; named: all equal values)
    raw: str = field(compare=False)  # the normal text (of a formula without its unit), for algebra
    note: str = ""  # the unit; the brackets; the name; of a list: "or"


def _unit(text: str) -> str | None:
    """Normal form of the unit after a number (apples, square cm). None where it is not a unit."""
    text = re.sub(r"[{}]", "", text.replace(r"\cdot", " ").lower())
    power = lambda x: f"{x[2]}^{3 if x[1] else 2}"  # noqa: E731 - square cm, cu cm
    text = re.sub(r"\b(?:sq(?:uare)?|(cu(?:bic)?)) ([^\W\d_]+)", power, text)
    words = re.findall(r"([^\W\d_]+|[^\s.]|\.\.)(\^-?[1-3])?", text)  # 0.3.. has no unit
    unit, unknown = [], 0
    for word, power in words:
        names = [word, word.removesuffix("s"), word.removesuffix("es")]
        known = [_UNITS[name] for name in names if name in _UNITS]
        if _NO_UNITS.fullmatch(word) or not known and not (len(word) > 1 and word.isalpha()):
            return None  # a word of another meaning, a variable, a digit, a sign
        unit.append((known[0] if known else names[1]) + power)
        unknown += not known
    if len(words) > 5 or unknown > 2 or "/" in unit[:1] + unit[-1:]:
        return None
    return re.sub("° ([cf])$", r"\1", " ".join(filter(None, unit)))


def _number(text: str) -> Parsed | None:
    """A number with an optional unit or percent sign. None for anything else, and for x/0."""
    plain = re.sub(rf"\\frac\{{([+-]?{_DIGITS})\}}\{{([+-]?{_DIGITS})\}}", r" \1/\2 ", text).strip()
    if not (match := _NUMBER.match(plain)):
        return None
    rest = plain[match.end() :]
    part = {name: (value or "").replace(",", "") for name, value in match.groupdict().items()}
    power = int(part["power"] or 0) + _SCALES.get(part["scale"], 0)
    unit = _unit(rest)
    if unit is None or part["money"] and unit or re.match(r"[a-zA-Z](?![a-zA-Z])", rest):
        return None  # 5m is a product
    top, bottom = part["top"] or part["decimal"], part["bottom"] or "1"
    if part["repeated"]:  # 0.1\overline{6} = (16 - 1) / 90
        digits, decimals = part["fixed"].replace(".", ""), part["fixed"].partition(".")[2]
        top = int(digits + part["repeated"]) - int(digits or 0)
        bottom = "9" * len(part["repeated"]) + "0" * len(decimals)
    if not Fraction(bottom):
        return None
    value = Fraction(top) / Fraction(bottom)
    if part["whole"] and not 0 < value < 1:  # 2\frac{3}{2} is a product
        return None
    value = (value + int(part["whole"] or 0)) * Fraction(10) ** power
    value *= -1 if part["sign"] == "-" else 1
    return Parsed("number", value, text, part["money"].strip() or unit)


@lru_cache(maxsize=4096)
def parse(text: str) -> Parsed | None:
    """An answer (what stands in the box). None for an empty, over-long or undefined (1/0) one."""
    return _parse(_normalise(text), 0) if len(text) <= MAX_CHARS else None


def _parse(text: str, depth: int) -> Parsed | None:
    text = text.strip()
    if not text or re.fullmatch(r"[+-]?(?:\\frac{[^{}]*}{[+-]?0+}|[0-9.,]+/0+) ?%?", text):
        return None
    if number := _number(text):
        return number
    if choice := re.fullmatch(r"\(([A-Za-z])\)|([A-Za-z])[):.]?", text):
        letter = choice[1] or choice[2]
        return Parsed("choice", letter.lower(), letter)
    plain_text = Parsed("text", _plain(text) or text, text)
    if depth > 8 or _VERBATIM.search(text):
        return plain_text
    for reader in (_span, _matrix, _list, _brackets, _relation):
        if parsed := reader(text, depth + 1):
            return parsed
    pieces, separators = _split(text, r"\\cup(?![a-zA-Z])")
    if separators and (union := _collection("union", pieces, text, depth + 1)):
        return union
    measure = re.fullmatch(r"(?s)(?!.*\\(?:sin|cos|tan|cot))(.*(?:[0-9})]|\\pi))( .*|°|%)", text)
    unit = _unit(measure[2]) if measure and not _WORD.search(measure[1]) else None
    if unit is not None and (len(unit) != 1 or unit in "°%"):  # 25\pi square cm
        return Parsed("formula", measure[1], measure[1], unit)
    if _WORD.search(text) or not re.search(r"[0-9+*/^_=<>\\|-]|\w!", text, re.A):
        return plain_text
    return Parsed("formula", text, text)


def _span(text: str, depth: int) -> Parsed | None:
    r"""18-24, 18 to 24 cm, 3 \times 2, 3:45 are texts. 3:4 is the number 3/4, 2:4:6 is 1:2:3."""
    text = re.sub(r"^(?i:between) (.*?) and ", r"\1 to ", text).removeprefix("from ")
    for sign, separator in _SPANS:
        numbers = [_number(part.strip()) for part in re.split(separator, text)]
        if len(numbers) == 1 or None in numbers:
            continue
        values, units = [x.value for x in numbers], [x.note for x in numbers if x.note]
        if sign != ":" or 0 in values:  # 5 cm to 10 m has the unit "cm m"
            return Parsed("text", sign.join(map(str, values)), text, " ".join(dict.fromkeys(units)))
        if len(values) == 2:
            return Parsed("number", values[0] / values[1], text)
        items = tuple(Parsed("number", value / values[0], text) for value in values)
        return Parsed("tuple", items, text, ":")
    return None


def _plain(text: str) -> str:
    """Text as it is compared: any case unless LaTeX commands remain, no articles, no final dot."""
    text = re.sub(r"\{([a-zA-Z]+)\}", r" \1", re.sub(" ?, ?", ",", text)).strip(" .!?;:")
    if "\\" in text:
        return text
    text = re.sub(r"\b([ap])\.m\b", r"\1m", text.casefold())
    text = re.sub(r"\b(?:the|an?) (?=\w)", "", text)
    return re.sub(r"(?<=[^\W\d])-(?=[^\W\d])|\s+", " ", text)


def _collection(kind: str, texts: Sequence[str], raw: str, depth: int, note="") -> Parsed | None:
    """A collection of the parsed texts; None where one cannot be parsed."""
    items = [_parse(text, depth) for text in texts]
    if None in items:
        return None
    if len({item.note for item in items if item.kind == "named"}) > 1:  # y = 2, x = 1
        items.sort(key=lambda item: item.note)
    return Parsed(kind, tuple(items), raw, note)


def _matrix(text: str, depth: int) -> Parsed | None:
    if not (match := _MATRIX.fullmatch(text)) or r"\begin" in match[2]:
        return None
    rows = [row.split("&") for row in match[2].split(r"\cr") if row.strip()]
    rows = [_collection("tuple", row, text, depth) for row in rows]
    return None if None in rows else Parsed("matrix", tuple(rows), text)


def _list(text: str, depth: int) -> Parsed | None:
    r"""a, b; c or d at the top level, and a \pm b, which is the list of both."""
    items, separators = _split(text, r"[,;]? ?\b(?:or|and)\b|[,;]")
    if not separators and text.count(r"\pm") == 1 and not re.search("[=<>]", text):
        items = [re.sub(r"\\pm ?", sign, text).removeprefix("+") for sign in "+-"]
        separators = ["or"]
    note = "or" * any(x.endswith("or") for x in separators)
    return _collection("list", items, text, depth, note) if separators else None


def _brackets(text: str, depth: int) -> Parsed | None:
    """Tuples, intervals as tuples, sets, {x | x > 3}, and brackets that only group."""
    if not (outer := re.fullmatch(r"(\\?)([(\[{])\0*\\?([)\]}])", _outside(text))):
        return None
    brackets = outer[2] + outer[3]
    braces = brackets == "{}"
    inside = text[outer.end(2) : -1].removesuffix("\\").strip()
    if braces and (builder := re.fullmatch(r"(\w+)(?:\\in\\mathbb{R})? ?[|:](.*)", inside)):
        inner = _parse(builder[2], depth)
        return inner if inner and inner.kind == "named" and inner.note == builder[1] else None
    inner = _list(inside, depth) or _parse(inside, depth)  # (4,321) is a pair
    if inner is None:
        return Parsed("set", (), text) if braces and not inside else None
    items = inner.value if inner.kind == "list" else (inner,)
    if braces and (outer[1] or inner.kind == "list"):
        return Parsed("set", tuple(dict.fromkeys(items)), text)  # without repeats
    if inner.kind == "list" or brackets == "[]" and inner.kind != "matrix":
        return Parsed("tuple", items, text, brackets)
    return inner if brackets in ("()", "[]", "{}") else None


def _relation(text: str, depth: int) -> Parsed | None:
    r"""name = value (= value), x \in S, 1 < x < 2: "named". (x,y) = (1,2): a tuple of these."""
    text = re.sub(r"^([A-Z]'?)(\(.*,.*\))$", r"\1=\2", text)  # the point A(2,3)
    sides, signs = _split(text, r"\\(?:leq|geq|neq|in|approx)(?![a-zA-Z])|[=<>]")
    if not signs or not all(sides):
        return None
    if set(signs) <= {"=", r"\in", r"\approx"}:
        return _equation(text, sides, depth)
    if signs[0] in (">", r"\geq"):  # read it from the small side
        sides = sides[::-1]
        signs = [{">": "<", r"\geq": r"\leq"}.get(sign, "") for sign in reversed(signs)]
    if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    elif len(sides) == 2:
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    variables = [bool(_VARIABLE.fullmatch(side)) for side in sides]
    if variables != [False, True, False] or not set(signs) <= {"<", r"\leq"}:
        return Parsed("text" if len(sides) > 3 else "formula", text, text)
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    interval = _collection("interval", sides[::2], text, depth, brackets)
    return Parsed("named", (interval,), text, sides[1]) if interval else None


def _equation(text: str, sides: list[str], depth: int) -> Parsed | None:
    if not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[-1]):
        sides.reverse()
    name = _name(sides[0]) if _NAME.fullmatch(sides[0]) else ""
    if not name and _LETTER.search(sides[0]):
        return Parsed("formula", text, text)
    values = _collection("named", sides[bool(name) :], text, depth, name)
    names, last = sides[0].strip("()").split(","), values and values.value[-1]
    if not last or last.note != "()" or not 1 < len(names) == len(last.value):
        return values
    items = [Parsed("named", (x,), text, _name(n)) for n, x in zip(names, last.value, strict=True)]
    return Parsed("tuple", tuple(items), text, "()")


def _name(text: str) -> str:
    r"""A name as it is compared: no spaces, no article, no case; m\angle A is \angle A."""
    decoration = r"^(?:the|an?) |^m(?=\\angle)|\\over(?:line|rightarrow)|\\(?=[a-z]+$)|[\s{}]"
    text = re.sub(decoration, "", text, flags=re.I)
    return text.casefold() if len(text) > 1 else text


# ------------------------------------------------------------------------------------ 4. comparison
_LABEL = re.compile(
    r"\(([A-Za-z])\)|([A-Za-z])(?:$| ?[):]| ?\.(?![\w.])|(?=,? ?because )"
    r"|(?<=[A-Z]),(?= ?(?:an? |the )?(?:[A-Z]?[a-z]{2}|[^ -~])))")  # fmt: skip
_CAPITAL = re.compile(  # a letter of its own: not A cat, I am, A+1
    r"(?<![a-zA-Z0-9_\\'+*/^=<>-])(?!A (?!is\b)[a-z]|I [a-z])([A-Z])"
    r"(?![a-zA-Z0-9_']| ?[-+*/^=<>])")  # fmt: skip
_CUE = re.compile(  # what stands before a letter, \0, or after it, where it names an option
    r"(?i:option|choice|answer|choose|pick|select|with|is|be|figure|graph|image|point|statement)\W*\0"
    r"|[选项是为择]\W*\0|\0项|\0\W*(is|matches)( the| only)* (right|correct|answer)")  # fmt: skip
_NOT = (r"(?i)\b(?:not?|never|wrong|false|incorrect|except|n?either|n?or|unless|but|if|rather|than"
        r"|besides|instead|(?:reject|eliminat|exclud|discard)\w*)\b|n't|[不错非]|排除")  # fmt: skip
_MISREAD = re.compile(  # by math-verify, or by us: (2)3, 5!!, and x2, e4 where no command ends so
    r"(?<![_0-9])[0-9]+ [0-9]|[$'\":@#?~`;]|[^ -~°]|°[A-Z]|<>|!!|\\(?:equiv|cong|not|pmod)|\)[0-9]"
    r"|(?<![a-zA-Z\\])[a-zA-Z]{1,2}[0-9]|\^\{?T")  # fmt: skip
_SECOND_THOUGHT = re.compile(  # after "yes": it does not stand alone
    r"(?:[,.;:!(] ?|\b(?:but|or|and) )(?:yes|no|not)\b|\b(?:yes|no)\W*$"
    r"|\b(?:maybe|mean|unless|false|true|wrong|incorrect)\b")  # fmt: skip


class NeedsAlgebra(Exception): ...  # the rules cannot decide a comparison


def _option(text: str, choices: Sequence[str] = ()) -> tuple[str, str] | None:
    """(letter, the words after it) of an answer that names one option: B, (B), option B: red."""
    text = re.sub(r"\*\*|\\displaystyle\b", "", text)
    text = re.sub(r"^(\W*[A-J]\)?) +\(", r"\1: (", text)  # B (red)
    behind = "" if choices else r"(?=(?:an? |the )?[^\W\d_]{3})"
    text = _normalise(re.sub(rf"^(\W*[A-Z]\W*) +[-–—] +{behind}", r"\1: ", text))
    text = re.sub(r"(?i:^(?:option|choice|answer) ?(?=[A-Z(\[]))", "", text)
    text = re.sub(r"^\[([A-Z])\]", r"(\1)", text)
    if label := _LABEL.match(text):
        letter, rest = label[1] or label[2], text[label.end() :]
        product = r"[-+*/^_=<>!(|]" + r"|\\" * letter.islower()
        if label[1] and not choices and re.match(product, rest):
            return None
        others, words = _CAPITAL.findall(rest), rest.strip(" -–:.,")
        if words in choices:
            return letter.lower(), words
        if re.fullmatch(r"(?:\W*[a-z]\b)+\W*", words):  # B: a, c
            others += re.findall("[a-z]", words)
        return None if {x.lower() for x in others} - {letter.lower()} else (letter.lower(), words)
    capitals = list(_CAPITAL.finditer(text))
    if len({x[0] for x in capitals}) != 1 or re.search(_NOT, text):
        return None
    marked = f"{text[: capitals[0].start()]}\0{text[capitals[0].end() :]}"
    return (capitals[0][0].lower(), "") if _CUE.search(marked) else None


def _yes_or_no(text: str) -> str | None:
    """ "yes" for "Yes, there are no gaps.", None for "yes or no" and "yes, but no"."""
    answer = re.match(r"(yes|no)(?:$|(?=[,.;:!]))(.*)", _normalise(text).casefold(), re.S)
    return answer[1] if answer and not _SECOND_THOUGHT.search(answer[2]) else None


@dataclass(frozen=True)
class Comparison:
    """Whether two parsed answers are equal, by the rules of the module's header."""

    precision: int | None = None  # the decimals that the data set states
    algebra: Callable[[str, str, int | None], bool] | None = None  # _sympy_equal, in the worker

    def right(self, prediction: str, gold: str, choices: Sequence[str]) -> bool:
        """The verdict on an answer. Unbounded in time where the algebra is."""
        prediction = prediction.replace(" to ", ":") if gold.count(":") == 1 else prediction
        found, wanted, wanted_option = parse(prediction), parse(gold), None
        if all(re.match(rf"\(?{chr(65 + i)}[.):]", text) for i, text in enumerate(choices)):
            choices = [re.sub(r"^\(?[A-Z][.):]+ ?", "", text) for text in choices]  # A. red
        if choices and (index := self.chosen(gold, choices)) is not None:
            return self.chosen(prediction, choices) == index
        if wanted.kind == "choice" or re.match(r"(?i:option |choice )|\(?[A-Z][).:]", gold):
            wanted_option = _option(gold)
        letter, words = wanted_option or ("", "")  # the gold is a letter, or "B. red"
        if letter and (option := _option(prediction)):
            same_words = not option[1] or not words or parse(option[1]) == parse(words)
            return option[0] == letter and same_words
        wanted = parse(words) if words else wanted
        if found is None or wanted is None:
            return False
        if answer := _yes_or_no(gold):
            return _yes_or_no(prediction) == answer
        return self.same(found, wanted)

    def chosen(self, text: str, choices: Sequence[str]) -> int | None:
        """Which option an answer names: by its exact text, its letter, or a value of it alone."""
        normal = [_normalise(x) for x in (text, *choices)]
        if normal[0] and normal[0] in normal[1:]:
            return normal.index(normal[0], 1) - 1
        options, found = [parse(choice) for choice in choices], parse(text)
        if option := _option(text, choices):
            index, words = ord(option[0]) - ord("a"), parse(option[1])
            named = {i for i, x in enumerate(options) if x and x == words}
            for i, x in enumerate(options if not named else ()):  # B. red or blue
                pattern = rf"\b{re.escape(x.value)}\b" if x and x.kind == "text" else "$."
                named |= {i for _ in re.finditer(pattern, _plain(option[1]))}
            return index if index < len(options) and named <= {index} else None
        if (answer := parse(_yes_or_no(text) or "")) and answer in options:
            found = answer
        equal = [i for i, x in enumerate(options) if found and x == found]
        equal = equal or [i for i, x in enumerate(options) if found and x and self.same(found, x)]
        return equal[0] if len(equal) == 1 else None

    def same(self, a: Parsed, b: Parsed) -> bool:
        if a == b:
            return True
        if b.kind == "named" or b.kind == "set" and a.kind != "named":
            a, b = b, a
        kinds = {a.kind, b.kind}
        if a.kind == "named":
            return self.same_named(a, b)
        if kinds == {"text"} and a.value == b.value and not (a.note and b.note):
            return True
        single = a.kind == "set" and len(a.value) == 1 and "empty" not in b.raw
        if single and b.kind in ("number", "formula", "tuple"):
            return self.same(a.value[0], b)
        if kinds == {"number"}:
            return self.same_number(a, b)
        if kinds <= {"list", "tuple", "interval", "set", "union"} or kinds == {"matrix"}:
            return self.same_collection(a, b)
        return self.same_formula(a, b)

    def same_number(self, a: Parsed, b: Parsed) -> bool:
        """By value. Of different units none. p% is p and p/100."""
        x, y = a.value, b.value
        if a.note and b.note and a.note != b.note:
            return False
        if a.note != b.note and (a.note == "%" and x == 100 * y or b.note == "%" and y == 100 * x):
            return True
        if self.precision is None or x == y:
            return x == y
        rounded = {round(x, int(self.precision)), round(y, int(self.precision))}
        return len(rounded) == 1 and (rounded != {0} or 0 in (x, y))  # of tiny numbers none

    def same_named(self, a: Parsed, b: Parsed) -> bool:
        """name = value against a value, another named value or an equation."""
        signs = r"[=<>]|\\(?:[lg]eq|neq|in)(?![a-zA-Z])"
        equation = b.kind == "formula" and re.search(signs, b.raw)
        if equation or a.value[-1].kind == "interval" and b.kind == "union":
            return self.same_by_algebra(a.raw, b.raw)
        if b.kind != "named":  # equal to all that is said to be equal: of 2 + 3 = 5 to both
            steps = [value for value in a.value[:-1] if not _LETTER.search(value.raw)]
            steps = [replace(x, kind="formula") if x.kind == "text" else x for x in steps]
            return all(self.same(value, b) for value in [*steps, a.value[-1]])
        graph = "y" in (a.note, b.note) and re.search(r"[a-z]\([a-z]\)", a.note + b.note)
        if a.note == b.note or not a.note or not b.note or graph:  # y = x^2 is g(x) = x^2
            return all(self.same(x, y) for x in a.value for y in b.value)
        formulas = any(x.kind in ("formula", "choice") for x in a.value + b.value)  # y=2x, x=y/2
        return formulas and "(" not in a.note + b.note and self.same_by_algebra(a.raw, b.raw)

    def same_collection(self, a: Parsed, b: Parsed) -> bool:
        kinds, notes, items = {a.kind, b.kind}, {a.note, b.note}, a.value + b.value
        ordered = bool(kinds & {"tuple", "interval", "matrix"})
        if "union" in kinds and (ordered or "set" in kinds):
            return self.same_by_algebra(a.raw, b.raw)
        if ordered and (len(notes) > 1 or kinds & {"list", "set"}):
            if (kinds, notes) != ({"list", "tuple"}, {"", "()"}):
                return False
        if kinds == {"list"}:
            names = {item.note for item in items if item.kind == "named"} - {""}
            ordered = len(names) > 1 or any(item.kind in ("text", "choice") for item in items)
            if len(notes) > 1 and (ordered or re.search(r"[<>]|\\[lg]eq", a.raw)):
                return False  # red or blue, red and blue
        left = list(b.value)
        if len(a.value) != len(left) or len(left) > 20:
            return a.value == b.value
        for x in a.value:
            rest = left[:1] if ordered else left
            equal = x if x in rest else next((y for y in rest if self.same(x, y)), None)
            if equal is None:
                return False
            left.remove(equal)
        return True

    def same_formula(self, a: Parsed, b: Parsed) -> bool:
        other, units = a if b.kind == "formula" else b, {a.note, b.note} - {""}
        glue = r"(?<=[_^])\{(\w)\}|(?<=[0-9]) (?=[A-Za-z\\])|(?<=[a-z}]) (?=[0-9\\({])"
        glued = {re.sub(glue, r"\1", x.raw) for x in (a, b)}
        if len(glued) == 1 and not units:  # 5 m and 5m
            return other.kind in ("text", "formula")
        if "formula" not in (a.kind, b.kind) or len(units) > 1 or "%" in units:
            return False
        xy = re.fullmatch("[a-z]{1,2}", other.raw) and set(other.raw) <= set(a.raw) & set(b.raw)
        if other.kind in ("text", "choice") and not xy:  # xy = x \cdot y, e = \exp(1), x = 2x/2
            return False
        texts = [str(x.value) if x.kind == "number" else x.raw for x in (a, b)]  # without units
        return self.same_by_algebra(*texts)

    def same_by_algebra(self, a: str, b: str) -> bool:
        """False where math-verify would misread a formula: words, letters in another case."""
        if any(_MISREAD.search(text) or _WORD.search(text) for text in (a, b)):
            return False
        x, y = (sorted(re.findall("[a-zA-Z]", text)) for text in (a, b))
        if x != y and sorted("".join(x).lower()) == sorted("".join(y).lower()):
            return False
        if self.algebra is None:
            raise NeedsAlgebra
        return self.algebra(a, b, self.precision)


# ----------------------------------------------------------------------------------------- 5. grade
def grade(
    prediction: str | None, answer: Gold, choices: Sequence[str] | None = None, precision=None
) -> bool:
    """Whether an extracted answer (None: nothing was found) equals the gold answer, in at most 2 s.

    choices: the options in order; A is the first, and either may be the gold. precision: decimals
    that the data set states. ValueError where the gold answer cannot be parsed, whatever is found.
    """
    if isinstance(answer, list) and len(answer) > 1:
        return any([grade(prediction, gold, choices, precision) for gold in answer])
    kind = type(answer).__name__
    if isinstance(answer, Real | Decimal) and not isinstance(answer, bool):
        try:
            answer = str(Fraction(str(answer)))  # through str, so that 0.1 is 1/10
        except ValueError as error:
            raise ValueError(f"gold answer {kind} cannot be parsed: {error}") from error
    if not isinstance(answer, str):
        raise ValueError(f"gold answer {answer!r:.80} cannot be parsed: its type is {kind}")
    gold = gold_answer(answer)
    found = (prediction or "").strip()
    if _BOX.search(found) or found.startswith("<"):  # a whole completion
        found = extract_answer(found) or ("" if _TAG.match(found) else found)
    if len(found) > MAX_CHARS:
        return False
    try:
        return _verdict(found, gold, tuple(map(str, choices or ())), precision)
    except ChildProcessError:
        return False


@lru_cache(maxsize=16384)
def gold_answer(answer: str) -> str:
    """A gold answer without box or tags. ValueError where no completion could ever earn it."""
    answer = answer.rpartition("####")[2]  # GSM8K's solutions end with "#### 7"
    found = extract_answer(answer)  # data sets box or tag some of their answers
    found = answer.strip() if found is None else found
    message = f"gold answer {answer!r:.80} cannot be parsed"
    if parse(found) is None:
        raise ValueError(f"{message}: empty, over {MAX_CHARS} characters, or 1/0")
    if extract_answer(rf"\boxed{{{found}}}") != found:
        raise ValueError(f"{message}: its braces or tags are not balanced")
    return found


@lru_cache(maxsize=16384)
def _verdict(prediction: str, gold: str, choices: tuple[str, ...], precision: int | None) -> bool:
    try:
        return Comparison(precision).right(prediction, gold, choices)
    except NeedsAlgebra:
        return _worker.ask(prediction, gold, choices, precision)  # its errors are not remembered


# -------------------------------------------------------------- 6. algebra, in a process of its own
CPU_SECONDS, WALL_SECONDS, MEMORY = 0.5, 1.5, 2**30
_WARM_UP = [(r"2\sqrt{3}", r"\sqrt{12}"), (r"x\neq 3", "x<3"), (r"\frac{a+b}{c}", r"\frac{a}{c}"),
            (r"e^{x+1}", r"\sin^2 x"), ("y=2x+1", "2x-y+1=0"), ("|x|", r"\log_2 8")]  # fmt: skip


def _sympy_equal(a: str, b: str, precision: int | None) -> bool:
    """Whether two LaTeX formulas are the same. Unbounded in time. Only for the worker."""
    x, y = _expression(a), _expression(b)
    relation, condition = sympy.core.relational.Relational, sympy.logic.boolalg.Boolean
    if isinstance(x, relation) and isinstance(y, relation):  # equal up to a factor
        x, y = (z.reversed if "<" in z.rel_op else z for z in (x, y))
        equation = x.rel_op in ("==", "!=")
        top = sympy.numer if equation else sympy.sympify
        sides = [top(sympy.together(z.lhs - z.rhs)) for z in (x, y)]
        point = {letter: sympy.Rational(9 + 2 * i, 5) for i, letter in enumerate(x.free_symbols)}
        f, g = (z.subs(point) for z in sides)
        alike = x.rel_op == y.rel_op and x.free_symbols == y.free_symbols and f != 0
        if alike and (equation or f * g > 0) and _same_value(sides[0] * g, sides[1] * f):
            return True
    if len(x.free_symbols | y.free_symbols) == 1 and not sympy.Tuple(x, y).has(sympy.Eq):
        x, y = (z.as_set() if isinstance(z, condition) else z for z in (x, y))
    if isinstance(x, sympy.Set) and isinstance(y, sympy.Set):
        return x == y or x.symmetric_difference(y).is_empty is True
    return isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr) and _same_value(x, y, precision)


def _expression(text: str):
    """LaTeX as math-verify reads it, evaluated. Decimals become fractions, none of them floats."""
    text = re.sub(r"([0-9.]+)°", r"(\\frac{\1\\pi}{180})", text)
    exact = lambda x: rf"(\frac{{{x[1]}{x[2]}}}{{1{'0' * len(x[2])}}})"  # noqa: E731
    text = re.sub(r"([0-9]*)\.([0-9]+)", exact, text)
    plain = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    config = [math_verify.LatexExtractionConfig(normalization_config=plain)]
    found = math_verify.parse(f"${text}$", config, parsing_timeout=None)[0]
    if re.search(r"[0-9]_", text) or found.has(sympy.Derivative):  # 31_6: it drops the base
        raise ValueError("math-verify misreads this")
    real = {x: sympy.Symbol(x.name, real=True) for x in found.free_symbols}
    if not found.has(sympy.Sum, sympy.Product):  # the parser has two imaginary units
        real |= {x: sympy.I for x in real if x.name == "i"}
    return found.xreplace(real).doit()


def _same_value(x, y, precision: int | None = None) -> bool:
    """Whether two expressions are equal at points where all arguments of roots are positive."""
    letters, difference, equal = sorted(x.free_symbols | y.free_symbols, key=str), x - y, []
    inside = [p.base for p in difference.atoms(sympy.Pow) if not p.exp.is_integer]
    inside += [log.args[0] for log in difference.atoms(sympy.log)]
    kinks = (sympy.Abs, sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.sign)
    for i in range(24 if letters else 1):
        # odd numbers: every second point has only positive ones, as most letters stand for lengths
        odd = [2 * ((37 * i + 23 * j) % 30) + 1 - 30 * (i % 2) for j in range(len(letters))]
        point = {x: sympy.Rational(n, 7 + 4 * (i % 3)) for x, n in zip(letters, odd, strict=True)}
        if all(z.subs(point).is_positive for z in inside if z.free_symbols) and len(equal) < 6:
            equal.append(_same_number(x.subs(point), y.subs(point), None if point else precision))
    if x == y or False in equal:
        return x == y
    proven = None not in equal and (not letters or len(equal) > 2 and not difference.has(*kinks))
    return proven or sympy.simplify(difference) == 0


def _same_number(x, y, precision: int | None) -> bool | None:
    """To as many digits as it takes to see the smallest part of each. None: cannot be told."""
    if x == y or x.is_Rational and y.is_Rational and precision is None:
        return x == y
    if not (x.is_number and y.is_number) or x.is_infinite or y.is_infinite:
        return False  # f(2)
    numbers = sympy.Tuple(x, y)
    size = [len(f"{part.p}{part.q}") for part in numbers.atoms(sympy.Rational)]
    for part in numbers.atoms(sympy.Pow, sympy.Function) - numbers.atoms(sympy.log):
        base = abs(part.args[0]) if part.is_Pow else 1  # e^-99, 9^-\pi, 1 - tanh(99)
        size.append(abs(part.args[-1] * (1 + sympy.log(base + 1 / base)) / 2).evalf(5))
    digits = 50 + 2 * int(sum(size))
    if digits > 4000:
        return False
    x, y = (z.evalf(digits, maxn=4 * digits) for z in (x, y))
    if precision is not None and x.is_real and y.is_real:
        numbers = [Parsed("number", Fraction(str(z)), "") for z in (x, y)]
        return Comparison(precision).same_number(*numbers)
    error, small = abs(x - y), sympy.Rational(1, 10 ** (digits - 20))
    return bool(error < small * abs(y)) if x and y or error > small else None


def _answer_questions() -> None:
    """The worker: for each input line, fork a process that compares two answers; print 1 or 0."""
    global math_verify, sympy, NormalizationConfig  # only the worker has to load these
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig

    for pair in _WARM_UP:  # fills the caches that the processes forked from now on start with
        _sympy_equal(*pair, None)
    print("ready", flush=True)
    for line in sys.stdin:
        prediction, gold, choices, precision = json.loads(line)
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # kills it inside of a multiplication
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            try:
                equal = Comparison(precision, _sympy_equal).right(prediction, gold, choices)
                os._exit(77 if equal else 0)  # a code that nothing else exits with
            finally:  # what math-verify cannot read
                os._exit(0)
        _, status = os.waitpid(child, 0)
        print(int(os.waitstatus_to_exitcode(status) == 77), flush=True)


class _Worker:  # the process that does the algebra: one for each process that asks
    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def start(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing formulas needs math-verify: pip install math-verify")
        command = [sys.executable, "-P", os.path.abspath(__file__), "--answer-questions"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, bufsize=0, **pipes)
        if self.read(seconds=60) != b"ready\n":
            self.stop()
            raise RuntimeError(f"the process for algebra did not start: {' '.join(command)}")

    def stop(self) -> None:
        if self.process is not None:
            with self.process as process:  # closes the pipes and waits
                process.kill()
            self.process = None

    def read(self, seconds: float) -> bytes:
        poll = select.poll()  # select.select fails at file numbers of 1,024 and more
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll(1000 * seconds) else b""

    def ask(self, *question) -> bool:
        with self.lock:
            for _ in range(2):  # a worker that was killed or stopped from outside is replaced once
                answer = b""
                try:
                    if self.process is None:
                        self.start()
                    self.process.stdin.write(json.dumps(question).encode() + b"\n")
                    answer = self.read(WALL_SECONDS + 0.5)
                except BrokenPipeError:
                    pass
                finally:  # also after an interrupt: the next question must not get this answer
                    if not answer:
                        self.stop()
                if answer:
                    return answer == b"1\n"
        raise ChildProcessError("the process for algebra was stopped from outside, twice")


_worker = _Worker()
os.register_at_fork(after_in_child=lambda: _worker.__init__())  # its pipes are the parent's


# --------------------------------------------------------------------------------------- 7. rewards
Rewards = Mapping[str, tuple[Callable[..., list[float]], float]]  # {name: (function, weight)}


def accuracy_reward(
    completions: list[Completion], answer: list[Gold], choices: list[Sequence[str] | None] = None,
    precision: list[int | None] = None, truncated: list[bool] = None, prose=False, **columns
) -> list[float]:  # fmt: skip
    """1 where the answer equals the gold answer (`grade`), 0 if not or if truncated.   N -> N"""
    N, scores = len(completions), []
    if isinstance(completions, str) or isinstance(answer, str) or len(answer) != N:
        raise ValueError(f"answer needs one for each of {N} completions, got {answer!r:.80}")
    how = (choices or [None] * N, precision or [None] * N, truncated or [False] * N)
    for completion, gold, options, digits, cut in zip(completions, answer, *how, strict=True):
        found = None if cut else extract_answer(_text(completion), prose)
        scores.append(float(grade(found, gold, options, digits)))
    return scores


def format_reward(completions: list[Completion], **columns) -> list[float]:
    r"""1 for <think>...</think> and then words with one \boxed{...}, or <answer>...</answer>."""
    scores = []
    for completion in completions:
        text = _text(completion).strip()
        tags, tail = "".join(_TAG.findall(text)), text.rpartition("</think>")[2]
        start, end = _last_box(tail)
        boxed = tags == "<think></think>" and len(_BOX.findall(tail)) == 1
        right = boxed and end > 0 and bool(tail[start:end].strip())
        if tags == "<think></think><answer></answer>" and not _BOX.search(tail):
            right = re.fullmatch(r"(?s)\s*<answer>\s*\S.*</answer>", tail)
        scores.append(float(bool(right) and text.startswith("<think>")))
    return scores


def _text(completion: Completion) -> str:
    match completion:
        case str(text) | [*_, {"content": str(text)}]:
            return text
    raise TypeError(f"a completion must be text or messages of text, got {completion!r:.200}")


def length_penalty(max_tokens: int, buffer: int) -> Callable[..., list[float]]:
    """DAPO's overlong rule: 0 up to max_tokens - buffer tokens, then linear to -1 at max_tokens."""
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"needs 0 < buffer <= max_tokens, got {buffer} and {max_tokens}")

    def penalty(completions, completion_ids: list[Sequence[int]], **columns) -> list[float]:
        over = [(len(ids) - max_tokens + buffer) / buffer for ids in completion_ids]
        return [-min(1.0, max(0.0, x)) for x in over]

    return penalty


REWARDS = {"accuracy": (accuracy_reward, 0.9), "format": (format_reward, 0.1)}  # second-hand


def load_rewards(specs: list[str], max_new_tokens: int) -> Rewards:
    """["accuracy:0.9", "my.py:function"] -> {name: (function, weight)}, or ValueError."""
    penalty = length_penalty(max_new_tokens, max(1, max_new_tokens // 4))  # ours
    built_in = {"accuracy": accuracy_reward, "format": format_reward, "length_penalty": penalty}
    rewards = {}
    for spec in specs:
        path, name, weight = re.fullmatch(r"(?:(.*\.py):?)?([^:]*):?(.*)", spec, re.S).groups()
        try:
            number = float(weight or ("1" if path else "nan"))
        except ValueError:
            number = math.nan
        if not path and name not in built_in:
            nearest = difflib.get_close_matches(name, built_in, n=1, cutoff=0)[0]
            known = ", ".join([*built_in, "file.py:function"])
            raise ValueError(f"reward {spec!r}: the nearest name is {nearest}, known are {known}")
        if path and not os.path.isfile(path):
            raise ValueError(f"reward {spec!r}: there is no file {path}")
        if not math.isfinite(number):
            raise ValueError(f"reward {spec!r}: the weight {weight!r} is no finite number")
        if name in rewards or name == "reward" or path and name in built_in:  # reward: the sum
            raise ValueError(f"reward {spec!r}: there is a reward called {name} already")
        function = runpy.run_path(path).get(name) if path else built_in[name]
        if not callable(function):
            raise ValueError(f"reward {spec!r}: {path} has no function {name!r}")
        rewards[name] = function, number
    if not rewards:
        raise ValueError("no reward is given; the default is accuracy:0.9 format:0.1")
    return rewards


def total_reward(
    completions: list[Completion], answer: list[str | Real], rewards: Rewards = REWARDS, **columns
) -> dict[str, list[float]]:
    """reward_i = sum_k w_k r_k,i, and each r_k. RuntimeError with the place.   N, N -> {name: N}"""
    if isinstance(completions, str) or isinstance(answer, str):
        raise ValueError(f"completions and answer have to be lists, got {answer!r:.80}")
    scores, totals, columns = {}, [0.0] * len(completions), columns | {"answer": answer}
    for name, (function, weight) in rewards.items():
        scores[name] = _checked(name, function, completions, columns)
        totals = [total + weight * r for total, r in zip(totals, scores[name], strict=True)]
    return {"reward": totals, **scores}


def _checked(name: str, function: Callable, completions: list, columns: dict) -> list[float]:
    """The values of one reward. An error says which completion it comes from."""
    N = len(completions)
    try:
        values = list(function(completions=completions, **columns))
        if len(values) != N:
            raise ValueError(f"it returned {len(values)} values for {N} completions")
        for value in values:
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"it returned {value!r:.80}, which is no finite number")
        return list(map(float, values))
    except Exception as error:  # re-raised, with its place
        for i in range(N if N > 1 else 0):  # one of them alone may raise
            _checked(name, function, [completions[i]], {k: [v[i]] for k, v in columns.items()})
        row = f"row {columns['row'][0]}, " if "row" in columns else ""
        place = f"{row}completion {completions[0]!r:.200}" if N == 1 else "the whole batch"
        cause = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"the reward {name!r} failed on {place}: {cause}") from error


if __name__ == "__main__":
    sys.exit(_answer_questions() if "--answer-questions" in sys.argv else "rewards.py is a module")
