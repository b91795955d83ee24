"""README.md and docs/grading.md say what is so: tables are the results', files exist."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tables

    for name, makers in tables.PAGES.items():
        page = (ROOT / name).read_text()
        assert tables.fill(page, makers) == page, f"{name}: run python benchmarks/tables.py"
    if picture := tables.study_tables.picture(ROOT / "results"):
        assert (ROOT / "docs/study.svg").read_text() == picture


def test_linked_files_exist():
    links = re.findall(r"\]\(([\w./-]+)(?:#L\d+)?\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_figures_of_the_graders_are_the_measured_ones():
    graders = json.loads((ROOT / "benchmarks/graders.json").read_text())["kinds"]["all"]
    text = " ".join(README.split("## Rewards")[1].split("\n## ")[0].split())
    assert f"On {graders['n']:,} grading cases" in text
    for name, x in graders["graders"].items():
        assert f"{x['right'] / graders['n']:.1%}" in text, name
        assert not x["false positives"] or f"({x['false positives']}" in text, name
