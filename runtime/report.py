"""The page of a run: a folder that train_saei.py wrote -> one self-contained HTML file.

    python -m runtime.report out/demo                  # writes out/demo/report/index.html
    python -m runtime.report out/demo out/demo-grpo    # two runs on one page, in the first folder

Input: config.yaml, metrics.jsonl, samples.jsonl, pictures, eval/*.json and eval/*.jsonl, as
train_saei.py and eval.py write them. A run that is still going, or that has no evaluation, gets the
page it can. docs/metrics.md defines the numbers. Text from a model or a data set is escaped and cut
to a fixed length. The page contains no script and forbids itself the network.
"""

import argparse
import base64
import html
import io
import json
import math
import re
import sys
from itertools import zip_longest
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from runtime import estimates, faults

MAX_TEXT, MAX_TOKENS, MAX_TOKEN_CHARS = 600, 300, 24  # these bound the size of the page
MAX_POINTS, MAX_SIDE = 300, 256  # of a curve; of an embedded picture, in pixels
MAX_STEPS, MAX_RESPONSES = 3, 3  # steps whose samples are shown; responses per image
GAIN = 16  # of the difference picture
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Control characters, characters that reverse text, lone surrogates
UNSAFE = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"

METHODS = {"none": "plain GRPO", "random": "random signs", "noise": "noise", "egas": "SaEI"}
CHARTS = [  # title, y axis from zero?, metric, metric of the changed image (dashed)
    ("Reward", True, "reward", None),
    ("Accuracy", True, "accuracy/clean", "accuracy/adversarial"),
    ("Entropy of the responses, nats per token", True, "entropy/clean", "entropy/adversarial"),
    ("Entropy of the tokens kept by TsEC, nats", True, "entropy/selected", "entropy/attacked"),
    ("Groups with equal accuracies, share", True, "zero_variance", None),
    ("PSNR of the changed image, dB", False, "attack/psnr", None),
    ("Response length, tokens", True, "length", None),
    ("Seconds per step", True, "seconds/step", None),
]
LOGGED = ("reward", "accuracy", "entropy/clean", "zero_variance", "length", "seconds/step")
ONLY_ATTACK = {"entropy/selected", "attack/psnr"}  # plain GRPO has no use for these
UNITS = {"entropy": (1, 3, "nats per token", "nats")}  # measure: scale, digits, unit, of a change
SHARE = (100, 1, "%", "points")  # every other measure


# ------------------------------------------------------------------------------------ reading


