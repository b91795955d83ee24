"""Write the tables of README.md and docs/ from the stored results: python -m benchmarks.tables

A page marks each table with <!-- name --> and <!-- /name -->. In docs/metrics.md it is the column
"on the demo".
tests/test_readme.py and tests/test_metrics_page.py check that the pages are what this writes.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import gpu_table
from study import tables as study_tables
from study.tables import table

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "study/results"


def read(name: str) -> dict:
    """A stored result."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def percent_change(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:+.0%} [{low:+.0%}, {high:+.0%}]"


def with_interval(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def median_range(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# ------------------------------------------------------------------------------- README.md


def attack() -> str:
    """Entropy and accuracy by image at the demo's eps, then over eps."""
    result = read("attack")
    head = ["image", "H of TsEC's tokens", "change", "H of fresh responses", "their accuracy"]
    head += ["PSNR, dB", "H after PNG", "accuracy after PNG"]
    rows = []
    for name, found in result["table"].items():
        row = [name, f"{found['chosen']:.4f}", percent_change(found["change of chosen"])]
        row += [f"{found['fresh']:.4f}", f"{found['accuracy']:.3f}"]
        row.append(f"{found['psnr']:.1f}" if found["psnr"] < 99 else "")
        row += [f"{found['chosen (PNG)']:.4f}", f"{found['accuracy (PNG)']:.3f}"]
        rows.append(row)
    note = f"{result['model']} on {result['problems']} prompts of {result['split']}, "
    note += f"eps = {result['eps']:.2g}/255; nats; change to the clean image, 95% interval over "
    note += "prompts. `python -m benchmarks.attack`. "
    note += f"Over eps, the first {result['sweep_problems']} prompts:"
    sweep_head = ["eps, 1/255", "random signs: H", "fresh accuracy", "EgAS + TsEC, 5 steps: H"]
    sweep = []
    for eps, found in result["sweep"].items():
        random, egas = found["random signs"], found["EgAS + TsEC, 5 steps"]
        row = [f"{float(eps):g}", percent_change(random["change of chosen"])]
        row += [f"{random['accuracy']:.3f}", percent_change(egas["change of chosen"])]
        row += [percent_change(egas["change of fresh"]), f"{egas['accuracy']:.3f}"]
        sweep.append(row)
    sweep_table = table([*sweep_head, "fresh H", "fresh accuracy"], sweep)
    return f"{table(head, rows)}\n\n{note}\n\n{sweep_table}"


def easyvqa() -> str:
    """easy-VQA before training, then by method: mean and range over seeds."""
    result = read("easyvqa")
    names, titles = (
        ("greedy", "pass@1", "pass@8", "entropy"),
        {"grpo": "plain GRPO", "saei": "SaEI"},
    )
    rows = [["before", *(with_interval(result["before"][name]) for name in names), ""]]
    for arm, title in titles.items():
        runs = [run for run in result["runs"] if run["arm"] == arm]
        cells = []
        for name in names:
            cells.append(study_tables.spread([run["after"][name][0] for run in runs]))
        minutes = np.mean([run["seconds"] for run in runs]) / 60
        rows.append([title, *cells, f"{minutes:.1f}"])
    first = min(result["runs"], key=lambda run: (run["arm"], run["seed"]))
    seeds = ", ".join(map(str, sorted({run["seed"] for run in result["runs"]})))
    note = f"Mean (lowest to highest) of seeds {seeds}; {result['problems']} questions of the test "
    note += "split, in brackets the 95% interval over them (after, "
    note += f"{titles[first['arm']]} of seed {first['seed']}: greedy "
    note += f"{with_interval(first['after']['greedy'])}); minutes of training on one CPU core. "
    note += "`python -m benchmarks.easyvqa`"
    return f"{table(['run', *names, 'minutes'], rows)}\n\n{note}"


def families() -> str:
    """What the tiny model of every family showed."""
    numbers = ["pixel_values", "log-probs", "pixel gradient", "weight gradient"]
    rows = []
    for found in read("families"):
        cells = [f"{found[name]:.0e}" for name in numbers]
        shared = "yes" if found["shared prompt"] else "no"
        rows.append([found["family"], shared, *cells, found["notes"]])
    note = (
        "Largest differences, on tiny random models of the real classes in float32: of "
        "pixel_values to the image processor's; of log-probs (nats) and gradients (shares of a "
        "tensor's largest entry), shared prompt against the model's own forward, one response at a "
        "time. `python -m tests.families`"
    )
    return f"{table(['family', 'shared prompt', *numbers, 'notes'], rows)}\n\n{note}"


# ----------------------------------------------------------------------------------- docs/


def graders() -> str:
    """Accuracy, false positives and false negatives of three graders by kind of answer."""
    result = read("graders")
    kinds, hostile = result["kinds"], result["hostile"]["graders"]["rewards.py"]
    names, rows, lost = list(kinds["all"]["graders"]), [], 0
    for kind, found in kinds.items():
        row = [kind, str(found["n"]), str(found["wrong"])]
        for grader in found["graders"].values():
            positives, negatives = grader["false positives"], grader["false negatives"]
            errors = f" ({positives}, {negatives})" if positives or negatives else ""
            row.append(f"{grader['right'] / found['n']:.1%}{errors}")
            lost += grader["hung"] + grader["crashed"]
        rows.append(row)
    slowest = [f"{name} {x['slowest']:.1f} s" for name, x in kinds["all"]["graders"].items()]
    note = "Accuracy (false positives, false negatives). Slowest case: "
    note += f"{', '.join(slowest)}; hung or crashed: {lost}.\n"
    note += f"Of {result['hostile']['n']} hostile completions ours rewards "
    note += f"{hostile['false positives']}; slowest {hostile['slowest']:.1f} s, beside other work. "
    note += "(math-verify's run on them did not end in 6 minutes.)"
    return f"{table(['kind', 'cases', 'false', *names], rows)}\n\n{note}"


def reasons() -> str:
    """How often public graders accept what ours refuses and refuse what ours accepts."""
    found = read("graders")["reasons"]
    names = sorted(found, key=lambda name: -sum(found[name]["accepts"] + found[name]["refuses"]))
    rows = []
    for name in names:
        examples = ["`" + text.replace("|", "\\|") + "`" for text in found[name]["example"]]
        row = [name, ", ".join(examples)]
        for more, less in zip(found[name]["accepts"], found[name]["refuses"], strict=True):
            row.append(f"+{more} −{less}")
        rows.append(row)
    return table(["reason", "example: gold, prediction", "math-verify", "mathruler"], rows)


def step() -> str:
    """Seconds of a step beside TRL's on the same work: a row per size and arm."""
    result = read("step")
    head = ["image tokens", "G", "T", "arm", "seconds", "TRL's seconds / its", "of CPU time"]
    head += ["its / GRPO's", "tokens/s", "peak, MiB", "outside the model", "attack / arithmetic"]
    rows = []
    for entry in result["cells"]:
        for arm, found in entry["arms"].items():
            row = [str(entry["cell"][name]) for name in ("image_tokens", "G", "T")] + [arm]
            row += [median_range(found[name]) for name in ("seconds", "ratio", "cpu ratio")]
            plain = entry["arms"]["GRPO"]["seconds"]
            pairs = zip(found["seconds"], plain, strict=True)  # of the same turn
            price = median_range([its / grpo for its, grpo in pairs])
            row.append(price if arm.startswith("SaEI") else "")
            row.append(f"{found['tokens/s']:.0f}")
            row.append(f"{found['peak']:.0f}" if "peak" in found else "")
            row.append(f"{np.median(found['outside']):.1%}" if "outside" in found else "")
            over = found.get("attack/arithmetic")
            row.append(median_range(over) if over else "")
            rows.append(row)
    note = f"Median (lowest to highest) of {result['steps']} alternating steps, "
    note += f"P = {result['cells'][0]['cell']['P']}, float32, {result['threads']} CPU thread, "
    note += "beside other work. `python -m benchmarks.step`."
    for arm, found in result.get("linear", {}).items():
        note += f" {arm}: twice P costs {median_range(found['P'])} times as much, twice G "
        note += f"{median_range(found['G'])}."
    return f"{table(head, rows)}\n\n{note}"


def phases() -> str:
    """The share of each phase in a step: a row per size and arm."""
    names = ("encode", "read", "sample", "attack", "measure", "update")
    rows = []
    for entry in read("step")["cells"]:
        for arm, found in entry["arms"].items():
            row = [str(entry["cell"][name]) for name in ("image_tokens", "G", "T")] + [arm]
            total = sum(found["phases"].values())
            for name in names:
                seconds = found["phases"].get(name)
                row.append(f"{seconds / total:.0%}" if seconds else "")
            rows.append(row)
    return table(["image tokens", "G", "T", "arm", *names], rows)


def parallel() -> str:
    """How far training on several processes ends from training on one."""
    result = read("parallel")
    cases = {
        "mixed": "pictures and text alone, responses of 1 to 12 tokens, 80/20",
        "drop": "groups dropped, AER",
        "lots": "the first, computed again in the backward",
        "one-pass": "the first, one prompt pass for sampling, attack and update",
        "one-pass-sampled": "one prompt pass, updated on the images of the sampling",
        "adapters": "LoRA",
        "pictures": "pictures in every row, AER, gradients clipped to 0.1",
    }
    columns = [(n, way) for n in (2, 4) for way in ("ddp", "fsdp2", "zero2")]
    found = {(row["processes"], row["way"], row["case"]): row["apart"] for row in result["rows"]}
    rows = []
    for case, text in cases.items():
        apart = [found.get((n, way, case)) for n, way in columns]
        rows.append([text, *("" if x is None else f"{x:.1e}" for x in apart)])
    head = ["case", *(f"{n} x {way.upper()}" for n, way in columns)]
    note = f"Distance of the parameters from one process's after {result['steps']} steps, as a "
    note += "share of how far training moved them. `python -m benchmarks.parallel`"
    return f"{table(head, rows)}\n\n{note}"


def engine() -> str:
    """vLLM against own sampling: seconds, differences, what two phases keep."""
    result = read("engine")
    rows = [[name, f"{value:.2f}"] for name, value in result["seconds"].items()]
    parts = [table(["16 prompts, 8 responses of up to 64 tokens each", "s"], rows)]
    head = ["engine", "trainer", "log-prob, largest", "mean", "entropy, largest", "ratio"]
    rows = []
    for row in result["differences"]:
        ratio = f"{row['lowest ratio']:.4f} to {row['highest ratio']:.4f}"
        numbers = [f"{row[name]:.1e}" for name in ("log-prob", "mean", "entropy")]
        rows.append([row["engine"], row["trainer"], *numbers, ratio])
    parts.append(table(head, rows))
    rows = []
    for row in result["steps"]:
        rows.append([*map(str, row.values()), f"{row['plain'] / row['two phases']:.2f}"])
    head = ["prompts", "waited for together", "steps, plain", "steps, two phases", "ratio"]
    parts.append(table(head, rows))
    note = f"{result['model']} on 2 CPU cores, beside other work. `python -m benchmarks.engine`"
    return "\n\n".join([*parts, note])


def gpu(name: str) -> str:
    """A results.json of benchmarks/gpu.py as tables. Not run if the file is not there."""
    stored = (ROOT / "benchmarks" / f"{name}.json").exists()
    return gpu_table.table_of(read(name) if stored else None).rstrip()


# ------------------------------------------------------------- the ranges of docs/metrics.md

RANGES = {"saei": "SaEI", "plain": "plain GRPO"}  # arms of study/results/paid


def metric_runs(results: Path) -> dict[str, list[dict]]:
    """arm -> its finished runs, by seed."""
    found = {}
    for arm in RANGES:
        runs = []
        for path in (results / "paid").glob(f"{arm}-*.json"):
            run = json.loads(path.read_text())
            if run["arm"] == arm and "error" not in run:
                runs.append(run)
        if runs:
            found[arm] = sorted(runs, key=lambda run: run["seed"])
    return found


def metric_note(results: Path) -> str:
    """Which runs the ranges are of."""
    parts = []
    for arm, runs in metric_runs(results).items():
        seeds = ", ".join(str(run["seed"]) for run in runs)
        points = len(runs[0]["curves"]["reward"])
        parts.append(f"{RANGES[arm]}, seeds {seeds}: {runs[0]['steps']} steps, ")
        parts[-1] += f"kept as {points} means"
    return f"{'; '.join(parts) or 'No runs yet'}. `python -m study.run --settings paid`"


def training_range(runs: list[dict], name: str) -> str | None:
    """start → end, or the mean (5th to 95th percentile) over points and seeds.

    Of seconds: over the runs' medians. None for a metric that the runs do not have.
    """
    if all(name in run["seconds"] for run in runs):
        values = np.array([[run["seconds"][name]] for run in runs])
    elif name != "step" and all(name in run["curves"] for run in runs):
        values = np.array([run["curves"][name] for run in runs])  # (seeds, points)
    else:
        return None
    fifth = max(1, values.shape[1] // 5)
    start, end = values[:, :fifth].mean(), values[:, -fifth:].mean()
    low, high = np.percentile(values, (5, 95))
    middle = short(values.mean())
    if abs(end - start) > (high - low) / 2:
        middle = f"{short(start)} → {short(end)}"
    constant = short(low) == short(high) == middle
    return middle if constant else f"{middle} ({short(low)} to {short(high)})"


def evaluation_range(runs: list[dict], name: str, before: dict | None) -> str | None:
    """On the trained split: before → mean over seeds (lowest to highest)."""
    if name not in ("greedy", "pass@1", "pass@8", "entropy", "truncated"):
        return None
    split, start = "shifted/test", ""
    values = study_tables.column(dict(enumerate(runs)), split, name)
    if before:
        start = f"{short(study_tables.column({0: before}, split, name)[0])} → "
    return f"{start}{short(np.mean(values))} ({short(min(values))} to {short(max(values))})"


def short(x: float) -> str:
    """Three significant figures, and no more than five decimals."""
    return f"{round(float(f'{x:.3g}'), 5) + 0:.5f}".rstrip("0").rstrip(".")  # + 0: no -0


def fill_row(line: str, runs: dict[str, list[dict]], make: Callable) -> str:
    """A row of docs/metrics.md with its cell "on the demo" made anew; other lines as they are."""
    if not line.startswith("| `"):
        return line
    cells, name = line.split("|"), line.split("`")[1]
    if len(cells) != 7:
        raise ValueError(
            f"docs/metrics.md, {name}: {len(cells) - 2} cells in place of 5; write &#124; for |"
        )
    texts = []
    for arm, of_arm in runs.items():
        found = make(of_arm, name)
        if found:
            texts.append(f"{RANGES[arm]} {found}")
    cells[4] = f" {'<br>'.join(texts) or '-'} "
    return "|".join(cells)


def with_ranges(page: str, results: Path) -> str:
    """docs/metrics.md with its column "on the demo" made anew from the study's results."""
    runs, path = metric_runs(results), results / "paid/before-80.json"
    before = json.loads(path.read_text()) if path.exists() else None
    page = fill(page, {"runs": partial(metric_note, results)})
    make, lines = training_range, []
    for line in page.split("\n"):
        if line.startswith("## Evaluation"):
            make = partial(evaluation_range, before=before)
        lines.append(fill_row(line, runs, make))
    return "\n".join(lines)


# ------------------------------------------------------------------------------- the pages

PAGES = {  # page -> marker -> what makes it
    "README.md": {"results": partial(study_tables.readme_table, STUDY)},
    "docs/results.md": {
        "study-short": partial(study_tables.study_short, STUDY),
        "attack": attack,
        "easyvqa": easyvqa,
    },
    "docs/families.md": {"families": families},
    "docs/walkthrough/README.md": {},
    "docs/scaling.md": {"parallel": parallel},
    "docs/engine.md": {"engine": engine},
    "docs/grading.md": {"graders": graders, "reasons": reasons},
    "docs/gpu.md": {"gpu": partial(gpu, "gpu"), "rehearsal": partial(gpu, "gpu_rehearsal")},
    "docs/speed.md": {"step": step, "phases": phases},
    "docs/study.md": {name: partial(make, STUDY) for name, (_, make) in study_tables.PARTS.items()},
}


def fill(page: str, tables: dict[str, Callable[[], str]]) -> str:
    """The page with every table made anew."""
    for name, make in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = page.split(begin)
        page = head + begin + make() + "\n" + end + rest.split(end)[1]
    return page


def main() -> None:
    for name, tables in PAGES.items():
        path = ROOT / name
        path.write_text(fill(path.read_text(), tables))
    metrics = ROOT / "docs/metrics.md"
    metrics.write_text(with_ranges(metrics.read_text(), STUDY))


if __name__ == "__main__":
    main()
