"""docs/walkthrough: the page shows what is computed, the exercises' checks tell right from wrong.

tests/test_readme.py checks the files and headings that links lead to.
"""

import ast
import math
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs/walkthrough"
sys.path.insert(0, str(FOLDER))

import test_exercises as exercises  # noqa: E402
import worked_example  # noqa: E402

PAGE = (FOLDER / "README.md").read_text()

# exercise -> typical mistakes: (text of the solution, text in its place)
PASS_AT_K = "prod((n - c - i) / (n - i) for i in range(k))"
WRONG = {
    "exercise_1_entropy": [
        ("checkpoint(chunk_entropy, rows, use_reentrant=False)", "chunk_entropy(rows)"),
        ("hidden.split(size)", "hidden.split(len(hidden))"),  # all logits at once
        ("logp.masked_fill(banned, 0.0)", "logp"),  # 0 * -inf
        ("rows @ head.T", "rows.detach() @ head.T"),
        ("logits.log_softmax(-1)", "(logits.log_softmax(-1) / 0.6931)"),  # bits, not nats
        (".masked_fill(banned, -torch.inf)", ""),  # banned tokens in the distribution
    ],
    "exercise_2_tsec": [
        ("entropy.masked_fill(~mask, torch.nan)", "entropy"),  # padding in the quantiles
        ("dim=1, keepdim=True", "dim=None"),  # quantiles of the batch
        ("mask & (entropy", "(entropy"),
        (">= lower", "> lower"),
        ("<= upper", "< upper"),
        ("entropy.masked_fill(", "entropy.masked_fill_("),
    ],
    "exercise_3_pgd": [
        ("return x.clamp(0.0, 1.0)", "return x"),
        ("torch.minimum(torch.maximum(x, x0 - eps), x0 + eps)", "x"),  # only [0, 1]
        ("grad.sign()", "grad / grad.norm()"),
        ("x + step_size", "x - step_size"),
        ("x = x + step_size * grad.sign()", "x += step_size * grad.sign()"),
        ("x0 - eps), x0 + eps)", "x - eps), x + eps)"),  # the ball of the last image
    ],
    "exercise_4_pass_at_k": [
        (PASS_AT_K, "(1 - c / n) ** k"),
        (PASS_AT_K, "float(c == 0)"),  # any of all n
        ("1.0 - " + PASS_AT_K, "c / n"),
    ],
    "exercise_5_advantages": [
        ("correction=1", "correction=0"),
        (".masked_fill(equal, 0.0)", ""),
        ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        ("dim=1, keepdim=True, correction=1", "correction=1"),
        ("rewards - rewards.mean(dim=1, keepdim=True)", "rewards.sub_(rewards.mean(1, True))"),
    ],
    "exercise_6_loss": [
        ("/ tokens", "/ mask.sum()"),  # a normaliser per micro-batch
        ("surrogate.masked_fill(~mask, 0.0).sum() / tokens", "surrogate[mask].mean()"),
        ("torch.minimum(ratio * a, ", "("),  # clipped on both sides, whatever the sign
        ("return -surrogate", "return surrogate"),
        ("(logprobs - old_logprobs).masked_fill(~mask, 0.0)", "logprobs - old_logprobs"),
        ("surrogate.masked_fill(~mask, 0.0)", "surrogate"),  # padding counts as ratio 1
        ("1 + clip_high", "1 + clip_low"),
    ],
    "exercise_7_conditioning": [
        ("logp_old(images, tokens)", "recorded"),  # of the attacked image, against the clean one
        ('condition == "clean"', 'condition != "clean"'),
        ("torch.where(adversarial[:, None], attacked, clean)", "attacked"),
        ('clean if condition == "clean" else ', ""),
        ("torch.no_grad()", "torch.enable_grad()"),
        ("logp(images, tokens) - old", "(logp(images, tokens) - old).detach()"),
        ("logp_old(images, tokens)", "logp(images, tokens)"),
    ],
}
MISTAKES = [(name, old, new) for name, pairs in WRONG.items() for old, new in pairs]


def solution_text(name: str) -> str:
    return (FOLDER / "solutions" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_a_solution_passes_and_has_the_signature_of_the_task(name):
    exercise = exercises.load(FOLDER / f"{name}.py")
    task = exercises.stub(exercise)
    solution = getattr(exercises.load(FOLDER / "solutions" / f"{name}.py"), task.__name__)
    exercise.check(solution)
    assert list(solution.__annotations__) == list(task.__annotations__)


@pytest.mark.parametrize("name, old, new", MISTAKES)
def test_a_typical_mistake_fails(name, old, new, tmp_path):
    text, path = solution_text(name), tmp_path / "solution.py"
    assert old in text, f"the solution has no {old!r} any more"
    path.write_text(text.replace(old, new))
    exercise = exercises.load(FOLDER / f"{name}.py")
    mistaken = getattr(exercises.load(path), exercises.stub(exercise).__name__)
    with pytest.raises(AssertionError):
        exercise.check(mistaken)


def test_a_reader_who_has_solved_some(tmp_path):
    """In a copy, those pass. The others fail. What is committed is unsolved."""
    copy = shutil.copytree(FOLDER, tmp_path / "mine")
    solved = exercises.EXERCISES[::2]
    for name in solved:
        with (copy / f"{name}.py").open("a") as file:
            file.write(solution_text(name))  # below the task: it replaces the stub
    copied = exercises.load(copy / "test_exercises.py")
    assert copied.HERE == copy and copied.EXERCISES == list(WRONG)
    for name in copied.EXERCISES:
        with pytest.raises(NotImplementedError):
            exercises.test_exercise(name)
        unsolved = nullcontext() if name in solved else pytest.raises(NotImplementedError)
        with unsolved:
            copied.test_exercise(name)


def test_every_exercise_is_on_the_page_and_none_in_the_projects_test_run():
    assert re.findall(r"\((exercise_\w+)\.py\)", PAGE) == list(WRONG)
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"pytest .* tests$", (ROOT / "run.sh").read_text(), re.MULTILINE)