def number(value) -> float:
    """value as a finite float, else NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan


def mean(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def read_jsonl(path: Path, notes: list[str], steps: set[int] | None = None) -> list[dict]:
    """The records of a JSONL file that have a step, or one of `steps`.

    Other lines are skipped, and a note says how many.
    """
    records, bad_lines, count, line = [], [], 0, ""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            count += 1
            try:
                record = json.loads(line)
                step = int(record["step"])
                if steps is None or step in steps:
                    records.append(record | {"step": step})
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                bad_lines.append(count)
    if bad_lines:
        note = f"{path.name}: skipped {len(bad_lines)} of {count} lines that are not records,"
        note += f" the first is line {bad_lines[0]}."
        if bad_lines[-1] == count and not line.endswith("\n"):
            note += " The last line is incomplete: the run is writing, or was stopped."
        notes.append(note)
    return records


def read_answers(path: Path, measures: list[str], where: str) -> dict[str, dict]:
    """split -> problem -> {measure: value} from an evaluation's JSONL file; {} without the file.

    A problem is known by `where` (the conditions of the evaluation), its row, text and answer.
    Lines that are not records are skipped.
    """
    answers = {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                problem = json.dumps([where, *(record[k] for k in ("row", "problem", "answer"))])
                values = {"greedy": float(record["greedy_right"])}
                values |= {name: number(record[name]) for name in ("entropy", "truncated")}
                n, right = len(record["right"]), int(sum(record["right"]))
                for k in (int(name[5:]) for name in measures if re.fullmatch(r"pass@\d+", name)):
                    values[f"pass@{k}"] = estimates.pass_at_k(n, right, k)
                answers.setdefault(record["split"], {})[problem] = values
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
    return answers


def read_evaluation(path: Path) -> dict[str, dict]:
    """split -> {"n": problems or NaN, "numbers": {measure: (mean, low, high)}, "answers": ...}

    An interval of length 0 is of an earlier version, and computed anew.
    """
    result, splits = json.loads(path.read_text(encoding="utf-8")), {}
    for split, found in result["splits"].items():
        n, numbers = number(found.get("n")), {}
        for name, value in found.items():
            if np.shape(value) == (3,):
                middle, low, high = (number(x) for x in value)
                if low == high and name not in UNITS and 0 <= middle <= 1 <= n:
                    low, high = estimates.share_interval(np.full(int(n), middle))
                numbers[name] = (middle, low, high)
        splits[str(split)] = {"n": n, "numbers": numbers, "answers": {}}
    if path.with_suffix(".jsonl").is_file():
        where = f"{Path(str(result.get('dataset'))).name} at {result.get('temperature')}"
        names = list(dict.fromkeys(name for part in splits.values() for name in part["numbers"]))
        answers = read_answers(path.with_suffix(".jsonl"), names, where)
        for split in splits.keys() & answers.keys():
            splits[split]["answers"] = answers[split]
    return splits


def read_evaluations(folder: Path, notes: list[str]) -> dict[str, dict]:
    """Name of the file -> read_evaluation of it; `before` first, `after` last."""
    order = {"before": 0, "after": 2}
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (order.get(path.stem, 1), path)):
        try:
            found[path.stem] = read_evaluation(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"eval/{path.name} cannot be read, so it is left out.")
    return found


def check_run(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError where there is no run to draw."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder. Give the --output of train_saei.py")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file. Give the folder, the --output of train_saei.py")
    if (folder / "metrics.jsonl").is_file() or any(folder.glob("eval/*.json")):
        return
    for parent in folder.absolute().parents:
        if (parent / "metrics.jsonl").is_file():
            raise ValueError(f"{folder}: no run is in this folder. The run around it is {parent}")
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: a run was begun here, but no step has finished yet")
    if inside := sorted(str(path.parent) for path in folder.glob("*/metrics.jsonl"))[:3]:
        raise ValueError(f"{folder} is not a run but holds runs. Give one: {', '.join(inside)}")
    found = "no run is in this folder" if any(folder.iterdir()) else "the folder is empty"
    raise ValueError(f"{folder}: {found}. Give the --output of train_saei.py")


def check_metrics(folder: Path, metrics: list[dict], notes: list[str]) -> None:
    """Raise ValueError for metrics of which none is known; a note names those that are missing."""
    seen = {name for record in metrics for name in record}
    missing = [name for name in LOGGED if name not in seen]
    if metrics and len(missing) == len(LOGGED):
        names = ", ".join(sorted(seen - {"step"}))[:80] or "nothing"
        raise ValueError(
            f"{folder}/metrics.jsonl: none of {', '.join(LOGGED)} is in it (found: {names}). "
            "It was written by another version or program: draw it with that one"
        )
    if metrics and missing:
        names = ", ".join(missing)
        notes.append(f"metrics.jsonl has no {names}: another version wrote it. No curve of these.")


def read_run(folder: Path, max_steps: int = MAX_STEPS) -> dict:
    """All that the page shows of a run.

    Raises FileNotFoundError or ValueError, one line, where there is nothing to draw.
    """
    check_run(folder)
    notes, config, metrics, samples = [], {}, [], []
    try:
        config = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        notes.append("config.yaml is missing or cannot be read.")
    if (folder / "metrics.jsonl").is_file():
        by_step = {r["step"]: r for r in read_jsonl(folder / "metrics.jsonl", notes)}
        metrics = list(by_step.values())
    check_metrics(folder, metrics, notes)
    evaluations = read_evaluations(folder / "eval", notes)
    if not metrics and not evaluations:
        raise ValueError(" ".join([f"{folder}: no step has finished yet.", *notes]))
    broken = set()
    for record in metrics:
        broken |= {k for k, v in record.items() if isinstance(v, float) and math.isnan(number(v))}
    if broken:
        names = ", ".join(sorted(broken))
        notes.append(f"NaN or infinite values are left out of the curves: {names}.")
    shown = []  # steps spread evenly, the first and the last among them
    if metrics:
        spread = np.linspace(0, len(metrics) - 1, max_steps).round().astype(int)
        shown = [metrics[i]["step"] for i in sorted(set(spread.tolist()))]
    if (folder / "samples.jsonl").is_file():
        samples = read_jsonl(folder / "samples.jsonl", notes, set(shown))
    return {
        "folder": folder,
        "notes": notes,
        "config": config,
        "metrics": metrics,
        "evaluations": evaluations,
        "samples": samples,
        "shown": shown,
        "attacks": config.get("intervention") != "none",
        "changed": "attacked image" if config.get("intervention") == "egas" else "changed image",
    }


# ------------------------------------------------------------------- text, settings, numbers


def text(value, limit: int = MAX_TEXT) -> str:
    """Any value as escaped text of at most `limit` characters; unsafe ones become U+FFFD."""
    value = str(value)
    shown = html.escape(re.sub(UNSAFE, "\ufffd", value[:limit]))
    more = len(value) - limit
    return f"{shown} … ({more:,} more characters not shown)" if more > 0 else shown


def fixed(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def swatch(run: dict) -> str:
    """The run in a legend: its colour and name."""
    label = run["label"] if len(run["label"]) <= 32 else run["label"][:31] + "…"
    return f'<span class="{run["css"]}">■ {text(label)}</span>'


def table(head: list[str], rows: list[str]) -> str:
    """A table that scrolls sideways where it is too wide. Cells of the head are HTML."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(rows)
    return f'<div class="wide"><table><tr class="head">{cells}</tr>{body}</table></div>'


