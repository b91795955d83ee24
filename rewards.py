r"""Verifiable rewards: find the answer in a completion, compare it with the gold answer, check the format.

    python rewards.py "so \boxed{\frac{1}{2}}" 0.5       what is extracted, how it is compared, the verdict
    python rewards.py --file predictions.jsonl           grade a file again (eval.py's, or {completion, answer} lines)

Where the rules come from
    paper        nothing: of SaEI's reward only that it is verifiable can be known.
    second-hand  0.9 accuracy + 0.1 format, and the boxed format (NoisyRollout, EasyR1); the tags format (R1-V, VLM-R1);
                 the overlong penalty (DAPO).
    ours         the order of extraction, every rule of comparison, and a format stricter than theirs (no repeats).

What equal means (`grade`; both answers are parsed by the same rules, so a data set may write its golds in any of these)
    numbers    by value, exactly: 0.5 = 1/2 = \frac12, 1,234 = 1234, 3 1/4 = 13/4, 5\times10^3 = 5000, 3:4 = 3/4;
               35% = 35 and = 0.35, but 35 is not 0.35; rounded only to the `precision` that the data set states
    units      may be missing on one side; two different ones differ (5 cm, 5 m), and nothing is converted
    names      may be missing on one side (x = 3, area = 3, x \in S); two different ones differ (x = 2, y = 2)
    choices    a letter in any usual wrapper (B, (B), B. red, option B), or with `choices` the text that it stands for
    lists      numbers 1, 2 or x = 1 or x = 2 in any order, words in theirs; tuples and intervals in theirs, with
               their brackets; sets and unions in any; matrices cell by cell; \pm is two answers; x > 3 = (3, \infty)
    text       in any case (unless LaTeX commands remain), without articles and final punctuation; yes, with a clause
    the rest   by algebra (math-verify): 2\sqrt{3} = \sqrt{12}, (x+1)^2 = x^2+2x+1, 2x - y = 1 as y = 2x - 1
A miss costs less than a false reward: what is doubtful is wrong.

Bounded and safe: text from the model is never executed, and the time is linear in its length. Whatever needs algebra
is decided in a process forked for that one question, which ends after 0.5 s of CPU time, 1.5 s of wall time or at
1 GiB: the answer is then wrong. So a grade takes at most 2 s, in any thread or process; threads wait for their turn.
One worker a process forks them: it starts, in a second or two more, with the first such question, is replaced when it
was killed, and ends with its parent. Needs os.fork: Linux or macOS.

Symbols: N = P*G completions (P prompts, G responses each), lists of N in, lists of N floats out, with TRL's signature.
Standard library, and math-verify (pip install math-verify) once an answer needs algebra.

>>> completions = [r"<think>3 + 8</think> \boxed{11}", r"<think>3 + 8</think> \boxed{12}", "<answer> 11. </answer>"]
>>> accuracy_reward(completions, answer=["11", "11", "11"]), format_reward(completions)
([1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
>>> total_reward(completions, answer=["11", "11", "11"])["reward"]
[1.0, 0.1, 0.9]
"""

import importlib.util
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

Completion = str | list[dict]  # plain text, or TRL's conversational list of messages

MAX_CHARS = 512  # a longer answer is no answer; below 640, the lowest limit Python lets one set on digits of an int

# ------------------------------------------------------------------------------------------------------- extraction

_BOX = re.compile(r"\\\\?(?:boxed|fbox)\s*\{")  # one backslash, or two where the model escaped it
_BRACE = re.compile(_BOX.pattern + r"|\\.|[{}]", re.DOTALL)  # \{ and \} are characters, not braces
_TAG = re.compile(r"</?(?:think|answer)>")
_PHRASE = re.compile(
    r"\banswer(?: is(?: choice| option)?\b|(?=\s*[:=]))(?:\s*[:=])?[\s*]*(?=[^\s*])", re.IGNORECASE
)
_LONE_LETTER = re.compile(r"(?<![^\s(*])\(?\*{0,3}([A-Z])\*{0,3}(?:\)|(?=[.,:;!]?(?:\s|$)))")


def _last_box(text: str) -> str | None:
    """What the balanced box that opens last holds (of nested boxes: the inner one). One pass, so linear."""
    if not _BOX.search(text):
        return None
    open_braces, last = [], (-1, -1)
    for token in _BRACE.finditer(text):
        if token[0] == "}" and open_braces:
            last = max(last, (open_braces.pop(), token.start()))
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(
                token.end() if len(token[0]) > 1 else -1
            )  # -1: a brace that is no box
    return text[last[0] : last[1]] if last[0] >= 0 else None


def _last_tag(text: str) -> str | None:
    """What the last closed <answer>...</answer> holds."""
    closed = [part for part in text.split("</answer>")[:-1] if "<answer>" in part]
    return closed[-1].rpartition("<answer>")[2] if closed else None


def _last_prose(text: str) -> str | None:
    """The rest of the sentence after the last "answer is" or "answer:"; else the one capital that stands alone."""
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        sentence = re.match(r"(?:[^.\n]|\.(?=\S))*", text[phrases[-1].end() :])[0]
        return sentence.strip().strip("*").strip()
    letters = (
        set(_LONE_LETTER.findall(text))
        - {"I"}
        - ({"A"} if re.search(r"\bA (?!or\b|and\b)[a-z]", text) else set())
    )
    return letters.pop() if len(letters) == 1 else None


def extract_answer(text: str, prose: bool = False) -> str | None:
    r"""The answer that a completion states, or None: the first of these that is found.

    1. after the last </think>, if there is one: the last balanced \boxed{...} or \fbox{...} (inside tags or not);
    2. after the last </think>: the last <answer>...</answer>;
    3. and 4. the same two before the last </think>;
    5. only with prose, after the last </think>: the rest of the sentence after the last "answer is" or "answer:";
       else, where exactly one capital letter stands alone there (A, (B), C.), that letter.
    An empty box counts as found and is returned as "": a later answer replaces an earlier one even if it is worse.
    """
    thinking, _, tail = text.rpartition("</think>")
    for part in (tail, thinking):
        for find in (_last_box, _last_tag):
            if (answer := find(part)) is not None:
                return answer.strip()
    return _last_prose(tail) if prose else None


# ---------------------------------------------------------------------------------------------------------- parsing

