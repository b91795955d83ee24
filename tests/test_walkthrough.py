"""docs/walkthrough/README.md and walkthrough/: the page shows what its script prints, the exercises' checks tell right from wrong.

Links, lines and quoted code of all pages: tests/test_readme.py.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs/walkthrough"))
import test_exercises as exercises  # noqa: E402
import worked_example  # noqa: E402

PAGE = (ROOT / "docs/walkthrough/README.md").read_text()

# exercise -> what a solution often has instead: (text of the solution, text in its place)
WRONG = {
    "exercise_1_entropy": [
        (
            "checkpoint(of_chunk, rows, use_reentrant=False)",
            "of_chunk(rows)",
        ),  # keeps all for the backward
        ("hidden.split(size)", "hidden.split(len(hidden))"),  # all logits at once
        ("logp.masked_fill(banned, 0.0)", "logp"),  # 0 * -inf
        ("rows @ head.T", "rows.detach() @ head.T"),
        ("logits.log_softmax(-1)", "(logits.log_softmax(-1) / 0.6931)"),  # not nats
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
        ("prod((n - c - i) / (n - i) for i in range(k))", "(1 - c / n) ** k"),
        ("prod((n - c - i) / (n - i) for i in range(k))", "float(c == 0)"),  # any of all n
        ("1.0 - prod((n - c - i) / (n - i) for i in range(k))", "c / n"),
    ],
    "exercise_5_advantages": [
        ("correction=1", "correction=0"),
        (".masked_fill(equal, 0.0)", ""),
        ("rewards.mean(dim=1, keepdim=True)", "rewards.mean()"),
        ("dim=1, keepdim=True, correction=1", "correction=1"),
        ("centred = rewards - ", "centred = rewards.sub_("),
    ],
    "exercise_6_loss": [
        ("/ tokens", "/ mask.sum()"),  # a normaliser per micro-batch
        (
            "surrogate.masked_fill(~mask, 0.0).sum() / tokens",
            "(surrogate.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).mean()",
        ),
        ("torch.minimum(ratio * a, ", "("),  # clipped on both sides, whatever the sign
        ("return -surrogate", "return surrogate"),
        (
            "(logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()",
            "(logprobs - old_logprobs).exp()",
        ),
        ("surrogate.masked_fill(~mask, 0.0)", "surrogate"),  # padding counts as ratio 1
        ("1 + clip_high", "1 + clip_low"),
    ],
    "exercise_7_conditioning": [
        ("logp_old(images, tokens)", "recorded"),  # of the attacked image, below one of the clean
        ('condition == "clean"', 'condition != "clean"'),
        ("torch.where(adversarial[:, None], attacked, clean)", "attacked"),
        ('clean if condition == "clean" else ', ""),
        ("torch.no_grad()", "torch.enable_grad()"),
        ("logp(images, tokens) - old", "(logp(images, tokens) - old).detach()"),
        ("logp_old(images, tokens)", "logp(images, tokens)"),
    ],
}


def load(text: str, folder: Path):
    path = folder / "solution.py"
    path.write_text(text)
    return exercises.load(path)


def parts(name: str):
    """-> an exercise's check, the name of its function, its solution's text"""
    module = exercises.load(ROOT / "docs/walkthrough" / f"{name}.py")
    solution = ROOT / "docs/walkthrough/solutions" / f"{name}.py"
    return module.check, exercises.stub(module).__name__, solution.read_text()


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_a_solution_passes_and_has_the_stubs_signature(name, tmp_path):
    check, function, text = parts(name)
    solution = getattr(load(text, tmp_path), function)
    check(solution)
    stub = exercises.stub(exercises.load(ROOT / "docs/walkthrough" / f"{name}.py"))
    assert list(stub.__annotations__) == list(solution.__annotations__)


@pytest.mark.parametrize(
    "name, wrong", [(name, i) for name in WRONG for i in range(len(WRONG[name]))]
)
def test_a_typical_wrong_solution_fails(name, wrong, tmp_path):
    check, function, text = parts(name)
    old, new = WRONG[name][wrong]
    assert old in text, f"the solution has no {old!r} any more"
    text = text.replace(old, new)
    text = text.replace(
        "rewards.sub_(rewards.mean(dim=1, keepdim=True)", "rewards.sub_(rewards.mean(1, True))"
    )
    with pytest.raises(AssertionError):
        check(getattr(load(text, tmp_path), function))


def test_every_exercise_has_wrong_solutions_and_a_place_in_the_page():
    assert list(WRONG) == exercises.EXERCISES
    assert {path.stem for path in (ROOT / "docs/walkthrough/solutions").glob("*.py")} == set(WRONG)
    assert [name for name in WRONG if f"walkthrough/{name}.py" not in PAGE] == []


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_a_stub_is_unsolved(name):
    """Solve them in a copy (docs/walkthrough/README.md): what is committed is the task."""
    module = exercises.load(ROOT / "docs/walkthrough" / f"{name}.py")
    with pytest.raises(NotImplementedError):
        module.check(exercises.stub(module))


def test_a_reader_who_has_solved_some(tmp_path):
    """In a copy, by the page's command: those pass, the others fail; the project's own test run sees none of it."""
    shutil.copytree(ROOT / "docs/walkthrough", tmp_path / "mine")
    solved = exercises.EXERCISES[::2]
    for name in solved:
        path = tmp_path / "mine" / f"{name}.py"
        _, _, text = parts(name)
        path.write_text(
            path.read_text().replace("def check(", f"{text}\n\ndef check(")
        )  # after the stub, over it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"{len(WRONG) - len(solved)} failed, {len(solved)} passed" in run.stdout, run.stdout
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()
    assert "pytest -q tests" in (ROOT / "run.sh").read_text()


# ------------------------------------------------------------------------------------------------- the worked example

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def differences(shown: str, now: str) -> list[str]:
    """Lines that differ in a word, or in a number by more than one of its last digit."""
    found, shown, now = [], shown.splitlines(), now.splitlines()
    if len(shown) != len(now):
        return [f"{len(shown)} lines, now {len(now)}"]
    for a, b in zip(shown, now, strict=True):
        digits = [10 ** -len(x.partition(".")[2]) for x in NUMBER.findall(a)]
        numbers = [[float(x) for x in NUMBER.findall(line)] for line in (a, b)]
        words = NUMBER.sub("#", a) == NUMBER.sub("#", b)
        if not words or any(
            abs(x - y) > 1.01 * d for x, y, d in zip(*numbers, digits, strict=True)
        ):
            found.append(f"- {a}\n+ {b}")
    return found


def test_differences_of_rounding_are_let_pass_and_others_seen():
    assert differences("H 0.123 to -0.20, 5%", "H 0.124 to -0.19, 6%") == []
    assert len(differences("H 0.123\nx 1", "H 0.125\nx 1")) == 1
    assert len(differences("H 0.123", "h 0.123")) == len(differences("1\n2", "1")) == 1


@pytest.fixture(scope="module")
def printed():
    return worked_example.blocks()


def test_the_page_shows_what_the_script_prints(printed):
    shown = {
        name: PAGE.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
        for name in printed
    }
    found = {name: differences(shown[name], printed[name]) for name in printed}
    assert not any(found.values()), (
        "python docs/walkthrough/worked_example.py --write\n" + "\n".join(sum(found.values(), []))
    )
    assert len(re.findall(r"<!-- (worked|otherwise) \d -->", PAGE)) == len(printed)


def test_the_script_writes_its_blocks_where_they_belong(printed):
    blank = PAGE
    for name in printed:
        head, rest = blank.split(f"<!-- {name} -->\n")
        blank = f"{head}<!-- {name} -->\n<!-- /{name} -->{rest.split(f'<!-- /{name} -->')[1]}"
    filled = worked_example.fill(blank, printed)
    assert differences(PAGE, filled) == [] and filled != blank


def test_every_fenced_block_is_one_that_is_made_or_run():
    """text: the script's; python: quoted from a file; bash: what the tests above run."""
    page = re.sub(r"<!-- (worked \d) -->\n```text\n[\s\S]*?\n```\n<!-- /\1 -->", "", PAGE)
    page = re.sub(r"<!-- code .+ -->\n\[.+\n\n```python\n[\s\S]*?\n```\n<!-- /code -->", "", page)
    blocks = re.findall(r"```(\w*)\n([\s\S]*?)\n```", page)
    assert {kind for kind, _ in blocks} == {"bash"} and page.count("```") == 2 * len(blocks)
    lines = [
        line.split("#")[0].split() for line in "\n".join(text for _, text in blocks).splitlines()
    ]
    assert lines == [
        ["bash", "run.sh", "test"],
        [".", ".venv/bin/activate"],
        ["python", "walkthrough/worked_example.py"],
        ["python", "-m", "pytest", "docs/walkthrough"],
        ["cp", "-r", "docs/walkthrough", "mine"],
        ["python", "-m", "pytest", "mine", "-k", "exercise_3"],
    ]


def test_worked_numbers_are_those_of_the_formulas(printed):
    """By hand: prompt 1 has rewards 0.1, 1, 1, 1, so A = (r - 0.775) / 0.45; the loss is -sum A_i |y_i| / tokens."""
    table = printed["worked 5"].split("prompt 1")[1]
    rewards, advantages = (
        [float(x) for x in re.findall(rf"{name} +(.+?)(?:   |\n)", table)[0].split()]
        for name in ("reward", "A")
    )
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    assert advantages == pytest.approx([(r - mean) / std for r in rewards], abs=0.006)
    first = [float(x) for x in re.findall(r"A +(.+)\n", printed["worked 5"])[0].split()]
    lengths = [
        int(x)
        for x in re.findall(r"tokens of each response \[\[(.+?)\]\]", printed["worked 6"])[0]
        .replace("], [", ", ")
        .split(", ")
    ]
    loss = float(re.search(r"loss (-?[\d.]+)", printed["worked 6"])[1])
    expected = -sum(a * n for a, n in zip(first + advantages, lengths, strict=True)) / sum(lengths)
    assert loss == pytest.approx(expected, abs=2e-3)