def summary(run: dict) -> str:
    """What was run, and notes on its files."""
    config, done = run["config"], len(run["metrics"])
    method = METHODS.get(str(config.get("intervention")))
    said = run["name"] + (f" ({method})" if method else "")
    said += f": {done:,} step{'s' if done != 1 else ''}"
    if number(config.get("steps")) > done:
        said += f" of {config['steps']:,} (still going, or stopped)"
    if "model" in config:
        keys = ("preset", "split") if config.get("preset") else ("dataset", "split")
        source = " ".join(text(config[key], 120) for key in keys if config.get(key))
        said += f". Model <code>{text(config['model'], 120)}</code>, data <code>{source}</code>"
    notes = "".join(f"<li>{text(note)}</li>" for note in run["notes"])
    return f"<p>{said}.</p>" + (f'<ul class="notes">{notes}</ul>' if notes else "")


def settings(runs: list[dict]) -> str:
    """Every option of the runs in a collapsed table; rows in which the runs differ are marked."""
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run["config"]):
        values = [text(run["config"].get(key, "–"), 200) for run in runs]
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f"<tr{mark}><th>{text(key, 80)}</th>{cells}</tr>")
    head = ["option", *(run["name"] for run in runs)]
    return f"<details><summary>Settings</summary>{table(head, rows)}</details>" if rows else ""


# -------------------------------------------------------------------------------- evaluations


def results_of(run: dict, split: str) -> dict[str, dict]:
    """Name of the evaluation -> the run's result on that split."""
    return {name: found[split] for name, found in run["evaluations"].items() if split in found}


def value_cell(key: str, numbers: tuple, change: bool = False) -> str:
    """Mean over its interval. A change has its unit, and is bold where its interval excludes 0."""
    scale, digits, _, unit = UNITS.get(key, SHARE)
    middle, low, high = numbers
    shown, *ends = (fixed(scale * x, digits, "+" if change else "") for x in numbers)
    if change:
        shown += f"\u00a0{unit}"
    if change and (low > 0 or high < 0):
        shown = f"<b>{shown}</b>"
    interval = f"<br/><small>[{', '.join(ends)}]</small>" if math.isfinite(low + high) else ""
    return f"<td>{shown}{interval}</td>"


def paired(key: str, new: dict, old: dict) -> tuple[float, float, float]:
    """Mean and interval of new minus old over the problems that both evaluated."""
    found = [new[p].get(key, math.nan) - old[p].get(key, math.nan) for p in new.keys() & old.keys()]
    differences = np.sort(found)  # sorted: the order of a set is not fixed
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return mean(differences), math.nan, math.nan
    if key in UNITS:
        return mean(differences), *estimates.bootstrap_interval(differences)
    return mean(differences), *estimates.share_difference_interval(differences)


def evaluation_rows(runs: list[dict], split: str, keys: list[str]) -> list[str]:
    """A row per run and evaluation."""
    rows = []
    for run in runs:
        for name, result in results_of(run, split).items():
            cells = ""
            for key in keys:
                cells += value_cell(key, result["numbers"].get(key, (math.nan,) * 3))
            rows.append(f"<tr><th>{run['name']} {text(name, 40)}</th>{cells}</tr>")
    return rows


def compared(runs: list[dict], split: str) -> list[tuple[str, dict, dict]]:
    """[(label, new, old)]: after and before of each run, the first run and each other one."""
    pairs, last = [], []
    for run in runs:
        found = results_of(run, split)
        if "before" in found and "after" in found:
            pairs.append((f"{run['name']} change", found["after"], found["before"]))
        if found:
            last.append((run["name"], list(found)[-1], list(found.values())[-1]))
    for run_name, name, result in last[1:]:
        first_run, first_name, first_result = last[0]
        if name == first_name:
            label = f"{first_run} minus {run_name} {text(name, 40)}"
            pairs.append((label, first_result, result))
    return pairs