# ------------------------------------------------------------------------------ the worked example

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def differences(shown: str, now: str) -> list[str]:
    """Lines that differ in a word, or in a number by more than one of its last digit."""
    found = []
    for a, b in zip(shown.splitlines(), now.splitlines(), strict=True):
        same = NUMBER.sub("#", a) == NUMBER.sub("#", b)
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=False):
            last_digit = 10 ** -len(x.partition(".")[2])
            same = same and abs(float(x) - float(y)) <= 1.01 * last_digit
        if not same:
            found.append(f"- {a}\n+ {b}")
    return found


def test_differences_of_rounding_are_let_pass_and_others_seen():
    assert differences("H 0.123 to -0.20, 5%", "H 0.124 to -0.19, 6%") == []
    assert len(differences("H 0.123\nx 1", "H 0.125\nx 1")) == 1
    assert len(differences("H 0.123", "h 0.123")) == len(differences("1 2", "1")) == 1


@pytest.fixture(scope="module")
def results():
    return worked_example.compute()


def test_the_page_shows_what_the_script_computes(results):
    found = differences(PAGE, worked_example.fill(PAGE, results))
    assert not found, "\n".join(["run python docs/walkthrough/worked_example.py --write", *found])
    assert sorted(name for name, _ in worked_example.BLOCK.findall(PAGE)) == sorted(results)


def test_a_page_with_other_numbers_is_filled_and_one_with_other_rows_refused(results):
    bold = re.search(r"\*\*\d+%\*\* of the ratios", PAGE)[0]
    other = PAGE.replace(bold, "**99%** of the ratios").replace("log-prob of the whole -4", "5")
    assert worked_example.fill(other, results) == worked_example.fill(PAGE, results) != other
    for wrong in ("99% of the ratios", "**99%** of the **ratios**"):
        with pytest.raises(ValueError, match="1 bold number"):
            worked_example.fill(PAGE.replace(bold, wrong), results)


def test_worked_numbers_are_those_of_the_formulas(results):
    """A = (r - mean) / std with G - 1; the loss is -sum A_i |y_i| / tokens."""
    rows = {"reward": [], "A": []}
    for line in results["worked 5"]:
        if match := re.match(r" +(reward|A) +([-. \d]+)", line):
            rows[match[1]].append([float(x) for x in match[2].split()])
    for rewards, advantages in zip(rows["reward"], rows["A"], strict=True):
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
        assert advantages == pytest.approx([(r - mean) / std for r in rewards], abs=0.006)
    text = "\n".join(results["worked 6"])
    numbers = re.search(r"tokens of each response (.+), in all", text)[1]
    lengths = [int(x) for x in NUMBER.findall(numbers)]
    advantages = [a for row in rows["A"] for a in row]
    expected = -sum(a * n for a, n in zip(advantages, lengths, strict=True)) / sum(lengths)
    assert float(re.search(r"loss (\S+)", text)[1]) == pytest.approx(expected, abs=2e-3)


# ------------------------------------------------------------------------------ quotations, links


def function_source(path: Path, name: str) -> str:
    """The text of the function or method `name` ("f" or "Class.f"), "" if there is none."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name.split(".")[-1]:
            return ast.get_source_segment(text, node)
    return ""


def without_layout(code: str) -> str:
    """Formatters break lines of a page and of a file at different places."""
    return re.sub(r"\s", "", code).replace(",)", ")")


def test_quoted_code_is_in_the_function_that_is_named_above_it():
    """`name` in [file](path), then the block."""
    *before, _ = PAGE.split("```python\n")
    codes = re.findall(r"```python\n([\s\S]+?)```", PAGE)
    for text, code in zip(before, codes, strict=True):
        name, file = re.findall(r"`([\w.]+)` in \[\S+\]\((\S+)\)", text.rsplit("```")[-1])[-1]
        source = without_layout(function_source(FOLDER / file, name))
        assert without_layout(code) in source, f"{name} in {file} has no\n{code}"


def test_links_name_functions_and_no_lines():
    for name, file in re.findall(r"\[`(\w+)`\]\((\S+?)\)", PAGE):
        assert re.search(rf"(def|class) {name}\b", (FOLDER / file).read_text()), f"{name} in {file}"
    assert not re.search(r"\]\(\S+#L\d", PAGE)


def test_every_fenced_block_is_computed_quoted_or_run():
    """text: the script's; python: quoted; bash: what the tests above do."""
    page = re.sub(r"```python\n[\s\S]+?```", "", worked_example.BLOCK.sub("", PAGE))
    commands = []
    for block in re.findall(r"```bash\n([\s\S]+?)```", page):
        commands += [" ".join(line.split("#")[0].split()) for line in block.splitlines()]
    assert page.count("```") == 2 * page.count("```bash")
    assert commands == [
        "bash run.sh test",
        ". .venv/bin/activate",
        "python docs/walkthrough/worked_example.py",
        "python -m pytest docs/walkthrough",
        "cp -r docs/walkthrough mine",
        "python -m pytest mine -k exercise_3",
    ]
