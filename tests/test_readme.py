"""The pages say what is so: tables are the results', links lead somewhere, quotations are code."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import eval as evaluation
import train_saei

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import tables  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results():
    for name, makers in tables.PAGES.items():
        page = (ROOT / name).read_text()
        assert tables.fill(page, makers) == page, f"{name}: run python -m benchmarks.tables"
    if picture := tables.study_tables.picture(ROOT / "study/results"):
        assert (ROOT / "docs/study.svg").read_text() == picture


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"```[\s\S]*?```", "", page)
    return {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/walkthrough/README.md",
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(name):
    """To files that exist, to lines that they have, to headings of theirs."""
    page, broken = ROOT / name, []
    links = re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text())
    assert len(links) > 10 or name.startswith("docs/")
    for link in links:
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif re.fullmatch(r"L\d+(-L\d+)?", place):
            numbers = [int(n) for n in re.findall(r"\d+", place)]
            if numbers != sorted(numbers) or numbers[-1] > len(target.read_text().splitlines()):
                broken.append(link)
        elif place and place not in anchors(target.read_text()):
            broken.append(link)
    assert broken == []


def test_quotations_and_line_links_follow_the_code(tmp_path, monkeypatch):
    """Moved lines are found again; a text that is gone or there twice is an error that names it."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n\n\ndef f(y):\n    y += x\n    return f(y)\n")
    page = "[`f`](a.py#L9), [`x = 1`](a.py#L9)\n<!-- code a.py: y += ... return -->\nold\n<!-- /code -->\n"
    quoted = "[a.py, lines 5 to 6](a.py#L5-L6)\n\n```python\ny += x\nreturn f(y)\n```\n"
    expected = f"[`f`](a.py#L4), [`x = 1`](a.py#L1)\n<!-- code a.py: y += ... return -->\n{quoted}<!-- /code -->\n"
    assert tables.fill(page, {}) == expected and tables.fill(expected, {}) == expected
    for text in ("[`gone`](a.py#L1)", "[`y`](a.py#L1)"):
        with pytest.raises(ValueError, match=r"a.py has [03] lines with '(gone|y)'"):
            tables.fill(text, {})


def test_the_readmes_figures_of_the_graders_are_the_measured_ones():
    graders = json.loads((ROOT / "benchmarks/graders.json").read_text())["kinds"]["all"]
    text = " ".join(README.split("## Rewards")[1].split("\n## ")[0].split())
    assert f"On {graders['n']:,} grading cases" in text
    for name, x in graders["graders"].items():
        assert f"{x['right'] / graders['n']:.1%}" in text, name
        assert not x["false positives"] or f"({x['false positives']}" in text, name


@pytest.mark.parametrize("name", ["README.md", "docs/walkthrough/README.md"])
def test_commands_name_scripts_recipes_and_options_that_exist(name):
    """Of every shown command; my_... and out/... are the reader's."""
    shown = "\n".join(re.findall(r"```bash\n([\s\S]*?)```", (ROOT / name).read_text())).replace(
        "\\\n", " "
    )
    spans = re.findall(
        r"`((?:python|accelerate launch|bash) [^`]*)`",
        re.sub(r"```[\s\S]*?```", "", (ROOT / name).read_text()),
    )
    commands = [
        line.split("#")[0].split() for line in [*shown.splitlines(), *spans] if line.strip()
    ]
    assert len(commands) >= 4
    known = {
        script: {field.name for field in dataclasses.fields(config)} | {"config", "help"}
        for script, config in (
            ("train_saei.py", train_saei.Config),
            ("eval.py", evaluation.EvalConfig),
        )
    }
    for words in commands:
        files = [
            word
            for word in words
            if re.fullmatch(r"[\w/]+\.(py|yaml|sh)", word) and not word.startswith("my")
        ]
        assert [word for word in files if not (ROOT / word).exists()] == [], words
        for script in set(files) & set(known):
            options = [word[2:] for word in words[words.index(script) :] if word.startswith("--")]
            assert set(options) <= known[script], words
