"""Write the tables of the README and of docs/ from the results that benchmarks left: python -m benchmarks.tables

Each stands between <!-- name --> and <!-- /name -->; of docs/metrics.md the column "on the demo". tests/test_readme.py and
tests/test_metrics_page.py check that the pages are what this writes.
Links to lines and quoted code are found by their text, so that no line number is typed:
    [`text`](file.py#L12)                                   the one line of file.py that defines or contains text
    <!-- code file.py: first line ... last line -->         quoted, with a link, up to <!-- /code -->
"""

import json
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
from study import tables as study_tables
from study.tables import per_problem  # noqa: E402

STEPS = [
    (
        r"# 1  ",
        "sample G_clean responses per prompt from pi_old(. | I, Q), recording token entropies",
    ),
    (r"# 2  ", "TsEC: choose the tokens of moderate entropy"),
    (
        r"# 3  ",
        "EgAS: PGD on I, in [0, 1], upward on the entropy of the chosen tokens, parameters frozen",
    ),
    (r"# 4  ", "sample G_adv responses from pi_old(. | I_adv, Q)"),
    (
        r"# 5  ",
        "reward all G = G_clean + G_adv responses; advantages within the group of one prompt",
    ),
    (
        r"# 6  ",
        "GRPO update, conditioned on the clean image or on the one a response was sampled from",
    ),
]


def algorithm() -> str:
    """The six steps, each linked to its line."""
    lines = (ROOT / "train_saei.py").read_text().splitlines()
    numbers = [
        next(i for i, line in enumerate(lines, 1) if line.strip().startswith(mark))
        for mark, _ in STEPS
    ]
    rows = zip(numbers, STEPS, strict=True)
    return "\n".join(
        f"{i}. {text} ([line {n}](train_saei.py#L{n}))" for i, (n, (_, text)) in enumerate(rows, 1)
    )


def attack() -> str:
    """Entropy and accuracy by image at the demo's eps, then over eps."""
    result = json.loads((ROOT / "benchmarks/attack.json").read_text())
    change = lambda x: "{:+.0%} [{:+.0%}, {:+.0%}]".format(*x)  # noqa: E731
    head = [
        "image",
        "H of TsEC's tokens",
        "change",
        "H of fresh responses",
        "their accuracy",
        "PSNR, dB",
    ]
    head += ["H after PNG", "accuracy after PNG"]
    out = ["| " + " | ".join(head) + " |", "|---|---|---|---|---|---|---|---|"]
    for name, x in result["table"].items():
        cells = [
            name,
            f"{x['chosen']:.4f}",
            change(x["change of chosen"]),
            f"{x['fresh']:.4f}",
            f"{x['accuracy']:.3f}",
        ]
        cells += [
            f"{x['psnr']:.1f}" if x["psnr"] < 99 else "",
            f"{x['chosen (PNG)']:.4f}",
            f"{x['accuracy (PNG)']:.3f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    note = f"{result['model']} on {result['problems']} prompts of {result['split']}, eps = {result['eps']:.2g}/255; nats; "
    note += "change to the clean image, 95% interval over prompts. `python -m benchmarks.attack`. "
    note += f"Over eps, the first {result['sweep_problems']} prompts:"
    sweep = [
        "| eps, 1/255 | random signs: H | fresh accuracy | EgAS + TsEC, 5 steps: H | fresh H | fresh accuracy |"
    ]
    sweep += ["|---|---|---|---|---|---|"]
    for eps, rows in result["sweep"].items():
        random, egas = rows["random signs"], rows["EgAS + TsEC, 5 steps"]
        cells = [f"{float(eps):g}", change(random["change of chosen"]), f"{random['accuracy']:.3f}"]
        cells += [
            change(egas["change of chosen"]),
            change(egas["change of fresh"]),
            f"{egas['accuracy']:.3f}",
        ]
        sweep.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", note, "", *sweep])


def easyvqa() -> str:
    """The foreign data set before and after: mean and range over seeds; before, one evaluation's 95% interval."""
    result = json.loads((ROOT / "benchmarks/easyvqa.json").read_text())
    names, arms = ("greedy", "pass@1", "pass@8", "entropy"), {"grpo": "plain GRPO", "saei": "SaEI"}
    out = ["| run | " + " | ".join(names) + " | minutes |", "|---|" + "---|" * (len(names) + 1)]
    interval = lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(*x)  # noqa: E731
    out.append(
        "| before | " + " | ".join(interval(result["before"][name]) for name in names) + " | |"
    )
    for arm, title in arms.items():
        runs, cells = [run for run in result["runs"] if run["arm"] == arm], []
        for name in names:
            values = [run["after"][name][0] for run in runs]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        minutes = f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}"
        out.append(f"| {title} | " + " | ".join(cells) + f" | {minutes} |")
    first = min(
        result["runs"], key=lambda run: (run["arm"], run["seed"])
    )  # what one evaluation is worth
    seeds = ", ".join(map(str, sorted({run["seed"] for run in result["runs"]})))
    note = (
        f"Mean (lowest to highest) of seeds {seeds}; {result['problems']} questions of the test split, in brackets the "
        f"95% interval over them (after, {arms[first['arm']]} of seed {first['seed']}: greedy "
        f"{interval(first['after']['greedy'])}); minutes of training on one CPU core. `python -m benchmarks.easyvqa`"
    )
    return "\n".join([*out, "", note])