def difference_rows(runs: list[dict], split: str, keys: list[str]) -> tuple[list[str], list[str]]:
    """A row per pair of evaluations that share problems; a note for each other pair."""
    rows, notes = [], []
    for label, new, old in compared(runs, split):
        new, old = new["answers"], old["answers"]
        shared = len(new.keys() & old.keys())
        if not (new and old):
            notes.append(f"No {label}: the .jsonl file beside eval/*.json is missing or broken.")
        elif not shared:
            reason = "the evaluations share no problem (rows, data set and temperature must agree)"
            notes.append(f"No {label}: {reason}.")
        else:
            if shared < max(len(new), len(old)):
                label += f" <small>on the {shared:,} problems of both</small>"
            cells = "".join(value_cell(key, paired(key, new, old), change=True) for key in keys)
            rows.append(f'<tr class="change"><th>{label}</th>{cells}</tr>')
    return rows, notes


def counts(runs: list[dict], split: str) -> str:
    """How many problems the evaluations of a split have."""
    found = {}
    for run in runs:
        for name, result in results_of(run, split).items():
            if math.isfinite(result["n"]):
                found.setdefault(f"{result['n']:,.0f}", set()).add(name)
    if len(found) == 1:
        return f"{next(iter(found))} problems"
    return ", ".join(f"{text(' and '.join(sorted(v)), 80)}: {n} problems" for n, v in found.items())


def dot_plot(runs: list[dict], split: str, keys: list[str]) -> str:
    """Shares of right answers on a scale from 0 to 100%: a line per measure, run, evaluation."""
    svg, y, legend, marks = "", 0, {}, {}
    for key in keys:
        svg += f'<text x="0" y="{y + 34}">{text(key, 12)}</text>'
        y += 10
        for run in runs:
            results = results_of(run, split)
            for name, result in results.items():
                numbers = result["numbers"].get(key, (math.nan,))
                if not np.isfinite(numbers).all():
                    continue
                y += 24
                x, low, high = (round(70 + 310 * min(max(share, 0), 1), 1) for share in numbers)
                mark, filled = ("●", "dot") if name == list(results)[-1] else ("○", "ring")
                svg += f'<g class="{run["css"]}"><path d="M{low} {y - 4}H{high}"/>'
                svg += f'<circle class="{filled}" cx="{x}" cy="{y - 4}" r="4.5"/></g>'
                legend[run["css"]] = swatch(run)
                marks[name] = f"{mark} {text(name, 40)}"
        y += 12
    grid = ""
    for percent in (0, 25, 50, 75, 100):
        x = 70 + 3.1 * percent
        grid += f'<path class="grid" d="M{x:.1f} 0V{y}"/>'
        grid += f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{percent}%</text>'
    said = f"{' '.join(legend.values())} {' '.join(marks.values())}, with 95% intervals"
    return f"""<figure class="card"><h4>Right answers</h4><p class="soft">{said}</p>
        <svg viewBox="0 0 400 {y + 22}" role="img" aria-label="{text(split, 80)}">{grid}{svg}</svg>
        </figure>"""


def evaluations(runs: list[dict]) -> str:
    """Per split a dot plot and a table: a row per evaluation and per difference."""
    results = [splits for run in runs for splits in run["evaluations"].values()]
    parts = ""
    for split in dict.fromkeys(split for splits in results for split in splits):
        found = [splits[split]["numbers"] for splits in results if split in splits]
        keys = list(dict.fromkeys(key for numbers in found for key in numbers))
        if not keys:
            continue
        differences, notes = difference_rows(runs, split, keys)
        rows = evaluation_rows(runs, split, keys) + differences
        head = ["", *(f"{text(key, 40)}, {UNITS.get(key, SHARE)[2]}" for key in keys)]
        shares = [key for key in keys if key == "greedy" or key.startswith("pass@")]
        plot = dot_plot(runs, split, shares) if shares else ""
        said = "".join(f'<p class="soft">{note}</p>' for note in notes)
        parts += f"<h3>{text(split, 80)} <small>{counts(runs, split)}</small></h3>"
        parts += f'<div class="result">{plot}<div>{table(head, rows)}{said}</div></div>'
    if not parts:
        return "<p>No evaluation yet. eval.py writes eval/before.json and eval/after.json.</p>"
    return f"""<p>greedy: the likeliest answer is right. pass@k: one of k sampled answers is right.
        In brackets: 95% intervals over problems. They do not cover other seeds. Differences are
        taken problem by problem, bold where the interval excludes 0. docs/metrics.md defines each
        number.</p>{parts}"""