_SYMBOLS = str.maketrans({  # what LaTeX has a name for
    "−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "±": r"\pm ", "√": r"\sqrt ",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "∞": r"\infty ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∠": r"\angle ", "△": r"\triangle ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4",
    "∧": r"\land ", "∨": r"\lor ", "¬": r"\neg ", "∀": r"\forall ", "→": r"\to ",
    "⊂": r"\subset ", "∥": r"\parallel ",
    "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ",
})  # fmt: skip
_SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_SPELLINGS = [  # (pattern, replacement), in this order; @ ends a LaTeX command; each is cheap on MAX_CHARS
    (r"\\[dtc]frac@", r"\\frac"),
    (r"\\!|\\(?:left|right)(?:\.|@)|\\(?:(?:display|text|script)style|limits|[bB]igg?[lr]?|large)@", ""),
    (r"\\(?:text)?color\{[a-z]+\}", ""),
    (r"\{,\}|\{\\,\}|(?<=[0-9])\\,(?=[0-9]{3})", ","),  # 4{,}321 and 4\,321
    (r"\\%", "%"),
    (r"\\q?quad@|\\[,;: ()\[\]]|~", " "),
    (r"\\(?:[lr]?vert|mid)@", "|"),
    (r"\\lbrace@", r"\\{"), (r"\\rbrace@", r"\\}"), (r"\\langle@", "("), (r"\\rangle@", ")"),
    (r"\^ ?(?:\{ ?\\circ ?\}|\\circ@)|\\degree@", "°"),
    (r"<=|=<|\\leqslant@|\\le@", r"\\leq "), (r">=|\\geqslant@|\\ge@", r"\\geq "), (r"!=|\\ne@|\\not ?=", r"\\neq "),
    (r"\\lt@", "<"), (r"\\gt@", ">"), (r"\\varnothing@", r"\\emptyset "), (r"\\backslash@", r"\\setminus "),
    (r"\\wedge@", r"\\land "), (r"\\vee@", r"\\lor "), (r"\\lnot@", r"\\neg "), (r"\\rightarrow@", r"\\to "),
    (r"\\binom ?([0-9])([0-9])", r"\\binom{\1}{\2}"), (r"(?<![a-zA-Z\\])abs\(([^()|]*)\)", r"|\1|"),
    (r"^(?:[Tt]he )?empty set$", r"\\emptyset "), (r"\\mathbb ([A-Z])", r"\\mathbb{\1}"),
    (r"\b[Aa]ll real numbers\b", r"\\mathbb{R}"),
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    (r"(?<=[0-9)}a-zA-Z])\*\*(?=[-0-9({a-zA-Z])", "^"),  # a power, as Python writes it
    (r"(?<![a-zA-Z\\])(?:infinity|infty|inf|oo)@", r"\\infty "),
    (r"(?<![a-zA-Z\\])(sqrt|pi|theta|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp)@", r"\\\1 "),
    (r"\^ ?(-?[0-9]{2,}|-[0-9a-zA-Z])", r"^{\1}"),  # x^12 and x^-1, as everybody but TeX reads them
    (r"\\sqrt ?([0-9]+|[a-zA-Z]@)", r"\\sqrt{\1}"),
    (r"\\frac ?([0-9]|\\pi@|[a-zA-Z](?=[a-zA-Z]?@))", r"\\frac{\1}"),  # \frac12, \frac1{2}, \frac ab
    (r"(\\frac\{[^{}]*\}) ?([0-9]|[a-zA-Z]@)", r"\1{\2}"),
]  # fmt: skip
_SPELLINGS = [
    (re.compile(pattern.replace("@", "(?![a-zA-Z])")), replacement)
    for pattern, replacement in _SPELLINGS
]
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|mbox|operatorname|bm|underline)\s*"
    r"\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),? )?(?:(?:the|my) )?(?:(?:correct|final|right) )?(?:answer|choice|option)"
    r"(?: is|:|=)+:? ?|= ?|\\approx ?|\\therefore ?|(?:approximately|about) (?=[0-9])",
    re.IGNORECASE,
)
_D = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?P<money>(?:[$€£¥] ?)?)(?:"
    rf"(?:(?P<whole>[0-9]+) ?)?\\frac{{(?P<top>[+-]?{_D})}}{{(?P<bottom>[+-]?{_D})}}"  # \frac12, 3\frac12
    rf"|(?:(?P<whole2>[0-9]+) )?(?P<top2>{_D})/(?P<bottom2>{_D})(?![0-9/])"  # 1/2, 3 1/2
    r"|(?P<fixed>[0-9]*\.[0-9]*)\\(?:overline|bar){(?P<repeated>[0-9]+)}"  # 0.1\overline{6}
    rf"|(?P<decimal>{_D})(?: ?(?:\\times|\\cdot|\*|x) ?10\^\{{?(?P<power>[+-]?[0-9]{{1,3}})(?![0-9])\}}?)?)"
)
_UNDEFINED = re.compile(rf"[+-]?(?:\\frac{{[+-]?{_D}}}{{[+-]?0+}}|{_D}/0+) ?%?")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[):.]?")
_OPTION = re.compile(  # B. red; (B) red; option B: red; B - red; B because
    r"(?:(?:option|choice|answer) ?)?"
    r"(?:\(([A-Z])\)(?![+*/^=_<>!]|-[0-9])|([A-Z])(?: ?[):]| ?\.(?![\w.])|(?= ?(?:[-–] |,? ?because ))))(.*)",
    re.I | re.S,
)
_CAPITAL = re.compile(r"(?<![\w\\'])(?!A [a-z])([A-Z])(?![\w'])")
_MATRIX = re.compile(
    r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.S
)
_NAME = re.compile(  # x_1, f(x), area, \angle ABC; (x, y); A^{-1}
    r"(?!\\(?:sqrt|sin|cos|tan|log|ln|frac\{[0-9])|.*(?:\bnot?\b|n't|\bthan\b|\\not))(?=.*[a-zA-Z])[^-+*/^=<>,;0-9{][^-+*/^=<>,;]*"
    r"|\([a-z](?:, ?[a-z])+\)|[A-Z]\^(?:T|{-1})"
)
_VERBATIM = re.compile(  # dates, clock times, B2B, and what LaTeX does not show or algebra would read in its own way
    r"[0-9]+([-/])[0-9]+\1[0-9]|[0-9]:[0-9]{2} ?[aApP]\.?[mM]|(?<![0-9.])[0-9]+:0[0-9]|phantom|\{ ?\}[0-9a-zA-Z(]"
    r"|%.|ldots|==|__|[a-zA-Z]\.[a-zA-Z]|^[a-zA-Z]+[0-9]+[a-zA-Z]"
)
_WORD = re.compile(r"[^\W\d_]{3,}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_INEQUALITY = re.compile(r"[<>]|\\[lg]eq")
_RELATION = re.compile(r"[=<>]|\\(?:[lg]eq|neq|in)(?![a-zA-Z])")
_MISREAD = re.compile(
    r"(?<![_0-9])[0-9]+ [0-9]|[$'′≅≡]|<>|\\(?:equiv|cong|not)"
)  # by math-verify: it adds, or drops the rest
_UNIT_NAMES = {
    long: short
    for short, names in {
        "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre",
        "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram gm", "kg": "kilogram kilo",
        "mg": "milligram", "lb": "pound", "oz": "ounce", "s": "second sec", "min": "minute", "h": "hour hr",
        "l": "liter litre", "ml": "milliliter millilitre", "°": "degree deg", "$": "dollar usd", "%": "percent pct",
        "rad": "radian", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "a": "ampere amp", "k": "kelvin",
        "day": "days", "week": "weeks", "month": "months", "year": "yr",
        "c": "celsius", "f": "fahrenheit", "pa": "pascal", "hz": "hertz", "mol": "mole", "cent": "¢",
        "€": "euro eur", "£": "gbp", "¥": "yen", "": "unit",
    }.items()
    for long in names.split()
}  # fmt: skip
_UNITS = set(filter(None, _UNIT_NAMES.values())) | {
    "mph",
    "kmh",
    "ohm",
    "kw",
    "mw",
    "kj",
    "ha",
    "cc",
    "kpa",
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = re.compile(  # words that make of "11 ..." something else than 11 of a kind
    "is|isnt|are|was|were|be|not|no|nope|never|or|and|the|an?|to|than|then|but|if|of|off|at|by|with|without|for|from|on|in"
    "|when|where|unless|instead|except|about|exactly|least|most|any|all|none|maybe|perhaps|possibly|only|wrong|false|true"
    "|incorrect|versus|vs|alternatively|more|less|other|plus|minus|negative|below|under|times|twice|divided|over|mod"
    "|modulo|choose|squared|cubed|factorial|base|binary|power|root|sqrt|log|hal(?:f|ves)|thirds?|quarters?|dozens?|pairs?"
    "|scores?|tens|permille|one|two|twos|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|.*teen"
    "|.*[nrfxy]ty|.*th|.*ths|.*illions?|hundreds|thousands"
)


@dataclass(frozen=True)
class Parsed:
    """An answer as the comparison sees it."""

    kind: str  # number | choice | text | list | tuple | interval | set | union | matrix | named | formula
    value: object  # Fraction; str; a tuple of Parsed (matrix: of rows; named: all that the name is said to equal)
    note: str = ""  # the unit; the brackets; the name; of a list: "or"
    raw: str = field(
        default="", compare=False
    )  # the normalised text (of a formula without its unit), for algebra

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.kind} {self.value if isinstance(self.value, (str, Fraction)) else self.raw}{note}"


def _normalise(text: str) -> str:
    r"""The answer without what changes only its look. A removed command leaves a space: \text{1}2 is not 12."""
    if text.isalnum() and text.isascii() and (text.isdigit() or len(text) == 1):  # most answers
        return text
    text = unicodedata.normalize("NFC", re.sub(r"(?<!\\)\\\s*$", "", text)).translate(_SYMBOLS)
    text = re.sub("[²³¹⁰-⁻]+", lambda m: f"^{{{m[0].translate(_SMALL)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m[0].translate(_SMALL)}}}", text)
    # two backslashes: a row's end in a matrix; elsewhere a model that escaped its backslash
    text = (
        re.sub(r"\\\\(?:\[[^\]]*\])?", r"\\cr ", text)
        if r"\begin" in text
        else text.replace("\\\\", "\\")
    )
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    while (unwrapped := _WRAPPER.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = re.sub(
        r"\\\$", "$", re.sub(r"(?<!\\)\$([^$]*)\$", r" \1 ", text)
    )  # what is left over is money
    text = re.sub(r"\s+", " ", text)  # then no spaces at signs, but at commas: "1, 234" is a pair
    text = re.sub(r" (?=\\)| ?([-+*/=^_{()<>|]) ?| ?(\}) ?(?![a-zA-Z ])| (?=\})", r"\1\2", text)
    text = text.strip().removeprefix("**").removesuffix("**").strip()  # Markdown bold
    text = re.sub(r"""^(["'`])(.*)\1$""", r"\2", text)
    text = _parentheses_to_braces(text).removesuffix(".").rstrip()
    return text[lead.end() :].strip() if (lead := _LEAD.match(text)) else text


def _parentheses_to_braces(text: str) -> str:
    r"""\sqrt(x+1) -> \sqrt{x+1} and e^(x+1) -> e^{x+1}, as LaTeX needs it."""
    for match in reversed(list(re.finditer(r"(?:\\sqrt ?|\^)\(", text))):
        inside = _matching(text, match.end() - 1)
        if inside is not None:
            text = f"{text[: match.end() - 1].rstrip()}{{{inside}}}{text[match.end() + len(inside) + 1 :]}"
    return text


def _matching(text: str, start: int) -> str | None:
    """What stands between the bracket at `start` and the one that closes it; their kinds may mix, as in [2, 9)."""
    depth = 0
    for token in re.finditer(r"[(\[{]|[)\]}]", text[start:]):
        depth += 1 if token[0] in "([{" else -1
        if depth == 0:
            return text[start + 1 : start + token.start()]
    return None


def _split(text: str, separator: str) -> list[str]:
    """Pieces and, between them, separators, as re.split gives them, but not inside of any brackets."""
    pieces, depth, start = [], 0, 0
    for token in re.finditer(rf"\\?[(\[{{]|\\?[)\]}}]|(?:{separator})", text):
        if token[0][-1] in "([{":
            depth += 1
        elif token[0][-1] in ")]}":
            depth -= 1
        elif depth == 0:
            pieces += [text[start : token.start()].strip(), token[0].strip()]
            start = token.end()
    return [*pieces, text[start:].strip()]


def _unit(text: str) -> str | None:
    """The canonical unit that a text after a number is ("" for none or plain units); None where it is something else.

    Up to four words: "apples", "square cm", "m/s^2", "miles per hour", "degrees Celsius".
    """
    text = re.sub(
        r"\bper\b", "/", text.replace(r"\cdot", " ").translate({123: None, 125: None}).lower()
    )
    words = re.findall(r"[^\W\d_]+(?:\^-?[1-3])?|[^\s.]", text)
    if (
        len(words) > 5
        or any(_NO_UNITS.fullmatch(w) for w in words if w not in _UNIT_NAMES)
        or words[:1] == ["/"]
        or words[-1:] == ["/"]
    ):
        return None
    unit, power, unknown = [], "", 0
    for word in words:
        stem, _, exponent = word.partition("^")
        known = [
            w
            for w in (stem, stem.removesuffix("s"), stem.removesuffix("es"))
            if w in _UNIT_NAMES or w in _UNITS
        ]
        if word in ("square", "sq", "cubic", "cu"):
            power = "^3" if word.startswith("cu") else "^2"
        elif known:
            unit.append(
                _UNIT_NAMES.get(known[0], known[0]) + (f"^{exponent}" if exponent else power)
            )
            power = ""
        elif (
            len(stem) < 2 and stem != "/" or not (stem == "/" or stem.isalpha())
        ):  # a variable, a sign
            return None
        else:
            unit.append(stem.removesuffix("s") + exponent)
            unknown += stem != "/"
    if unknown > 2:
        return None
    return re.sub("° ([cf])$", r"\1", " ".join(word for word in unit if word[:1] not in ("", "^")))


def _number(text: str) -> Parsed | None:
    """A number with an optional unit or percent sign; None for anything else and for x/0."""
    if not (match := _NUMBER.match(text)):
        return None
    rest, part = (
        text[match.end() :],
        {k: (v or "").replace(",", "") for k, v in match.groupdict().items()},
    )
    if scale := re.match(rf" ?({'|'.join(_SCALES)})\b", rest):
        rest = rest[scale.end() :]
    unit = _unit(rest)
    if (
        unit is None or (part["money"] and unit) or re.match(r"[a-zA-Z](?![a-zA-Z])", rest)
    ):  # 5m: a product
        return None
    if part["repeated"]:
        digits, ends = part["fixed"].replace(".", ""), len(part["fixed"].partition(".")[2])
        top, bottom = (
            int(digits + part["repeated"]) - int(digits or 0),
            "9" * len(part["repeated"]) + "0" * ends,
        )
    else:
        top, bottom = (
            part["top"] or part["top2"] or part["decimal"],
            part["bottom"] or part["bottom2"] or 1,
        )
    if not Fraction(bottom):
        return None
    value, whole = Fraction(top) / Fraction(bottom), part["whole"] or part["whole2"]
    if whole and not 0 < value < 1:  # 2\frac{3}{2} is a product
        return None
    value = (
        (value + int(whole or 0))
        * Fraction(10) ** int(part["power"] or 0)
        * (_SCALES[scale[1]] if scale else 1)
    )
    return Parsed(
        "number", -value if part["sign"] == "-" else value, part["money"].strip() or unit, text
    )


@lru_cache(maxsize=4096)
def parse(text: str) -> Parsed | None:
    """An answer (what stands in the box) as Parsed; None for an empty, over-long or undefined (1/0) one."""
    return _parse(_normalise(text), 0) if len(text) <= MAX_CHARS else None


def _parse(text: str, depth: int) -> Parsed | None:
    text = text.strip()
    if not text or _UNDEFINED.fullmatch(text):
        return None
    if number := _number(text):
        return number
    if choice := _CHOICE.fullmatch(text):
        letter = choice[1] or choice[2]
        return Parsed("choice", letter.lower(), raw=letter)
    if depth > 8 or _VERBATIM.search(text):
        return Parsed("text", _plain(text) or text, raw=text)
    for reader in (
        _parse_matrix,
        _parse_list,
        _parse_brackets,
        _parse_relation,
        _parse_ratio,
        _parse_union,
    ):
        if parsed := reader(text, depth + 1):
            return parsed
    head = re.fullmatch(r"(.*(?:[0-9})]|\\pi))( .*|°|%)", text, re.S)  # 25\pi square cm
    if (
        head
        and not _WORD.search(_COMMAND.sub(" ", head[1]))
        and not re.search(r"\\(?:sin|cos|tan|cot)", text)
    ):
        unit = _unit(head[2])
        if unit is not None and (len(unit) > 1 or unit in ("", "°", "%")):
            return Parsed("formula", head[1], unit, head[1])
    words = _WORD.search(_COMMAND.sub(" ", text)) or not re.search(r"[0-9+*/^_=<>\\|!-]", text)
    return (
        Parsed("text", _plain(text) or text, raw=text)
        if words
        else Parsed("formula", text, raw=text)
    )


def _plain(text: str) -> str:
    """Text as it is compared: any case unless LaTeX commands remain, without articles and final punctuation."""
    text = re.sub(r"\{([a-zA-Z]+)\}", r" \1", re.sub(" ?, ?", ",", text)).strip(" .!?;:")
    if "\\" in text:
        return text
    text = re.sub(r"\b(?:the|an?) (?=\w)", "", re.sub(r"\b([ap])\.m\b", r"\1m", text.casefold()))
    return re.sub(r"(?<=[^\W\d])-(?=[^\W\d])|\s+", " ", text)


def _parse_all(texts: Sequence[str], depth: int) -> tuple[Parsed, ...] | None:
    """Every text parsed; None where one cannot be."""
    parsed = tuple(_parse(text, depth) for text in texts)
    return None if None in parsed else parsed


def _parse_matrix(text: str, depth: int) -> Parsed | None:
    if not (match := _MATRIX.fullmatch(text)) or r"\begin" in match[2]:
        return None
    rows = tuple(_parse_all(row.split("&"), depth) for row in match[2].split(r"\cr") if row.strip())
    return None if None in rows else Parsed("matrix", rows, raw=text)


def _parse_list(text: str, depth: int) -> Parsed | None:
    r"""a, b; c or d at the top level, and a \pm b, which is the list of both."""
    pieces = _split(text, r",|;|\bor\b|\band\b")
    texts = [
        x
        for x, sign in zip(pieces[::2], [*pieces[1::2], ""], strict=True)
        if x or sign not in ("and", "or")
    ]
    if len(pieces) == 1 and text.count(r"\pm") == 1 and not re.search("[=<>]", text):
        pieces = ["", "or"]
        texts = [re.sub(r"\\pm ?", "+", text).removeprefix("+"), re.sub(r"\\pm ?", "-", text)]
    items = _parse_all(texts, depth) if len(texts) > 1 else None
    return Parsed("list", items, "or" if "or" in pieces[1::2] else "", text) if items else None


def _parse_brackets(text: str, depth: int) -> Parsed | None:
    start = text.startswith(r"\{")
    inside = _matching(text, start) if text[start : start + 1] in list("([{") else None
    if inside is None or start + len(inside) + 2 != len(text):
        return None
    brackets, inside = text[start] + text[-1], inside.removesuffix("\\").strip()
    if (brackets[0] == "{") != (brackets[1] == "}"):
        return None
    if brackets == "{}" and (
        builder := re.fullmatch(r"(\w+)(?:\\in\\mathbb{R})? ?[|:](.*)", inside)
    ):  # {x | x > 3}
        inner = _parse(builder[2], depth)
        return inner if inner and inner.kind == "named" and inner.note == builder[1] else None
    inner = _parse_list(inside, depth) or _parse(inside, depth)  # (4,321) is a pair
    if inner is None:
        return Parsed("set", (), raw=text) if brackets == "{}" and not inside else None
    if inner.kind == "list":
        return (
            Parsed("set", inner.value, raw=text)
            if brackets == "{}"
            else Parsed("tuple", inner.value, brackets, text)
        )
    if brackets == "{}" and start:
        return Parsed("set", (inner,), raw=text)
    if brackets == "[]" and inner.kind != "matrix":
        return Parsed("tuple", (inner,), brackets, text)
    return inner if brackets in ("()", "[]", "{}") else None


def _parse_relation(text: str, depth: int) -> Parsed | None:
    r"""name = value (= value), x \in S, A(2,3): "named"; an inequality for x: a named interval; the rest: a formula."""
    if re.fullmatch(r"[A-Z]'?\(.*,.*\)", text):
        text = text.replace("(", "=(", 1)
    pieces = _split(text, r"\\(?:leq|geq|neq|in|approx)(?![a-zA-Z])|[=<>]")
    sides, operators = pieces[::2], pieces[1::2]
    if not operators or not all(sides):
        return None
    if set(operators) <= {"=", r"\in", r"\approx"}:
        if not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[-1]):
            sides.reverse()
        named = bool(_NAME.fullmatch(sides[0]))
        if not named and re.search("[a-zA-Z]", _COMMAND.sub("", sides[0])):
            return Parsed("formula", text, raw=text)
        values = _parse_all(sides[named:], depth)
        names = sides[0].strip("()").split(",")
        if (
            values
            and len(names) > 1
            and values[-1].note == "()"
            and len(names) == len(values[-1].value)
        ):  # (x,y)=(1,2)
            pairs = zip(names, values[-1].value, strict=True)
            return Parsed(
                "tuple", tuple(Parsed("named", (v,), _name(n), text) for n, v in pairs), "()", text
            )
        return Parsed("named", values, _name(sides[0]) if named else "", text) if values else None
    if operators[0] in (">", r"\geq"):  # read it from the small side
        sides, operators = (
            sides[::-1],
            [{">": "<", r"\geq": r"\leq"}.get(op, "") for op in operators[::-1]],
        )
    variables = [
        i
        for i, side in enumerate(sides)
        if re.fullmatch(r"[a-df-zA-Z]|\\(?!infty|pi)[a-zA-Z]+", side)
    ]
    if (
        not set(operators) <= {"<", r"\leq"}
        or len(variables) != 1
        or len(sides) == 3
        and variables != [1]
        or len(sides) > 3
    ):
        return Parsed("formula", text, raw=text)
    at = variables[0]  # at the start, in the middle or at the end
    low, high = (
        sides[at - 1] if at else r"-\infty",
        sides[at + 1] if at + 1 < len(sides) else r"\infty",
    )
    brackets = "[" if at and operators[at - 1] == r"\leq" else "("
    brackets += "]" if at + 1 < len(sides) and operators[at] == r"\leq" else ")"
    ends = _parse_all((low, high), depth)
    return (
        Parsed("named", (Parsed("interval", ends, brackets, text),), sides[at], text)
        if ends
        else None
    )


def _name(text: str) -> str:
    r"""A name as it is compared: without spaces and articles, words in any case, m\angle ABC as \angle ABC."""
    text = re.sub(
        r"^(?:the|an?) |^m(?=\\angle)|\\over(?:line|rightarrow)|\\(?=[a-z]+$)|[\s{}]",
        "",
        text,
        flags=re.I,
    )
    return text.casefold() if len(text) > 1 else text


def _parse_ratio(text: str, depth: int) -> Parsed | None:
    """3:4 and 3 to 4 are the number 3/4; 2:4:6 is 1:2:3."""
    numbers = [_number(part.strip()) for part in re.split(r":|\\colon|\bto\b", text)]
    if len(numbers) < 2 or not all(
        number and number.value and not number.note for number in numbers
    ):
        return None
    values = [number.value for number in numbers]
    if len(values) == 2:
        return Parsed("number", values[0] / values[1], raw=text)
    return Parsed("tuple", tuple(Parsed("number", v / values[0]) for v in values), ":", text)


def _parse_union(text: str, depth: int) -> Parsed | None:
    pieces = _split(text, r"\\cup(?![a-zA-Z])")[::2]
    items = _parse_all(pieces, depth) if len(pieces) > 1 else None
    return Parsed("union", items, raw=text) if items else None


# ------------------------------------------------------------------------------------------------------- comparison


class NeedsAlgebra(Exception):
    """Raised by a comparison that the rules cannot decide."""


class NoAnswer(Exception):
    """Raised where the process that does the algebra was killed or stopped from outside, twice in a row."""


def _defer(a: str, b: str, precision: int | None) -> bool:
    raise NeedsAlgebra


class How(NamedTuple):
    """How to compare: decimals that the data set states, and what decides whether two formulas are equal."""

    precision: int | None = None
    algebra: Callable[[str, str, int | None], bool] = _defer

    def formulas(self, a: str, b: str) -> bool:
        """Not asked about words, nor where only the case of letters differs: math-verify reads all as small ones."""
        letters = [sorted(re.findall(r"[a-zA-Z]", text)) for text in (a, b)]
        if letters[0] != letters[1] and sorted("".join(letters[0]).lower()) == sorted(
            "".join(letters[1]).lower()
        ):
            return False
        if any(_MISREAD.search(text) or _WORD.search(_COMMAND.sub(" ", text)) for text in (a, b)):
            return False
        return self.algebra(a, b, self.precision)


def _same(a: Parsed, b: Parsed, how: How) -> bool:
    """Whether two parsed answers are equal, by the rules of the module's header; symmetric."""
    if a == b:
        return True
    if b.kind == "named" or b.kind == "set" and a.kind != "named":
        a, b = b, a
    kinds = {a.kind, b.kind}
    if a.kind == "named":
        return _same_named(a, b, how)
    if (
        a.kind == "set"
        and len(a.value) == 1
        and b.kind in ("number", "formula", "tuple")
        and "empty" not in b.raw
    ):
        return _same(a.value[0], b, how)
    if kinds == {"number"}:
        return _same_number(a, b, how)
    if kinds == {"matrix"}:
        same_shape = [len(row) for row in a.value] == [len(row) for row in b.value]
        return same_shape and all(
            _match(x, y, True, how) for x, y in zip(a.value, b.value, strict=True)
        )
    if kinds <= {"list", "tuple", "interval", "set", "union"}:
        return _same_collection(a, b, how)
    if (
        kinds <= {"text", "formula"} and not a.note + b.note and _glued(a.raw) == _glued(b.raw)
    ):  # 5 m and 5m
        return True
    letters = next((x.raw for x in (a, b) if x.kind == "text"), "")
    if (
        kinds == {"text", "formula"}
        and re.fullmatch("[a-z]{2}", letters)
        and set(letters) <= set(a.raw) & set(b.raw)
    ):
        return how.formulas(a.raw, b.raw)  # xy = x \cdot y
    letter = next((x.raw for x in (a, b) if x.kind == "choice"), "")
    if kinds == {"choice", "formula"} and letter.islower() and letter in a.raw and letter in b.raw:
        return how.formulas(a.raw, b.raw)  # e = \exp(1), x = 2x/2
    if kinds & {"text", "choice", "list"} or "formula" not in kinds:
        return False
    if kinds <= {"number", "formula"} and not _comparable(a, b):
        return False
    return how.formulas(
        *(str(x.value) if x.kind == "number" else x.raw for x in (a, b))
    )  # without the units


def _comparable(a: Parsed, b: Parsed) -> bool:
    """Neither of different units nor an equation with a value: of x + 1 = 9 math-verify would take the right side."""
    if a.note and b.note and a.note != b.note or "%" in (a.note, b.note):
        return False
    related = [bool(_RELATION.search(re.sub(r"\{[^{}]*\}", "", x.raw))) for x in (a, b)]
    return related[0] == related[1] or bool(
        re.search(r"\\(?:setminus|mathbb)", a.raw + b.raw)
    )  # x \neq 3 is a set


def _glued(text: str) -> str:
    """The text without braces around a single character and spaces between a digit and a letter or sign."""
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return re.sub(r"(?<=[0-9]) (?=[A-Za-z\\])|(?<=[a-z}]) (?=[0-9\\({])", "", text)


def _same_number(a: Parsed, b: Parsed, how: How) -> bool:
    """By value; of different units none; p% is p and p/100."""
    if a.note and b.note and a.note != b.note:
        return False
    digits = (lambda x: x) if how.precision is None else (lambda x: round(x, int(how.precision)))
    if (a.note == "%") == (b.note == "%"):
        return digits(a.value) == digits(b.value)
    percent, plain = (a.value, b.value) if a.note == "%" else (b.value, a.value)
    return digits(plain) == digits(percent) or plain == percent / 100


def _same_named(a: Parsed, b: Parsed, how: How) -> bool:
    """name = value against a value (equal to all that is said to be equal), another named value or an equation."""
    equation = b.kind == "formula" and _RELATION.search(b.raw)
    if equation or a.value[-1].kind == "interval" and b.kind == "union":
        return how.formulas(a.raw, b.raw)
    if b.kind != "named":
        steps = [
            v for v in a.value[:-1] if not re.search("[a-zA-Z]", _COMMAND.sub("", v.raw))
        ]  # of 2 + 3 = 5
        return all(_same(value, b, how) for value in [*steps, a.value[-1]])
    if a.note == b.note or not a.note or not b.note:
        return all(_same(x, y, how) for x in a.value for y in b.value)
    if any(
        value.kind in ("formula", "choice") for value in a.value + b.value
    ):  # y = 2x and x = y/2
        return how.formulas(a.raw, b.raw)
    return False


def _same_collection(a: Parsed, b: Parsed, how: How) -> bool:
    """Lists, tuples, intervals, sets and unions with each other."""
    kinds, notes = {a.kind, b.kind}, {a.note, b.note}
    if "union" in kinds and kinds & {"tuple", "interval", "set"}:
        return how.formulas(a.raw, b.raw)
    if (
        kinds <= {"tuple", "interval"}
        and len(notes) > 1
        or "set" in kinds
        and kinds & {"tuple", "interval"}
    ):
        return False  # other brackets
    if (
        kinds == {"list", "interval"}
        or kinds == {"list", "tuple"}
        and ("()" not in notes or "or" in notes)
    ):
        return False
    words = any(item.kind in ("text", "choice") for item in a.value + b.value)
    names = [
        len({item.note for item in x.value if item.kind == "named"}) > 1 for x in (a, b)
    ]  # x = 1, y = 2
    if kinds == {"list"} and len(notes) > 1 and (words or any(names) or _INEQUALITY.search(a.raw)):
        return False  # red or blue, red and blue
    first, second = (
        sorted(x.value, key=lambda item: item.note) if n else x.value
        for x, n in zip((a, b), names, strict=True)
    )
    ordered = bool(kinds & {"tuple", "interval"}) or kinds == {"list"} and (words or any(names))
    return _match(first, second, ordered, how, repeats="set" not in kinds)


def _match(
    xs: Sequence[Parsed], ys: Sequence[Parsed], ordered: bool, how: How, repeats: bool = True
) -> bool:
    """Whether the items are pairwise equal, in order or in any; without repeats {1, 1, 2} is {1, 2}."""
    if (ordered or repeats) and len(xs) != len(ys) or len(xs) * len(ys) > 400:
        return xs == ys
    if ordered:
        return all(_same(x, y, how) for x, y in zip(xs, ys, strict=True))
    if not repeats:
        return all(any(_same(x, y, how) for y in ys) for x in xs) and all(
            any(_same(x, y, how) for x in xs) for y in ys
        )
    left = list(ys)
    for x in xs:
        same = [y for y in left if y == x] or [
            y for y in left if _same(x, y, how)
        ]  # algebra only where it must be
        if not same:
            return False
        left.remove(same[0])
    return True


def _letter(text: str) -> tuple[str, str] | None:
    """(letter, what is said after it) of an answer that names one option: "B", "(B)", "B. red", "option B: red"."""
    text = _normalise(re.sub(r"^(\W*[A-Z]) +\(", r"\1: (", text))  # B (red)
    if choice := _CHOICE.fullmatch(
        re.sub("^(?:option|choice|answer) ?(?=[A-Z(])", "", text, flags=re.I)
    ):
        return (choice[1] or choice[2]).lower(), ""
    if not (option := _OPTION.fullmatch(text)):
        return None
    letter, said = (option[1] or option[2]).lower(), option[3].strip(" -–:.")
    listed = (
        re.findall("[a-z]", said) if re.fullmatch(r"(?:\W*[a-z]\b)+\W*", said) else []
    )  # B: a, c
    others = {x.lower() for x in [*_CAPITAL.findall(option[3]), *listed]}
    return None if others - {letter} else (letter, said)


def _yes_or_no(text: str) -> str | None:
    """ "yes" for "Yes, there are no gaps.", None for "yes or no" and "yes, but no"."""
    said = re.match(r"(yes|no)(?:$|(?=[,.;:!]))(.*)", _normalise(text).casefold(), re.S)
    doubt = r"(?:[,.;:!(] ?|\b(?:but|or|and) )(?:yes|no|not)\b|\b(?:yes|no)\W*$|\b(?:maybe|mean|unless|false|true|wrong)\b"
    return said[1] if said and not re.search(doubt, said[2]) else None


def _compare(prediction: str, gold: str, choices: tuple[str, ...], how: How) -> bool:
    """The verdict on an answer; may take for ever where the algebra does."""
    found, wanted = parse(prediction), parse(gold)
    letter = (
        _letter(gold)
        if wanted.kind == "choice" or re.match(r"(?i:option |choice )|\(?[A-Z][).:]", gold)
        else None
    )
    if choices and all(
        re.match(rf"\(?{chr(65 + i)}[.):]", choice) for i, choice in enumerate(choices)
    ):
        choices = tuple(re.sub(r"^\(?[A-Z][.):]+ ?", "", choice) for choice in choices)  # "A. red"
    texts = [parse(choice) for choice in choices]
    index = texts.index(wanted) if wanted in texts else ord(letter[0]) - 97 if letter else -1
    if 0 <= index < len(texts):
        return _same_choice(prediction, found, index, texts, how)
    if letter:  # the gold is a letter, or "B. red"
        if said := _letter(prediction):
            return said[0] == letter[0] and (
                "" in (said[1], letter[1]) or parse(said[1]) == parse(letter[1])
            )
        wanted = parse(letter[1] or gold)
    if found is None or wanted is None:
        return False
    if answer := _yes_or_no(gold):
        return _yes_or_no(prediction) == answer
    if (
        wanted.kind == "number" and found.kind == "formula" and found.raw.count("=") == 1
    ):  # m + n = 23 is 23
        left, right = found.raw.split("=")
        letters = _COMMAND.sub(" ", left)  # of one variable it would say what that is
        if len(set(re.findall("[a-zA-Z]", letters))) > 1 and not _WORD.search(letters):
            found = parse(right) or found
    return _same(found, wanted, how)


def _same_choice(
    prediction: str, found: Parsed | None, index: int, texts: list[Parsed | None], how: How
) -> bool:
    """Whether an answer is the index-th of the options: by its text, by its letter, or equal to it and to no other."""
    if found is not None and found in texts:
        return found == texts[index]
    if letter := _letter(prediction):
        said, own = parse(letter[1]), texts[index]
        others = [x.value for x in texts if x and x.kind == "text" and x != own]  # B. red or blue
        if (
            said
            and said != own
            and any(re.search(rf"\b{re.escape(x)}\b", _plain(letter[1])) for x in others)
        ):
            return False
        return ord(letter[0]) - 97 == index and (said is None or said not in texts or said == own)
    if found is None or texts[index] is None:
        return False
    if texts[index].value in ("yes", "no"):
        return _yes_or_no(prediction) == texts[index].value
    return _same(found, texts[index], how) and not any(
        x is not None and _same(found, x, how) for i, x in enumerate(texts) if i != index
    )


@lru_cache(maxsize=16384)
def _check_gold(answer: str) -> str:
    """A gold answer without box or tags; ValueError where no completion could ever earn it."""
    found = extract_answer(answer)  # data sets box or tag some of their answers
    found = answer.strip() if found is None else found
    if parse(found) is None:
        raise ValueError(
            f"gold answer {answer!r:.80} cannot be parsed: empty, over {MAX_CHARS} characters, or 1/0"
        )
    if extract_answer(rf"\boxed{{{found}}}") != found:
        raise ValueError(
            f"gold answer {answer!r:.80} cannot be parsed: its braces or tags are not balanced"
        )
    return found


@lru_cache(maxsize=16384)
def _verdict(prediction: str, gold: str, choices: tuple[str, ...], precision: int | None) -> bool:
    """Raises NoAnswer, which is not remembered, where the algebra could not be done at all."""
    try:
        return _compare(prediction, gold, choices, How(precision))
    except NeedsAlgebra:
        return _worker.ask(prediction, gold, choices, precision)


def grade(
    prediction: str | None,
    answer: str | Real,
    choices: Sequence[str] | None = None,
    precision: int | None = None,
) -> bool:
    """Whether an extracted answer (None: nothing was found) equals the gold answer; the module's header says how.

    choices: the options in order, so that A stands for the first and either may be the gold. precision: decimals to
    which the data set states its numbers. Any prediction gets a verdict, in at most 2 s. A gold answer that cannot be
    parsed is an error in the data and raises ValueError, whatever the prediction: grade(None, answer) checks it alone.
    """
    if isinstance(answer, Real | Decimal) and not isinstance(answer, bool):
        try:
            answer = str(Fraction(str(answer)))  # through str, so that 0.1 is 1/10
        except ValueError as error:
            raise ValueError(
                f"gold answer {type(answer).__name__} cannot be parsed: {error}"
            ) from error
    if not isinstance(answer, str):
        raise ValueError(
            f"gold answer {answer!r:.80} cannot be parsed: {type(answer).__name__} is no string or number"
        )
    gold = _check_gold(answer)
    if prediction is None:
        return False
    whole = _BOX.search(prediction) or prediction.lstrip().startswith(
        "<"
    )  # a completion; else what stood in its box
    found = extract_answer(prediction) if whole else None
    found = prediction.strip() if found is None else found
    try:
        return len(found) <= MAX_CHARS and _verdict(
            found, gold, tuple(map(str, choices or ())), precision
        )
    except NoAnswer:
        return False


# ---------------------------------------------------------------------------------------------------------- algebra

CPU_SECONDS, WALL_SECONDS, MEMORY = 0.5, 1.5, 2**30
_WARM_UP = (
    (r"2\sqrt{3}", r"\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), (r"\frac{a+b}{c}", r"\frac{a}{c}+\frac{b}{c}"),
    ("2x>6", "x>3"),
    (r"\log_2 8", "3"), (r"e^{x+1}", r"e\cdot e^x"), (r"\sin^2 x+\cos^2 x", "1"), ("y=2x+1", "2x-y+1=0"),
)  # fmt: skip


def _sympy_equal(a: str, b: str, precision: int | None) -> bool:
    """Whether two LaTeX formulas are the same, by math-verify. Unbounded: only ever called in a process of its own."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig

    if re.search(r"[0-9]_", a + b):  # 31_6: math-verify drops the base
        return False
    a, b = (re.sub(r"([0-9.]+)°", r"(\\frac{\1\\pi}{180})", text) for text in (a, b))
    plain = NormalizationConfig(
        basic_latex=True, malformed_operators=True, nits=True, units=False, boxed="none"
    )
    config = [math_verify.LatexExtractionConfig(normalization_config=plain)]
    found = [math_verify.parse(f"${text}$", config, parsing_timeout=None) for text in (a, b)]
    if not all(found) or any(isinstance(x[0], str) or x[0].has(sympy.Derivative) for x in found):
        return False
    x, y = (_plain_symbols(x[0], sympy) for x in found)
    if isinstance(x, sympy.core.relational.Relational) and isinstance(
        y, sympy.core.relational.Relational
    ):
        if not x.free_symbols or x.free_symbols != y.free_symbols:
            return False
        if not isinstance(x, sympy.Eq) and len(x.free_symbols) == 1:
            return x.as_set() == y.as_set()
    if precision is not None and x.is_number and y.is_number:
        return len({round(Fraction(str(sympy.N(z, 30))), precision) for z in (x, y)}) == 1
    options = {"float_rounding": 12, "timeout_seconds": None, "allow_set_relation_comp": True}
    return math_verify.verify(x, y, **options) or math_verify.verify(y, x, **options)


def _plain_symbols(x, sympy):
    """One symbol for each letter, real but for the imaginary unit: the parser's i of 3 + 4i and of 3 + i*4 differ."""
    if not hasattr(x, "xreplace") or x.has(sympy.Sum, sympy.Product):
        return x
    real = {
        s: sympy.I if s.name == "i" else sympy.Symbol(s.name, real=True) for s in x.free_symbols
    }
    return x.xreplace(real)


def _answer_questions() -> None:
    """The worker: for each line of input, fork a process that compares two answers; print 1 or 0.

    A question cannot disturb the next one, and nothing has to be replaced when one hangs: SIGPROF ends its process
    after CPU_SECONDS even inside of a big-number multiplication, the kernel when it asks for too much memory.
    """
    import logging

    logging.disable()  # math-verify warns that its own time limits are off
    for pair in _WARM_UP:  # fills the caches that the processes forked from now on start with
        _sympy_equal(*pair, None)
    print("ready", flush=True)
    for line in sys.stdin:
        prediction, gold, choices, precision = json.loads(line)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            os.write(
                write,
                b"1"
                if _compare(prediction, gold, tuple(choices), How(precision, _sympy_equal))
                else b"0",
            )
            os._exit(0)
        os.close(write)
        if not select.select([read], [], [], WALL_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        verdict = os.read(read, 1)  # nothing where the process has died
        os.waitpid(child, 0)
        os.close(read)
        print("1" if verdict == b"1" else "0", flush=True)


class _Worker:
    """The process that answers what needs algebra: one for each process, started by its first question."""

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
            raise RuntimeError(
                f"the process that compares formulas did not start: {' '.join(command)}"
            )

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def read(self, seconds: float) -> bytes:
        poll = select.poll()  # select.select fails at file numbers of 1,024 and more
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll(1000 * seconds) else b""

    def ask(self, *question) -> bool:
        with self.lock:
            for _ in range(2):  # a worker that was killed or stopped from outside is replaced once
                try:
                    if self.process is None:
                        self.start()
                    self.process.stdin.write(json.dumps(question).encode() + b"\n")
                    if answer := self.read(WALL_SECONDS + 0.5):
                        return answer == b"1\n"
                    self.stop()
                except BrokenPipeError:
                    self.stop()
                except (
                    BaseException
                ):  # an interrupt: the next answer must not be taken for this one's
                    self.stop()
                    raise
            raise NoAnswer


_worker = _Worker()
os.register_at_fork(
    after_in_child=lambda: _worker.__init__()
)  # a forked process must not write into its parent's pipes


# ---------------------------------------------------------------------------------------------------------- rewards


def _text(completion: Completion) -> str:
    """The text of a completion: of a conversational one, the content of its last message."""
    text = (
        completion if isinstance(completion, str) or not completion else completion[-1]["content"]
    )
    if not isinstance(text, str):
        raise TypeError(
            f"a completion must be text or messages whose content is text, got {completion!r:.200}"
        )
    return text


def accuracy_reward(
    completions: list[Completion],
    answer: list[str | Real],
    choices: list[Sequence[str] | None] | None = None,
    precision: list[int | None] | None = None,
    prose: bool = False,
    **columns,
) -> list[float]:
    """1 where the extracted answer equals the gold answer, else 0.   N, N -> N

    choices, precision: columns of the data set, as `grade` takes them. prose: read unboxed answers too.
    """
    N = len(completions)
    given = {
        "answer": answer,
        "choices": choices or [None] * N,
        "precision": precision or [None] * N,
    }
    for name, column in given.items():
        if isinstance(column, str) or len(column) != N:
            raise ValueError(
                f"{name} must be a list, one for each of {N} completions, got {column!r:.80}"
            )
    return [
        float(grade(extract_answer(_text(completion), prose), *row))
        for completion, *row in zip(completions, *given.values(), strict=True)
    ]


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
        return (
            bool(answer.strip()) and not between.strip() and not after and not _BOX.search(answer)
        )
    return (
        len(tags) == 2
        and len(_BOX.findall(parts[2])) == 1
        and bool((_last_box(parts[2]) or "").strip())
    )


def length_penalty(max_tokens: int, buffer: int) -> Callable[..., list[float]]:
    """DAPO's overlong rule as a reward: 0 up to max_tokens - buffer tokens, then linearly down to -1 at max_tokens.

    -> a reward function of completion_ids, lists of token ids. Raises ValueError unless 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"needs 0 < buffer <= max_tokens, got buffer={buffer}, max_tokens={max_tokens}"
        )

    def penalty(
        completions: list[Completion], completion_ids: list[Sequence[int]], **columns
    ) -> list[float]:
        return [
            -min(1.0, max(0.0, (len(ids) - (max_tokens - buffer)) / buffer))
            for ids in completion_ids
        ]

    return penalty


Rewards = Mapping[str, tuple[Callable[..., list[float]], float]]
REWARDS: Rewards = {
    "accuracy": (accuracy_reward, 0.9),
    "format": (format_reward, 0.1),
}  # second-hand


def load_reward(spec: str) -> tuple[str, Callable[..., list[float]], float]:
    """ "file.py:function" or "file.py:function:weight" -> name, function, weight (1 unless given).

    Raises ValueError naming what is missing. Errors inside of the file are the user's to see.
    """
    path, _, rest = spec.partition(".py:")
    name, _, weight = rest.partition(":")
    path += ".py"
    try:
        weight = float(weight or 1)
    except ValueError:
        raise ValueError(
            f"reward {spec!r}: the weight {weight!r} is no number; write file.py:function:weight"
        ) from None
    if not name or not os.path.isfile(path):
        raise ValueError(
            f"reward {spec!r}: no file {path}; write file.py:function or file.py:function:weight"
        )
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(function := getattr(module, name, None)):
        raise ValueError(f"reward {spec!r}: {path} has no function {name}")
    return name, function, weight


def total_reward(
    completions: list[Completion], answer: list[str | Real], rewards: Rewards = REWARDS, **columns
) -> dict[str, list[float]]:
    """reward_i = sum_k w_k r_k,i, with each r_k beside it under its own name.   N, N -> {name: N}

    A reward that raises or returns anything but N finite numbers is a RuntimeError that names it and the completion,
    and with a column `row` its row of the data set: never a silent 0.
    """
    columns = columns | {"answer": answer}
    parts = {
        name: _checked(name, function, completions, columns)
        for name, (function, _) in rewards.items()
    }
    weights = [weight for _, weight in rewards.values()]
    totals = [
        sum(w * r for w, r in zip(weights, row, strict=True))
        for row in zip(*parts.values(), strict=True)
    ]
    return {"reward": totals, **parts}


def _checked(
    name: str, function: Callable, completions: list[Completion], columns: dict[str, list]
) -> list[float]:
    """The values of one reward; an error says which completion it comes from."""
    try:
        values = list(function(completions, **columns))
        if len(values) != len(completions):
            raise ValueError(f"it returned {len(values)} values for {len(completions)} completions")
        if bad := [
            v for v in values if not isinstance(v, Real) or not abs(float(v)) < float("inf")
        ]:
            raise ValueError(f"it returned {bad[0]!r:.80}, which is no finite number")
        return [float(v) for v in values]
    except Exception as error:  # re-raised, with its place
        if len(completions) > 1:
            for i, completion in enumerate(completions):
                _checked(name, function, [completion], {k: [v[i]] for k, v in columns.items()})
        row = f"row {columns['row'][0]}, " if "row" in columns and len(completions) == 1 else ""
        where = (
            f"{row}completion {completions[0]!r:.200}"
            if len(completions) == 1
            else "the whole batch"
        )
        raise RuntimeError(
            f"the reward {name!r} failed on {where}: {type(error).__name__}: {error}"
        ) from error


# ------------------------------------------------------------------------------------------------------ command line


def explain(completion: str, gold: str, choices: Sequence[str] | None = None) -> str:
    """What is extracted, how both answers are read, how they are compared, the verdict: four lines."""
    extracted, wanted = extract_answer(completion, prose=True), _check_gold(gold)
    prose = (
        " (from prose: a reward reads it only with prose=True)"
        if extract_answer(completion) is None
        else ""
    )
    try:
        readable = extracted is not None and len(extracted) <= MAX_CHARS
        verdict, how = (
            readable and _compare(extracted, wanted, tuple(choices or ()), How()),
            "by rule",
        )
    except NeedsAlgebra:
        verdict, how = grade(extracted, gold, choices), "by algebra (math-verify)"
    lines = [f"extracted  {extracted!r}{prose if extracted is not None else ''}"]
    lines += [
        f"read as    {parse(extracted) if extracted else None}",
        f"gold       {parse(wanted)}",
    ]
    return "\n".join([*lines, f"{how}: {'right' if verdict else 'wrong'}"])


def regrade(path: str) -> str:
    """Grade a .jsonl file again: eval.py's lines (responses, right, answer) or {completion or prediction, answer}."""
    n = right = 0
    changed = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            record = json.loads(line)
            texts = record.get("responses") or [
                record[k] for k in ("completion", "prediction") if k in record
            ]
            if not texts or "answer" not in record:
                raise ValueError(
                    f"{path}, line {number}: needs answer and one of responses, completion, prediction"
                )
            extra = {
                name: [record[name]] * len(texts)
                for name in ("choices", "precision")
                if record.get(name)
            }
            found = accuracy_reward(texts, [record["answer"]] * len(texts), **extra)
            before = record.get("right", found)
            n, right = n + len(texts), right + sum(found)
            changed += [
                f"line {number}: {x!r:.80} was {b}, is {f}"
                for x, f, b in zip(texts, found, before, strict=True)
                if f != b
            ]
    return "\n".join(
        [*changed, f"{n} answers, {right / max(1, n):.4f} right, {len(changed)} verdicts changed"]
    )


def main(arguments: list[str]) -> None:
    if arguments == ["--answer-questions"]:
        return _answer_questions()
    if len(arguments) == 2 and arguments[0] == "--file":
        return print(regrade(arguments[1]))
    if len(arguments) != 2:
        sys.exit(
            'usage: python rewards.py "completion" "gold" | python rewards.py --file predictions.jsonl'
        )
    print(explain(*arguments))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"rewards.py: {error}")