def families() -> str:
    """What every family's tiny model showed."""
    rows = json.loads((ROOT / "benchmarks/families.json").read_text())
    numbers = ["pixel_values", "log-probs", "pixel gradient", "weight gradient"]
    out = [
        "| family | shared prompt | " + " | ".join(numbers) + " | notes |",
        "|---|---|" + "---|" * 5,
    ]
    for row in rows:
        cells = [
            row["family"],
            "yes" if row["shared prompt"] else "no",
            *(f"{row[x]:.0e}" for x in numbers),
        ]
        out.append("| " + " | ".join([*cells, row["notes"]]) + " |")
    note = (
        "Largest differences, on tiny random models of the real classes in float32: of pixel_values to the image "
        "processor's; of log-probs (nats) and gradients (shares of a tensor's largest entry), shared prompt against "
        "the model's own forward, one response at a time. `python tests/test_families.py`"
    )
    return "\n".join([*out, "", note])


def graders() -> str:
    """Accuracy, false positives and false negatives of three graders by kind."""
    result = json.loads((ROOT / "benchmarks/graders.json").read_text())
    kinds, hostile = result["kinds"], result["hostile"]["graders"]["rewards.py"]
    names = list(kinds["all"]["graders"])
    out = [
        "| kind | cases | false | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for kind, row in kinds.items():
        cells = [kind, str(row["n"]), str(row["wrong"])]
        for x in row["graders"].values():
            figures = f"{x['right'] / row['n']:.1%}"
            wrong = (x["false positives"], x["false negatives"])
            cells.append(f"{figures} ({wrong[0]}, {wrong[1]})" if any(wrong) else figures)
        out.append("| " + " | ".join(cells) + " |")
    slowest = ", ".join(
        f"{name} {x['slowest']:.1f} s" for name, x in kinds["all"]["graders"].items()
    )
    lost = sum(x["hung"] + x["crashed"] for row in kinds.values() for x in row["graders"].values())
    note = f"Accuracy (false positives, false negatives). Slowest case: {slowest}; hung or crashed: {lost}.\n"
    note += f"Of {result['hostile']['n']} hostile completions ours rewards {hostile['false positives']}; "
    note += f"slowest {hostile['slowest']:.1f} s, beside other work. (math-verify's run on them did not end in 6 minutes.)"
    return "\n".join([*out, "", note])


def reasons() -> str:
    """How often each public grader accepts what ours refuses and refuses what ours accepts, by reason."""
    rows = json.loads((ROOT / "benchmarks/graders.json").read_text())["reasons"]
    out = ["| reason | example: gold, prediction | math-verify | mathruler |", "|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda x: -sum(x[1]["accepts"] + x[1]["refuses"])):
        example = ", ".join("`" + text.replace("|", "\\|") + "`" for text in row["example"])
        cells = [
            f"+{more} −{less}" for more, less in zip(row["accepts"], row["refuses"], strict=True)
        ]
        out.append("| " + " | ".join([name, example, *cells]) + " |")
    return "\n".join(out)


def step() -> str:
    """Seconds of a step beside TRL's on the same work: one row a cell and arm."""
    result = json.loads((ROOT / "benchmarks/step.json").read_text())
    spread = lambda x: f"{np.median(x):.2f} ({min(x):.2f} to {max(x):.2f})"  # noqa: E731
    head = [
        "image tokens",
        "G",
        "T",
        "arm",
        "seconds",
        "TRL's seconds / its",
        "of CPU time",
        "tokens/s",
        "peak, MiB",
    ]
    head += ["outside the model", "attack / arithmetic"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in result["cells"]:
        size = [str(entry["cell"][name]) for name in ("image_tokens", "G", "T")]
        for arm, x in entry["arms"].items():
            cells = [
                *size,
                arm,
                spread(x["seconds"]),
                spread(x["ratio"]),
                spread(x["cpu ratio"]),
                f"{x['tokens/s']:.0f}",
            ]
            cells += [f"{x['peak']:.0f}" if "peak" in x else ""]
            cells += [f"{np.median(x['outside']):.1%}" if "outside" in x else ""]
            cells += [spread(x["attack/arithmetic"]) if "attack/arithmetic" in x else ""]
            out.append("| " + " | ".join(cells) + " |")
    note = f"Median (lowest to highest) of {result['steps']} alternating steps, P = {result['cells'][0]['cell']['P']}, "
    note += (
        f"float32, {result['threads']} CPU thread, beside other work. `python {result['command']}`."
    )
    for arm, x in result.get("linear", {}).items():
        note += f" {arm}: twice P costs {spread(x['P'])} times as much, twice G {spread(x['G'])}."
    return "\n".join([*out, "", note])


def phases() -> str:
    """Where a step's time goes: the share of each phase, one row a cell and arm."""
    result = json.loads((ROOT / "benchmarks/step.json").read_text())
    names = ("encode", "sample", "attack", "measure", "update")
    out = [
        "| image tokens | G | T | arm | " + " | ".join(names) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    for entry in result["cells"]:
        size = [str(entry["cell"][name]) for name in ("image_tokens", "G", "T")]
        for arm, x in entry["arms"].items():
            total = sum(x["phases"].values())
            shares = [
                f"{x['phases'][name] / total:.0%}" if x["phases"].get(name) else ""
                for name in names
            ]
            out.append("| " + " | ".join([*size, arm, *shares]) + " |")
    return "\n".join(out)


def kills() -> str:
    """Where kill -9 fell, and what differed afterwards."""
    results = [
        json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("kill", "kill-2")
    ]
    phases = {
        "start": "at the start",
        "sample": "sampling",
        "attack": "attack",
        "measure": "measuring",
    }
    phases |= {"update": "update", "save": "saving"}
    head = ["processes", "kills", *phases.values(), "steps", "tensors and lines that differ"]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        cells = [
            r["processes"],
            r["kills"],
            *(r["fell"].get(phase, 0) for phase in phases),
            r["steps"],
        ]
        out.append("| " + " | ".join(map(str, [*cells, sum(r["different"].values())])) + " |")
    return "\n".join(out)


def soak() -> str:
    """What a long run holds, in a sentence."""
    r = json.loads((ROOT / "benchmarks/soak.json").read_text())
    if not r["all_finite"]:
        raise ValueError("soak.json: not all metrics were finite")
    same = lambda name: " to ".join(str(x) for x in dict.fromkeys(r[name]))  # noqa: E731
    slope = f"{r['memory_mib_per_1000_steps']:+.1f} +- {r['95%_interval']:.1f} MiB per 1,000 steps (95% interval)"
    return (
        f"{r['steps']} steps: over the second half the resident memory, {r['memory_mib'][-1]:.0f} MiB, changed by "
        f"{slope}; file handles {same('handles')}, threads {same('threads')}; all metrics were finite."
    )


# ------------------------------------------------------------------------------------------------ docs/metrics.md's ranges

RANGES = {"saei": "SaEI", "plain": "plain GRPO"}  # arms of study/results/shifted


def metric_runs(results: Path) -> dict[str, list[dict]]:
    """arm -> what the study kept of its finished runs, by seed."""
    found = {}
    for arm in RANGES:
        runs = [
            json.loads(path.read_text()) for path in (results / "shifted").glob(f"{arm}-*.json")
        ]
        good = [run for run in runs if run["arm"] == arm and "error" not in run]
        found[arm] = sorted(good, key=lambda run: run["seed"])
    return {arm: runs for arm, runs in found.items() if runs}


def metric_note(results: Path) -> str:
    """Which runs the ranges are of."""
    parts = []
    for arm, runs in metric_runs(results).items():
        points, seeds = (
            len(runs[0]["curves"]["reward"]),
            ", ".join(str(run["seed"]) for run in runs),
        )
        parts.append(
            f"{RANGES[arm]}, seeds {seeds}: {runs[0]['steps']} steps, kept as {points} means"
        )
    return f"{'; '.join(parts) or 'No runs yet'}. `python -m study.run --settings shifted`"


def training_range(runs: list[dict], name: str) -> str | None:
    """start → end, or the mean, (5th to 95th percentile) over points and seeds; of seconds: over the runs' medians."""
    if all(name in run["seconds"] for run in runs):
        values = np.array([[run["seconds"][name]] for run in runs])
    elif name != "step" and all(name in run["curves"] for run in runs):
        values = np.array([run["curves"][name] for run in runs])  # (seeds, points)
    else:
        return None
    fifth = max(1, values.shape[1] // 5)
    start, end = values[:, :fifth].mean(), values[:, -fifth:].mean()
    low, high = np.percentile(values, (5, 95))
    trend = abs(end - start) > (high - low) / 2
    middle = f"{short(start)} → {short(end)}" if trend else short(values.mean())
    return (
        middle
        if short(low) == short(high) == middle
        else f"{middle} ({short(low)} to {short(high)})"
    )


def evaluation_range(runs: list[dict], name: str, before: dict | None) -> str | None:
    """On the trained split: before → mean over seeds (lowest to highest)."""
    if name not in ("greedy", "pass@1", "pass@8", "entropy", "truncated"):
        return None
    parts = [run["evaluation"]["shifted/test"] for run in ([before] if before else []) + runs]
    values = [
        part[name] if name in part and name != "greedy" else per_problem(part, name).mean()
        for part in parts
    ]
    start = f"{short(values.pop(0))} → " if before else ""
    return f"{start}{short(np.mean(values))} ({short(min(values))} to {short(max(values))})"


def short(x: float) -> str:
    """Three figures, and no more than five decimals: the study keeps no more."""
    return f"{round(float(f'{x:.3g}'), 5) + 0:.5f}".rstrip("0").rstrip(".")  # + 0: no -0


def with_ranges(page: str, results: Path) -> str:
    """docs/metrics.md with the cell "on the demo" of every row that begins with a name made anew from the study's files."""
    runs, path = metric_runs(results), results / "shifted/before-0.json"
    before = json.loads(path.read_text()) if path.exists() else None
    parts = fill(page, {"runs": partial(metric_note, results)}).split("## Evaluation")

    def anew(line: str, made: Callable) -> str:
        if not line.startswith("| `"):
            return line
        cells, name = line.split("|"), line.split("`")[1]
        if len(cells) != 7:
            raise ValueError(
                f"docs/metrics.md, {name}: {len(cells) - 2} cells in place of 5; write &#124; for | in a cell"
            )
        found = {RANGES[arm]: made(of, name) for arm, of in runs.items()}
        cells[4] = f" {'<br>'.join(f'{arm} {text}' for arm, text in found.items() if text) or '-'} "
        return "|".join(cells)

    makers = (training_range, partial(evaluation_range, before=before))
    tables = zip(parts, makers, strict=True)
    return "## Evaluation".join(
        "\n".join(anew(line, made) for line in part.split("\n")) for part, made in tables
    )


README = {
    "algorithm": algorithm,
    "study-short": partial(study_tables.study_short, ROOT / "study/results"),
}
README |= {"attack": attack, "easyvqa": easyvqa, "families": families}
SPEED = {"step": step, "phases": phases}
GRADING = {"graders": graders, "reasons": reasons}


def parallel() -> str:
    """How far several processes end from one: a row a case."""
    result = json.loads((ROOT / "benchmarks/parallel.json").read_text())
    said = {
        "mixed": "pictures and text alone, responses of 1 to 12 tokens, 80/20",
        "drop": "groups dropped, AER",
    }
    said |= {"lots": "the first, computed again in the backward", "adapters": "LoRA"}
    said |= {"pictures": "pictures in every row, AER, gradients clipped to 0.1"}
    ways = [(n, way) for n in (2, 4) for way in ("ddp", "fsdp2", "zero2")]
    apart = {(row["processes"], row["way"], row["case"]): row["apart"] for row in result["rows"]}
    out = [
        "| case | " + " | ".join(f"{n} x {way.upper()}" for n, way in ways) + " |",
        "|---" * 7 + "|",
    ]
    for case, text in said.items():
        cells = [f"{apart[n, way, case]:.1e}" if (n, way, case) in apart else "" for n, way in ways]
        out.append("| " + " | ".join([text, *cells]) + " |")
    note = f"Distance of the parameters from one process's after {result['steps']} steps, as a share of how far training "
    return "\n".join([*out, "", note + "moved them. `python -m benchmarks.parallel`"])


STUDY = {
    name: partial(make, ROOT / "study/results") for name, (_, make) in study_tables.PARTS.items()
}
FAULTS = {"kills": kills, "soak": soak}
PAGES = {
    "README.md": README,
    "docs/walkthrough/README.md": {},
    "docs/faults.md": FAULTS,
    "docs/scaling.md": {"parallel": parallel},
    "docs/grading.md": GRADING,
    "docs/speed.md": SPEED,
    "docs/study.md": STUDY,
}


def line_of(file: str, text: str, after: int = 0) -> int:
    """The number of the line of a file that defines `text`, or else of the one that contains it, from `after` on."""
    lines = list(enumerate((ROOT / file).read_text().splitlines(), 1))[max(after - 1, 0) :]
    found = [i for i, line in lines if line.strip().startswith((f"def {text}(", f"class {text}:"))]
    found = found or [i for i, line in lines if text in line]
    if len(found) != 1 and not (
        found and after
    ):  # the end of a quotation: the first one after its beginning
        raise ValueError(
            f"{file} has {len(found)} lines with {text!r}; a link and a quotation need exactly one"
        )
    return found[0]


def link_lines(page: str) -> str:
    """Every [`text`](file.py#Lnn) of a page with the line where `text` is now."""
    link = re.compile(r"\[`([^`\n]+)`\]\(([\w/]+\.py)#L\d+\)")
    return link.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[2], m[1])})", page)


def quote_code(page: str) -> str:
    """Every <!-- code file.py: first line ... last line --> of a page with the lines as they are now."""

    def quote(m: re.Match) -> str:
        begin = line_of(m[2], m[3])
        end = line_of(m[2], m[4], begin)
        lines = (ROOT / m[2]).read_text().splitlines()[begin - 1 : end]
        code = textwrap.dedent("\n".join(lines))
        return f"{m[1]}[{m[2]}, lines {begin} to {end}]({m[2]}#L{begin}-L{end})\n\n```python\n{code}\n```\n{m[5]}"

    block = re.compile(r"(<!-- code ([\w/]+\.py): (.+) \.\.\. (.+) -->\n)[\s\S]*?(<!-- /code -->)")
    return block.sub(quote, page)


def fill(page: str, tables: dict = README) -> str:
    """The page with every table, quotation and line number anew."""
    for name, make in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = page.split(begin)
        page = head + begin + make() + "\n" + end + rest.split(end)[1]
    return link_lines(quote_code(page))


if __name__ == "__main__":
    for name, tables in PAGES.items():
        path = ROOT / name
        path.write_text(fill(path.read_text(), tables))
    if picture := study_tables.picture(ROOT / "study/results"):
        (ROOT / "docs/study.svg").write_text(picture)
    metrics = ROOT / "docs/metrics.md"
    metrics.write_text(with_ranges(metrics.read_text(), ROOT / "study/results"))
