"""The pages are true: tables are the results, links lead somewhere, commands exist."""

import re
from pathlib import Path

import pytest

import eval as evaluation
import train_saei
from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"train_saei.py": train_saei.load_config, "eval.py": evaluation.load_config}
MANUALS = ["README.md", "docs/walkthrough/README.md"]
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_those_of_the_results(name):
    page = (ROOT / name).read_text()
    assert tables.fill(page, tables.PAGES[name]) == page, "run python -m benchmarks.tables"


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"```[\s\S]*?```", "", page)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", [*MANUALS, *DOCS])
def test_links_lead_to_files_functions_and_headings_and_never_to_lines(name):
    page = ROOT / name
    links = re.findall(r"\[([^\]]+)\]\(((?!https?:)[^)\s]+)\)", page.read_text())
    assert len(links) > 10 or name in DOCS
    broken = []
    for text, link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif heading and heading not in anchors(target.read_text()):
            broken.append(link)
        elif re.fullmatch(r"`\w+`", text) and target.suffix == ".py":
            if not re.search(rf"\b{text[1:-1]}\b", target.read_text()):
                broken.append(f"{text} in {link}")
    assert broken == []


@pytest.mark.parametrize("name", MANUALS)
def test_commands_name_scripts_recipes_and_options_that_exist(name):
    """Of every shown command. my_... and out/... are the reader's own files."""
    page = (ROOT / name).read_text()
    blocks = "\n".join(re.findall(r"```bash\n([\s\S]*?)```", page)).replace("\\\n", " ")
    prose = re.sub(r"```[\s\S]*?```", "", page)
    spans = re.findall(r"`((?:python|accelerate launch|bash) [^`]*)`", prose)
    lines = [line for line in [*blocks.splitlines(), *spans] if line.split("#")[0].strip()]
    assert len(lines) >= 4
    for line in lines:
        words = line.split("#")[0].split()
        for word in words:
            if re.fullmatch(r"[\w/]+\.(py|yaml|sh)", word) and not word.startswith("my"):
                assert (ROOT / word).exists(), line
        if "-m" in words:
            module = words[words.index("-m") + 1]
            file = ROOT / f"{module.replace('.', '/')}.py"
            assert module in ("pytest", "venv", "pip") or file.exists(), line
        for script, load_config in PROGRAMS.items():
            if script in words and "--help" not in words:
                options = [word for word in words[words.index(script) + 1 :] if word != "..."]
                load_config([*options, "--output", "out"])  # raises for what it does not know