# ------------------------------------------------------------------------------------- curves


def thin(values: list[float]) -> np.ndarray:
    """At most MAX_POINTS values: means of neighbours.   (S,) -> (S',)"""
    blocks = np.array_split(np.array(values, dtype=float), min(len(values), MAX_POINTS))
    return np.array([mean(block) for block in blocks])


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the run.   (S,) -> (S,)"""
    half = len(values) // 30
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([mean(window) for window in windows])


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """About four round numbers, at least `least` apart, that enclose [low, high]."""
    raw = max((high - low) / 4, least, 1e-9)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def curve_path(xs: np.ndarray, ys: np.ndarray) -> str:
    """SVG path through the finite points; h0 draws a single point as a dot."""
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return f"M{'L'.join(points)}h0"


def chart_lines(runs: list[dict], keys: tuple[str | None, ...]) -> list[tuple]:
    """[(run, dashes, steps, values)] of the runs that have the metric."""
    lines = []
    for run in runs:
        xs = thin([record["step"] for record in run["metrics"]])
        if keys[0] in ONLY_ATTACK and not run["attacks"]:
            continue
        for key, dash in zip(keys, ("", "5 4"), strict=True):
            if key is None:
                continue
            whole = key.removesuffix("/clean")  # plain GRPO has no halves
            ys = thin([number(r.get(key, r.get(whole))) for r in run["metrics"]])
            if np.isfinite(ys).any():
                lines.append((run, dash, xs, ys))
    return lines


def chart(runs: list[dict], title: str, zero: bool, *keys: str | None) -> str:
    """A metric of all runs: a colour per run, the second key dashed; "" without data."""
    lines = chart_lines(runs, keys)
    if not lines:
        return ""
    legend = {}
    for run, _, _, _ in lines:
        legend[run["css"]] = swatch(run)
    if any(dash for _, dash, _, _ in lines):
        changed = next(run["changed"] for run, dash, _, _ in lines if dash)
        legend["dash"] = f"<span>solid: clean image, dashed: {changed}</span>"
    all_x = np.concatenate([xs for _, _, xs, _ in lines])
    all_y = np.concatenate([ys for _, _, _, ys in lines])
    first, last = all_x.min(), max(all_x.max(), all_x.min() + 1)
    low, high = np.nanmin(all_y), np.nanmax(all_y)
    if zero:
        levels = ticks(min(low, 0.0), max(high, 0.0) if high or low else 1.0)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        levels = ticks(low - margin, high + margin)
    if not levels[0] <= 0 <= levels[-1]:
        legend["axis"] = "<span>The vertical axis does not start at 0.</span>"

    def x_of(step):
        return 48 + 340 * (step - first) / (last - first)

    def y_of(value):
        return 190 - 176 * (value - levels[0]) / (levels[-1] - levels[0])

    svg = ""
    for level in levels:
        y = y_of(level)
        svg += f'<path class="grid" d="M48 {y:.1f}H388"/>'
        svg += f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{round(level, 9):.6g}</text>'
    for step in ticks(first, last, least=1):
        if first <= step <= last:
            svg += f'<text x="{x_of(step):.1f}" y="209" text-anchor="middle">{step:.10g}</text>'
    for run, dash, xs, ys in lines:
        raw = curve_path(x_of(xs), y_of(ys))
        smoothed = curve_path(x_of(xs), y_of(smooth(ys)))
        svg += f'<path class="raw {run["css"]}" d="{raw}"/>'
        svg += f'<path class="line {run["css"]}" stroke-dasharray="{dash}" d="{smoothed}"/>'
    return f"""<h4>{title}</h4>
        <p class="soft">{" ".join(legend.values())}</p>
        <svg viewBox="0 0 400 214" role="img" aria-label="{title}">{svg}</svg>"""


def curves(runs: list[dict]) -> str:
    """All charts. The first rows have two charts where three in every row would leave a gap."""
    runs = [run for run in runs if run["metrics"]]
    charts = list(filter(None, (chart(runs, *row) for row in CHARTS)))
    if not charts:
        return "<p>No step has finished yet.</p>"
    wide = {0: 0, 1: 4, 2: 2}[len(charts) % 3]
    body = ""
    for i, drawn in enumerate(charts):
        body += f'<figure class="card{" half" * (i < wide)}">{drawn}</figure>'
    hint = "Horizontal: the step."
    if max(len(run["metrics"]) for run in runs) >= 30:  # smooth changes nothing below
        hint += " Bold: centred mean over a fifteenth of the run. Faint: each step."
    return f'<p>{hint}</p><div class="charts">{body}</div>'


# ------------------------------------------------------------------------------------ samples


def open_picture(run: dict, name) -> Image.Image | None:
    """A picture of the run; None with a note where it is missing, broken or outside the folder."""
    file = (run["folder"] / str(name)).resolve()
    try:
        if not file.is_relative_to(run["folder"].resolve()):
            raise ValueError("outside the run's folder")
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        note = f"Picture {str(name)[:80]} is left out: {type(error).__name__}."
        if note not in run["notes"]:
            run["notes"].append(note)
        return None


def figure(image: Image.Image, caption: str) -> str:
    """An embedded picture: PNG up to 128 pixels, else JPEG of at most MAX_SIDE pixels."""
    kind, file = ("png" if max(image.size) <= 128 else "jpeg"), io.BytesIO()
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, kind, quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"""<figure><img alt="{caption}" src="data:image/{kind};base64,{data}"/>
        <figcaption>{caption}</figcaption></figure>"""


def pictures(run: dict, group: list[dict]) -> str:
    """The clean image, the changed image and their difference, as far as a prompt has them."""
    moved = next((s for s in group if s.get("image") == "adversarial" and s.get("picture")), None)
    sample = moved or group[0]
    clean = open_picture(run, sample["clean_picture"]) if sample.get("clean_picture") else None
    figures = figure(clean, "clean image") if clean else ""
    changed = open_picture(run, moved["picture"]) if moved else None
    if clean and changed and clean.size == changed.size:
        # (height, width, 3), in 1/255
        change = np.asarray(changed, np.float64) - np.asarray(clean, np.float64)
        mse = float((change**2).mean())
        psnr = f"{10 * math.log10(255**2 / mse):.1f} dB" if mse else "∞"
        difference = Image.fromarray(np.clip(128 + GAIN * change, 0, 255).astype(np.uint8))
        figures += figure(changed, f"{run['changed']}: L∞ {abs(change).max():.0f}/255, PSNR {psnr}")
        figures += figure(difference, f"change × {GAIN}, grey is none")
    return f'<div class="pictures">{figures}</div>' if figures else ""


def token(value, entropy, kept, scale: float) -> str:
    """One token, shaded by its entropy in ten levels up to `scale` nats, framed if TsEC kept it."""
    value, nats = str(value), number(entropy)
    shown = text(value[:MAX_TOKEN_CHARS]) + "…" * (len(value) > MAX_TOKEN_CHARS)
    shown = shown.replace("\t", "⇥").replace("\r", "␍").replace("\n", "↵<br/>")
    shown = shown.replace(" ", "·<wbr/>")
    level = min(max(int(10 * nats / scale), 0), 9) if math.isfinite(nats) else 0
    frame = " kept" if kept is True else ""
    return f'<i class="e{level}{frame}" title="{fixed(nats, 2)} nats">{shown}</i>'


def response(sample: dict, scale: float, frames: bool) -> str:
    """One response: accuracy, reward and advantage, then its first MAX_TOKENS tokens.

    frames: frame the tokens that TsEC kept.
    """
    accuracy, reward = number(sample.get("accuracy")), fixed(number(sample.get("reward")), 2)
    facts = {1: "✓ right", 0: "✗ wrong"}.get(accuracy, f"accuracy {fixed(accuracy, 2)}")
    advantage = fixed(number(sample.get("advantage")), 2, "+")
    facts += f" · reward {reward} · advantage {advantage}"
    if sample.get("truncated") is True:
        facts += " · truncated"
    tokens, entropy, kept = (
        value if isinstance(value := sample.get(key), list) else []
        for key in ("tokens", "entropy", "kept")
    )
    shown = list(zip_longest(tokens, entropy, kept if frames else []))[
        : min(len(tokens), MAX_TOKENS)
    ]
    body = "".join(token(*entry, scale) for entry in shown)
    if body:  # else all of the response, with what the chat template prefilled
        body = text(sample.get("prefilled", "")) + body
    else:
        body = text(sample.get("response", ""))
    if len(tokens) > MAX_TOKENS:
        body += f" … {len(tokens) - MAX_TOKENS:,} more tokens not shown"
    good = " good" if accuracy == 1 else ""
    return f"""<div class="response{good}"><p class="facts soft">{facts}</p>
        <p class="tokens">{body}</p></div>"""


def gold(answer) -> str:
    """The gold answer; alternatives, any of which earns, are joined by "or"."""
    if not isinstance(answer, list | tuple):
        return f"Gold answer: <b>{text(answer, 80)}</b>"
    parts = [f"<b>{text(part, 80)}</b>" for part in answer[:8]]
    more = f" or {len(answer) - 8:,} more" if len(answer) > 8 else ""
    return f"Gold answer: {' or '.join(parts)}{more}"


def sample_card(run: dict, step: int, scale: float) -> str:
    """The first prompt of a step: its pictures, and responses from the clean and changed image."""
    samples = [s for s in run["samples"] if s["step"] == step]
    if not samples:
        return ""
    group = [s for s in samples if s.get("prompt") == samples[0].get("prompt")]
    halves = []
    for kind, label in (("clean", "clean image"), ("adversarial", run["changed"])):
        half = [s for s in group if s.get("image") == kind]
        if half:
            responses = [response(s, scale, run["attacks"]) for s in half[:MAX_RESPONSES]]
            count = f"<small>{len(responses)} of {len(half)} responses</small>"
            halves.append((f"<h4>From the {label} {count}</h4>", "".join(responses)))
    if len(halves) == 1:  # the responses side by side
        columns = f'{halves[0][0]}<div class="columns">{halves[0][1]}</div>'
    else:
        columns = "".join(f"<div>{title}{body}</div>" for title, body in halves)
        columns = f'<div class="columns">{columns}</div>'
    problem = f"<p>{text(group[0].get('problem'))}</p><p>{gold(group[0].get('answer'))}</p>"
    return f"""<article class="card"><div class="prompt"><div><h4>Step {step}</h4>{problem}</div>
        {pictures(run, group)}</div>{columns}</article>"""


def samples(runs: list[dict]) -> str:
    """Cards of some steps, below a legend of the marks that are in them."""
    seen = []
    for run in runs:
        for sample in run["samples"]:
            if isinstance(sample.get("entropy"), list):
                seen += [number(nats) for nats in sample["entropy"][:MAX_TOKENS]]
    finite = [nats for nats in seen if math.isfinite(nats)]
    scale = max(0.1, round(float(np.quantile(finite, 0.98)), 1)) if finite else 1.0
    parts = ""
    for run in runs:
        cards = "".join(sample_card(run, step, scale) for step in run["shown"])
        parts += f"<h3>{run['name']}</h3>" + (cards or "<p>No samples yet.</p>")
    bar = "".join(f'<i class="e{level}">\u00a0</i>' for level in range(10))
    shade = f"""Shade: entropy of a token, from 0 <span class="shade">{bar}</span> to
        {scale:g} nats and more."""
    marks = {' title="': shade, ' kept"': '<i class="kept">Framed</i>: kept by TsEC.'}
    marks |= {"·<wbr/>": "· is a space.", "↵": "↵ is a newline.", "⇥": "⇥ is a tab."}
    legend = " ".join(said for mark, said in marks.items() if mark in parts)
    return f"<p>{legend}</p>{parts}" if legend else parts


# ----------------------------------------------------------------------------------- the page

COLOURS = {  # of the runs: on a light page, on a dark one
    "r0": "#0b66b0, #5cb0f2",
    "r1": "#cb4b16, #f2895a",
    "r2": "#11805f, #4cc39b",
    "r3": "#9a4c95, #d48fce",
}
CSS = """
:root { color-scheme: light dark; --ink: light-dark(#22262b, #e6e4df);
  --page: light-dark(#f7f6f3, #16181b);
  --soft: light-dark(#676d75, #9aa0a8); --edge: light-dark(#dcd9d2, #363a40);
  --card: light-dark(#fff, #1e2125); --good: light-dark(#11805f, #4cc39b); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px; max-width: 1180px; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 16px/1.5 sans-serif; }
h2 { margin: 40px 0 8px; } h3 { margin: 20px 0 8px; } h4, .facts, figure { margin: 0; }
small, .soft, .pictures, .head { color: var(--soft); font-size: 13px; font-weight: normal; }
.notes { border-left: 3px solid #d9a400; } .differs { background: rgba(217, 164, 0, 0.15); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 16px; margin-bottom: 16px; }
.wide { overflow-x: auto; overflow-wrap: normal; } table { border-collapse: collapse; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-top: 1px solid var(--edge); }
th { font-weight: normal; min-width: 6em; } small { display: inline-block; }
.result tr > :first-child { position: sticky; left: 0; background: var(--page); }
.result text { font-size: 14px; }
path { fill: none; stroke: currentColor; stroke-linecap: round; stroke-linejoin: round; }
.charts, .columns { display: grid; gap: 0 16px; margin-top: 12px; }
.charts { grid-template-columns: repeat(6, 1fr); } .charts > * { grid-column: span 2; }
.charts > .half { grid-column: span 3; } .charts > .half:only-child { grid-column: 1 / -1; }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.result, .prompt { display: flex; flex-wrap: wrap; gap: 0 24px; margin-bottom: 12px; }
.result > .card { flex: 1 1 330px; max-width: 560px; }
.result > div { flex: 3 1 700px; min-width: 0; }
.change td { white-space: nowrap; } .result tr.change > * { background: var(--card); }
.prompt > :first-child { flex: 1 1 300px; } .result table { width: 100%; }
@media (max-width: 1000px) { .charts > *, .charts > .half { grid-column: span 3; }
  .charts > :last-child:nth-child(odd) { grid-column: 1 / -1; } }
@media (max-width: 680px) { .charts > *, .charts > .half { grid-column: 1 / -1; } }
svg { display: block; width: 100%; max-height: 340px; }
.dot { fill: currentColor; } .ring { fill: var(--card); stroke: currentColor; stroke-width: 1.5; }
.line { stroke-width: 2; } .raw { opacity: 0.35; } .grid { stroke: var(--edge); }
svg text { fill: var(--soft); font-size: 12px; }
.pictures { display: flex; gap: 12px; }
.pictures > * { width: 190px; min-width: 0; }
img { width: 100%; image-rendering: pixelated; }
.response { border-left: 3px solid var(--edge); padding-left: 12px; margin: 12px 0; }
.good { border-color: var(--good); } .good .facts { color: var(--good); }
.tokens { font: 13px/2 monospace; margin: 0; max-height: 380px; overflow-y: auto; }
i { font-style: normal; unicode-bidi: isolate; border-radius: 3px; padding: 2px 1px; }
.kept { outline: 1.5px solid currentColor; outline-offset: -1px; margin: 0 1px; }
.shade i { padding: 2px 8px; }
"""


def page(runs: list[dict]) -> str:
    """The whole page. It is well-formed XML too."""
    parts = {
        "Evaluations": evaluations(runs),
        "Curves": curves(runs),
        "Samples": samples(runs),
    }
    body = "".join(f"<h2>{heading}</h2>{part}" for heading, part in parts.items())
    intro = "".join(summary(run) for run in runs)  # last: opening pictures may have added notes
    title = "SaEI: " + " and ".join(text(run["label"], 60) for run in runs)
    css = CSS
    for name, colours in COLOURS.items():
        css += f".{name} {{ color: light-dark({colours}); }}\n"
    for i in range(10):
        css += f".e{i} {{ background: rgba(235, 130, 30, {0.075 * i:.3f}); }}\n"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{title}</title>
<style>{css}</style></head><body><h1>{title}</h1>
{intro}{settings(runs)}{body}</body></html>
"""


def build_report(folders: list[str | Path], output: Path | None = None) -> Path:
    """Write the page of one or several runs and return its path.

    Default: report/index.html in the first folder. Raises FileNotFoundError for a folder that
    does not exist, ValueError for one without a run or without anything to draw yet.
    """
    if not folders:
        raise ValueError("build_report needs at least one run's folder")
    max_steps = max(1, min(MAX_STEPS, 6 // len(folders)))
    runs = [read_run(Path(folder), max_steps) for folder in folders]
    names = [run["folder"].resolve().name for run in runs]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        run["css"] = list(COLOURS)[i % len(COLOURS)]
        run["label"] = name if names.count(name) == 1 else str(run["folder"])
        run["name"] = f'<b class="{run["css"]}">{text(run["label"], 60)}</b>'
    output = Path(output) if output else runs[0]["folder"] / "report" / "index.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs), encoding="utf-8")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the HTML page of one or several runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="--output of train_saei.py")
    parser.add_argument("--output", type=Path, help="default: report/index.html in the first")
    args = parser.parse_args()
    try:
        print(build_report(args.folders, args.output))
    except Exception as error:
        if not faults.is_fault(error):
            raise
        faults.say(f"error: {faults.explain(error)}")
        sys.exit(faults.EXIT_CODE)


if __name__ == "__main__":
    main()
