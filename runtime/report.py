"""The report of a run: metrics, samples and evaluations -> one self-contained HTML page.

Reads a run's folder (config.yaml, metrics.jsonl, samples.jsonl, pictures, eval/*.json) as train_saei.py
and eval.py write it, at any time: a run that is still going, or has no evaluation, gets the page it can.
What a model wrote is escaped and cut to a bound, and the page forbids itself scripts and the network.

    python -m runtime.report out/demo                    # -> out/demo/report/index.html
    python -m runtime.report out/demo out/demo-grpo      # both on one page, in the first folder's report/
    python -m runtime.report results                     # the study's (study/run.py)
"""

import argparse
import base64
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

MAX_TOKENS, MAX_TOKEN_CHARS, MAX_TEXT, MAX_POINTS, MAX_SIDE = (
    300,
    24,
    600,
    300,
    256,
)  # what bounds the page's size
GALLERY_STEPS, RESPONSE_STEPS, RESPONSES = (
    4,
    3,
    3,
)  # per run (fewer where there are many), per run, per image
UNSAFE = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
GAIN = 16  # of the difference picture
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script, no network, whatever is written

# fmt: off
ARMS = {  # intervention: name, what it does, what its images are called
    "none": ("plain GRPO", "No image is changed: all responses come from the clean image.", "attacked image"),
    "random": ("random signs", "{some} come from an image moved by random signs, by at most {eps}.", "shifted image"),
    "noise": ("annealed noise", "{some} come from an image with Gaussian noise, annealed with time.", "noised image"),
    "egas": ("SaEI", "{some} come from an attacked image: EgAS moves its pixels, by at most {eps}, so that the entropy "
             "of the tokens chosen by TsEC rises.", "attacked image"),
}
MEASURES = [  # of an evaluation: pattern, label, meaning
    ("greedy", "Greedy accuracy", "share of problems whose most likely response is right"),
    ("pass@1", "pass@1", "chance that one sampled response is right"),
    (r"pass@(\d+)", r"pass@\1", r"chance that at least one of \1 sampled responses is right"),
    ("entropy", "Entropy", "nats a token, mean over the sampled responses: how undecided the policy is"),
    ("truncated", "Truncated", "share of the sampled responses that ran into max_new_tokens"),
]
CHARTS = [  # title, unit, y axis from zero?, lines: (key, key that stands in for it, what it is)
    ("Reward", "mean of the responses", True, [("reward", None, "all")]),
    ("Accuracy", "share of right responses", True,
     [("accuracy/clean", "accuracy", "clean image"), ("accuracy/adversarial", None, "{}")]),
    ("Entropy of the responses", "nats per token", True,
     [("entropy/clean", None, "clean image"), ("entropy/fresh", None, "fresh, {}")]),
    ("Entropy of the chosen tokens", "nats per token", False,
     [("entropy/selected", None, "clean image"), ("entropy/attacked", None, "same tokens, {}")]),
    ("Zero-variance groups", "share of groups", True, [("zero_variance", None, "all")]),
    ("Tokens kept by TsEC", "share of tokens", True, [("tsec/kept", None, "clean responses")]),
    ("PSNR of the changed image", "dB", False, [("attack/psnr", None, "against the clean image")]),
    ("Response length", "tokens", True, [("length", None, "all")]),
]
DASHES = ("", "5 4")  # of a chart's first and second line
PHASES = {"seconds/sample": "sample", "seconds/attack": "attack", "seconds/update": "update", None: "other"}
GLOSSARY = {
    "Reward, accuracy": "Accuracy is 1 for a right answer and 0 for a wrong one; the reward weighs it with the format. "
        "Both are means over the responses of a step, sampled at the training temperature.",
    "Entropy": "−Σ p ln p over the whole vocabulary at one token, in nats; mean over a response's tokens, then over "
        "responses. 0 is certain; 0.69 is a fair choice between two tokens.",
    "Chosen tokens, TsEC": "Tokens of moderate entropy in the clean responses; the attack raises their entropy. "
        "Dashed: the same tokens read again with the attacked image. “Fresh” responses are new ones, sampled from it. "
        "Plain GRPO chooses tokens too, but does nothing with them.",
    "Advantage": "A response's reward minus the mean of its group, over the group's standard deviation if so set.",
    "Zero-variance groups": "Groups whose responses are all right or all wrong: their accuracy teaches nothing.",
    "L∞, PSNR": "The largest change of any colour value, in 1/255; and 10 log₁₀(255² / mean squared change) in dB: "
        "higher is harder to see. Under Images, measured on the saved 8-bit pictures.",
    "pass@k": "Unbiased estimate that k samples contain a right one; mean over problems.",
    "Intervals": "95% bootstrap over problems: they cover the choice of problems, not the seed of training.",
}
# fmt: on


# ---------------------------------------------------------------------------------------------------- reading a run


def read_jsonl(path: Path, notes: list[str], steps: set[int] | None = None) -> list[dict]:
    """Records of a JSONL file, those of `steps` if given; lines that are not records are skipped with a note."""
    records, bad, count, line = [], [], 0, ""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            count += 1
            try:
                record = json.loads(line)
                if steps is None or record["step"] in steps:
                    records.append(record | {"step": int(record["step"])})
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                bad.append(count)
    if bad:
        half = bad[-1] == count and not line.endswith("\n")
        notes.append(
            f"{path.name}: {len(bad)} of {count} lines are not records, the first is line {bad[0]}: skipped."
        )
        notes[-1] += " The last is half-written: the run is writing, or was stopped." * half
    return records


def number(value) -> float:
    """value as a finite float, else NaN."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


def spread(items: list, count: int) -> list:
    """`count` items spread evenly over a list, the first and the last among them."""
    return (
        [items[i] for i in sorted({round(x) for x in np.linspace(0, len(items) - 1, count)})]
        if items
        else []
    )


def read_run(folder: Path, share: int = 1) -> dict:
    """All that the page needs of one run; `share`: among how many runs the page is divided."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. A run's folder is what train_saei.py got as --output"
        )
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{folder}: no metrics.jsonl, so train_saei.py has not trained here"
        )
    notes, config, evals, samples = [], {}, {}, []
    try:
        config = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        notes.append("config.yaml is missing or cannot be read.")
    metrics = list({r["step"]: r for r in read_jsonl(folder / "metrics.jsonl", notes)}.values())
    broken = sorted(
        {k for r in metrics for k, v in r.items() if isinstance(v, float) and math.isnan(number(v))}
    )
    if broken:
        notes.append(f"NaN or infinite values, left out of the curves: {', '.join(broken)}.")
    for path in sorted((folder / "eval").glob("*.json")):
        try:
            splits = json.loads(path.read_text(encoding="utf-8"))["splits"].items()
            evals[path.stem] = {
                split: {k: np.array(v, dtype=float) for k, v in r.items()} for split, r in splits
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            notes.append(f"eval/{path.name} cannot be read (half-written?): skipped.")
    steps = [r["step"] for r in metrics]
    gallery = spread(steps, max(1, min(GALLERY_STEPS, 8 // share)))
    responses = spread(steps, max(1, min(RESPONSE_STEPS, 6 // share)))
    if (folder / "samples.jsonl").is_file():
        samples = read_jsonl(folder / "samples.jsonl", notes, {*gallery, *responses})
    arm, does, changed = ARMS.get(str(config.get("intervention")), ("", "", "changed image"))
    return {"folder": folder, "notes": notes, "config": config, "metrics": metrics, "evals": evals, "samples": samples,
            "gallery": gallery, "responses": responses, "arm": arm, "does": does, "changed": changed}  # fmt: skip


def text(value, cap: int = MAX_TEXT) -> str:
    """Any value as escaped text of at most `cap` characters; controls and what reverses text become U+FFFD."""
    value = str(value)
    shown = re.sub(UNSAFE, "\ufffd", value[:cap])
    return html.escape(shown) + (
        f" … ({len(value) - cap:,} more characters not shown)" if len(value) > cap else ""
    )


def fixed(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


# ------------------------------------------------------------------------------------------- what was run, numbers


def about(run: dict) -> str:
    """What was run, in a few plain words, and notes on its files."""
    c, done = run["config"], len(run["metrics"])
    planned, rollouts, attacked = (
        number(c.get(k)) for k in ("steps", "rollouts", "adversarial_rollouts")
    )
    said = f"{run['name']}{' (' + run['arm'] + ')' if run['arm'] else ''}: {done:,} step{'s' * (done != 1)}"
    said += f" of {planned:,.0f} (still going, or stopped)" if planned > done else ""
    if {"model", "dataset", "split", "prompts_per_step"} <= set(c):
        said += f", each of {text(c['prompts_per_step'], 9)} prompts with {rollouts:.0f} responses, of <code>"
        source = c["preset"] if c["dataset"] == "demo" and c.get("preset") else c["dataset"]
        source = " ".join(text(x, 120) for x in (source, c["split"]) if x)
        said += f"{text(c['model'], 120)}</code> on <code>{source}</code>"
    eps = f"{number(c.get('eps')) * 255:.3g}/255"
    said += ". " + run["does"].format(
        some=f"{attacked:.0f} of the {rollouts:.0f} responses", eps=eps
    )
    notes = "".join(f"<li>{text(note)}</li>" for note in run["notes"])
    return f'<p class="lead">{said}</p>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def settings(runs: list[dict]) -> str:
    """Every field of the configurations in a collapsed table, those that differ marked."""
    rows = ""
    for key in dict.fromkeys(k for run in runs for k in run["config"]):
        values = [text(run["config"].get(key, "–"), 200) for run in runs]
        mark = ' class="differs"' if len(set(values)) > 1 else ""
        rows += f"<tr{mark}><th>{text(key, 80)}</th>{''.join(f'<td>{v}</td>' for v in values)}</tr>"
    heads = "".join(f"<th>{run['name']}</th>" for run in runs)
    hint = " (rows that differ are marked)" if len(runs) > 1 else ""
    table = f"<table><thead><tr><th>Setting</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        f'<details><summary>Settings{hint}</summary><div class="wide">{table}</div></details>'
        if rows
        else ""
    )


def numbers(runs: list[dict]) -> str:
    """A card for each split: every measure before and after with its 95% interval, the runs below each other."""
    results = [splits for run in runs for splits in run["evals"].values()]
    cards, meanings = "", {}
    for split in dict.fromkeys(s for splits in results for s in splits):
        here, rows = [splits[split] for splits in results if split in splits], ""
        for key in sorted(
            {k: 0 for r in here for k in r if r[k].shape == (3,)}, key=lambda k: k == "entropy"
        ):
            known = [
                (label, meaning, found)
                for p, label, meaning in MEASURES
                if (found := re.fullmatch(p, key))
            ]
            label, meaning = (
                (known[0][2].expand(t) for t in known[0][:2]) if known else (key, "see eval.py")
            )
            meanings[label] = meaning
            rows += f'<tr class="group"><th colspan="5">{text(label, 60)}</th></tr>' + measure(
                runs, split, key
            )
        count = " / ".join(sorted({f"{r['n'].sum():,.0f}" for r in here if "n" in r}))
        head = '<th></th><th>before</th><th>after</th><th>change</th><th class="pic"></th>'
        cards += f"""<article class="card"><h3>{text(split, 80)} <small>{count} problems</small></h3>
            <table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></article>"""
    if not cards:
        return '<p class="empty">No evaluation yet: eval.py writes eval/before.json and eval/after.json.</p>'
    listed = "".join(f"<li><b>{text(k, 60)}</b>: {v}.</li>" for k, v in meanings.items())
    return f"""<div class="cards">{cards}<article class="card"><h3>What the numbers mean</h3><ul>{listed}
        <li><b>Small print</b>: 95% intervals over problems.</li><li><b>A change in bold</b>: its two intervals do not
        overlap.</li><li class="pic"><b>Ring, disc</b>: before, after, on an axis from 0.</li></ul></article></div>"""


def measure(runs: list[dict], split: str, key: str) -> str:
    """Table rows of one measure on one split: a row for each run and each of its evaluations after `before`."""
    rows, unknown = "", np.full(3, math.nan)  # mean, low, high
    scale, digits, unit = (1, 3, "") if key == "entropy" else (100, 1, "%")
    values = {
        (i, n): e.get(split, {}).get(key, unknown)
        for i, r in enumerate(runs)
        for n, e in r["evals"].items()
    }
    top = max([v[2] for v in values.values() if v[2] > 0] + [1e-9]) if key == "entropy" else 1.0
    for i, run in enumerate(runs):
        before = values.get((i, "before"), unknown)
        for name in [n for n in run["evals"] if n != "before"] or ["after"]:
            after, cells, marks = (
                values.get((i, name), unknown),
                "",
                '<path class="grid" d="M4 11H136"/>',
            )
            for v, y, kind in ((before, 6, "was"), (after, 16, "now")):
                mean, low, high = (fixed(scale * x, digits) for x in v)
                known = np.isfinite(v).all()
                cells += (
                    f"<td>{mean}{unit}<small>{low}–{high}</small></td>" if known else "<td>–</td>"
                )
                x, left, right = 4 + 132 * np.clip(v / top, 0, 1)
                line, dot = (
                    f'<path d="M{left:.1f} {y}H{right:.1f}"/>',
                    f'<circle cx="{x:.1f}" cy="{y}" r="4"/>',
                )
                marks += f'<g class="{kind}">{line}{dot}</g>' if known else ""
            change = fixed(scale * (after[0] - before[0]), digits, "+")
            if after[1] > before[2] or after[2] < before[1]:
                change = f"<b>{change}</b>"
            who = run["name"] + (f" <small>{text(name, 40)}</small>" if name != "after" else "")
            picture = f'<svg class="strip {run["css"]}" viewBox="0 0 140 22" aria-hidden="true">{marks}</svg>'
            rows += f'<tr><td class="who">{who}</td>{cells}<td>{change}</td><td class="pic">{picture}</td></tr>'
    return rows


# ----------------------------------------------------------------------------------------------------------- curves


def thin(values: list[float]) -> np.ndarray:
    """At most MAX_POINTS values: means of neighbours, NaN left out.   (S,) -> (S',)"""
    blocks = np.array_split(np.array(values, dtype=float), min(len(values), MAX_POINTS))
    return np.array(
        [b[np.isfinite(b)].mean() if np.isfinite(b).any() else math.nan for b in blocks]
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fifteenth of the run, NaN left out.   (S,) -> (S,)"""
    half = len(values) // 30
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array(
        [w[np.isfinite(w)].mean() if np.isfinite(w).any() else math.nan for w in windows]
    )


def curve(run: dict, key: str | None, stand_in: str | None = None) -> np.ndarray:
    """A metric over the steps, thinned; NaN where a step does not have it."""
    return thin([number(r.get(key, r.get(stand_in))) for r in run["metrics"]])


def ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """About four round numbers that enclose [low, high]."""
    raw = max((high - low) / 4, least, 1e-9)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [
        i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)
    ]


def frame(xs: np.ndarray, ys: np.ndarray, unit: str, zero: bool):
    """Axes around the data on a 400 x 230 canvas: their SVG, and a map from data to an SVG path."""
    x0, x1, ys = xs.min(), max(xs.max(), xs.min() + 1), ys[np.isfinite(ys)]
    low, high = ys.min(), ys.max()
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5  # a flat line gets room too
    levels = (
        ticks(min(low, 0.0), max(high, 0.0) if high or low else 1.0)
        if zero
        else ticks(low - pad, high + pad)
    )

    def x(v):
        return 48 + 340 * (v - x0) / (x1 - x0)

    def y(v):
        return 194 - 166 * (v - levels[0]) / (levels[-1] - levels[0])

    def path(xs, ys):  # broken at NaN; h0 makes a lone point a dot
        parts, pen = "", "M"
        for a, b in zip(x(xs), y(ys), strict=True):
            parts += f"{pen}{a:.1f} {b:.1f}{'h0' * (pen == 'M')}" if math.isfinite(b) else ""
            pen = "L" if math.isfinite(b) else "M"
        return parts

    svg = f'<text x="4" y="13">{unit}</text><text x="388" y="226" text-anchor="end">step</text>'
    for v in levels:
        svg += f'<path class="grid" d="M48 {y(v):.1f}H388"/>'
        svg += f'<text x="42" y="{y(v) + 4:.1f}" text-anchor="end">{round(v, 9):.6g}</text>'
    for v in (t for t in ticks(x0, x1, least=1) if x0 <= t <= x1):
        svg += f'<text x="{x(v):.1f}" y="211" text-anchor="middle">{v:.10g}</text>'
    return svg, path


def figure(title: str, svg: str, legend: str) -> str:
    return f"""<figure class="card"><figcaption>{title}</figcaption><p class="legend">{legend}</p>
        <svg class="chart" viewBox="0 0 400 230" role="img" aria-label="{title}">{svg}</svg></figure>"""


def line_chart(runs: list[dict], title: str, unit: str, zero: bool, branches: list[tuple]) -> str:
    """One metric of all runs: a colour per run, a dash per branch, smoothed over faint raw; "" without data."""
    lines = [(run, i, curve(run, *keys)) for run in runs for i, (*keys, _) in enumerate(branches)]
    lines = [line for line in lines if np.isfinite(line[2]).any()]
    if not lines:
        return ""
    svg, path = frame(
        np.concatenate([r["xs"] for r, *_ in lines]),
        np.concatenate([y for *_, y in lines]),
        unit,
        zero,
    )
    for run, _, ys in lines:
        svg += f'<path class="raw {run["css"]}" d="{path(run["xs"], ys)}"/>'
    for run, i, ys in lines:
        svg += f'<path class="line {run["css"]}" stroke-dasharray="{DASHES[i]}" d="{path(run["xs"], smooth(ys))}"/>'
    keys, changed = (
        {run["css"]: ("", run["label"]) for run, *_ in lines},
        {run["changed"] for run in runs},
    )
    changed = changed.pop() if len(changed) == 1 else "changed image"
    keys |= {
        f"i{i}": (DASHES[i], branches[i][-1].format(changed))
        for _, i, _ in lines
        if len(branches) > 1
    }
    return figure(title, svg, "".join(
        f'<span><svg viewBox="0 0 26 8" class="key {css}"><path d="M2 4H24" stroke-dasharray="{dash}"/></svg>'
        f"{text(label, 40)}</span>" for css, (dash, label) in keys.items()))  # fmt: skip


def time_chart(runs: list[dict], run: dict) -> str:
    """Seconds a step of one run, its phases stacked (smoothed); all runs' time charts share their axes."""
    total, every = (
        np.nan_to_num(curve(run, "seconds/step")),
        np.concatenate([curve(r, "seconds/step") for r in runs]),
    )
    if not total.any():
        return ""
    svg, path = frame(np.concatenate([r["xs"] for r in runs]), every, "seconds a step", True)
    base, legend = np.zeros(len(total)), ""
    for i, (key, label) in enumerate(PHASES.items()):
        upper = (
            base + smooth(np.nan_to_num(curve(run, key)))
            if key
            else np.maximum(smooth(total), base)
        )
        if (
            upper - base
        ).sum() > 0.01 * total.sum():  # what takes no time gets no place in the legend
            outline = path(
                np.concatenate([run["xs"], run["xs"][::-1]]), np.concatenate([upper, base[::-1]])
            )
            svg += f'<path class="area a{i} {run["css"]}" d="{outline}Z"/>'
            legend += f'<span><i class="swatch a{i} {run["css"]}"></i>{label}</span>'
        base = upper
    return figure(f"Time per phase: {text(run['label'], 40)}", svg, legend)


def curves(runs: list[dict]) -> str:
    runs = [
        run | {"xs": thin([r["step"] for r in run["metrics"]])} for run in runs if run["metrics"]
    ]
    charts = "".join(
        [line_chart(runs, *chart) for chart in CHARTS] + [time_chart(runs, run) for run in runs]
    )
    if not charts:
        return '<p class="empty">No step has finished yet.</p>'
    return f"""<p>Bold lines are centred means over a fifteenth of the run, faint ones the raw data (in a long run:
        means of neighbouring steps).</p><div class="cards charts">{charts}</div>"""


# --------------------------------------------------------------------------------------------- pictures, responses


def open_picture(run: dict, name) -> Image.Image | None:
    """A picture of the run as RGB; None, with a note, where it is missing, broken or outside the run's folder."""
    file = (run["folder"] / str(name)).resolve()
    try:
        if not file.is_relative_to(run["folder"].resolve()):
            raise ValueError("outside the run's folder")
        return Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        note = f"Picture {str(name)[:80]} is left out: {type(error).__name__}."
        run["notes"] += [note] if note not in run["notes"] else []
        return None


def img(image: Image.Image, alt: str) -> str:
    """An <img> that holds its picture: PNG up to 128 pixels, else JPEG of at most MAX_SIDE pixels."""
    kind, file = ("png" if max(image.size) <= 128 else "jpeg"), io.BytesIO()
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, kind, quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" alt="{alt}" src="data:image/{kind};base64,{data}"/>'


def gallery_card(run: dict, step: int) -> str:
    """Clean picture, changed picture and amplified difference for the first prompt of a step; "" if there is none."""
    sample = next(
        (s for s in run["samples"] if s["step"] == step and s.get("image") == "adversarial"), None
    )
    clean, moved = (
        open_picture(run, sample.get(k)) if sample else None for k in ("clean_picture", "picture")
    )
    if clean is None or moved is None or clean.size != moved.size:
        return ""
    change = np.asarray(moved, np.float64) - np.asarray(
        clean, np.float64
    )  # (height, width, 3), in 1/255
    mse = float((change**2).mean())
    psnr = f"{10 * math.log10(255**2 / mse):.1f} dB" if mse else "∞"
    difference = Image.fromarray(np.clip(128 + GAIN * change, 0, 255).astype(np.uint8))
    pictures = {
        "clean image": clean,
        run["changed"]: moved,
        f"change\u00a0×\u00a0{GAIN}": difference,
    }
    trio = "".join(
        f"<figure>{img(p, label)}<figcaption>{label}</figcaption></figure>"
        for label, p in pictures.items()
    )
    return f"""<article class="card"><h4>Step {step} <small>L∞ {abs(change).max():.0f}/255 · PSNR {psnr}</small></h4>
        <div class="trio">{trio}</div>{question(sample)}</article>"""


def question(sample: dict) -> str:
    return (
        f'<p class="qa">{text(sample.get("problem"))} <b>{text(sample.get("answer"), 80)}</b></p>'
    )


def gallery(runs: list[dict]) -> str:
    parts = f"<p>The change is shown × {GAIN} around mid-grey: grey is no change.</p>"
    for run in runs:
        cards = "".join(gallery_card(run, step) for step in run["gallery"])
        why = (
            "no image is changed."
            if run["arm"] == ARMS["none"][0]
            else "no changed picture in its samples yet."
        )
        parts += f'<h3>{run["name"]}</h3><div class="cards">{cards}</div>' if cards else (
            f'<p class="empty">{run["name"]}: {why}</p>')  # fmt: skip
    return parts


def token(value, entropy, kept, scale: float) -> str:
    """One token, shaded by its entropy in ten levels up to `scale` nats, underlined if TsEC kept it."""
    value, nats = str(value), number(entropy)
    shown = text(value[:MAX_TOKEN_CHARS]) + "…" * (len(value) > MAX_TOKEN_CHARS)
    shown = (
        shown.replace("\t", "⇥").replace("\r", "␍").replace("\n", "↵<br/>").replace(" ", "·<wbr/>")
    )
    level = min(max(int(10 * nats / scale), 0), 9) if math.isfinite(nats) else 0
    return (
        f'<i class="e{level}{" kept" * (kept is True)}" title="{fixed(nats, 2)} nats">{shown}</i>'
    )


def response(sample: dict, scale: float) -> str:
    """One response: accuracy, reward, advantage; then its tokens, cut at MAX_TOKENS (the rest is counted)."""
    right, reward, advantage = (number(sample.get(k)) for k in ("accuracy", "reward", "advantage"))
    facts = {1: "✓ right", 0: "✗ wrong"}.get(right, f"accuracy {fixed(right, 2)}")
    facts += f" · reward {fixed(reward, 2)} · advantage {fixed(advantage, 2, '+')}"
    facts += " · truncated" * (sample.get("truncated") is True)
    tokens, entropy, kept = (
        v if isinstance(v := sample.get(k), list) else [] for k in ("tokens", "entropy", "kept")
    )
    entropy, kept = (v if len(v) == len(tokens) else [None] * len(tokens) for v in (entropy, kept))
    shown = list(zip(tokens, entropy, kept, strict=True))[:MAX_TOKENS]
    body = "".join(token(*t, scale) for t in shown) or text(sample.get("response", ""))
    more = (
        f"<em> … {len(tokens) - MAX_TOKENS:,} more tokens not shown</em>"
        if len(tokens) > MAX_TOKENS
        else ""
    )
    return f"""<div class="response{" good" * (right == 1)}"><p class="facts">{facts}</p>
        <p class="tokens">{body}{more}</p></div>"""


def response_card(run: dict, step: int, scale: float) -> str:
    """The first prompt of a step: responses from the clean image and from the changed one side by side."""
    samples = [s for s in run["samples"] if s["step"] == step]
    samples = [s for s in samples if s.get("prompt") == samples[0].get("prompt")]
    sides = ""
    for kind, label in (("clean", "clean image"), ("adversarial", run["changed"])):
        group = [s for s in samples if s.get("image") == kind]
        if group:
            picture = open_picture(run, group[0].get("picture"))
            count = f"{min(RESPONSES, len(group))} of {len(group)}"
            sides += f"""<div><div class="from">{img(picture, label) if picture else ""}<h4>From the {label}
                <small>{count}</small></h4></div>{"".join(response(s, scale) for s in group[:RESPONSES])}</div>"""
    return f"""<article class="card"><small>Step {step}, row {text(samples[0].get("row"), 20)}</small>
        {question(samples[0])}<div class="sides">{sides}</div></article>""" if sides else ""  # fmt: skip


def responses(runs: list[dict]) -> str:
    lists = [
        s["entropy"][:MAX_TOKENS]
        for run in runs
        for s in run["samples"]
        if isinstance(s.get("entropy"), list)
    ]
    seen = [number(h) for entropy in lists for h in entropy if math.isfinite(number(h))]
    scale = max(0.1, round(float(np.quantile(seen, 0.98)), 1)) if seen else 1.0
    bar = "".join(f'<i class="e{level}"></i>' for level in range(10))
    parts = f"""<p class="shade">Shade: entropy of a token, 0 <span>{bar}</span> {scale:g} nats and more.
        <i class="kept">Underlined</i>: kept by TsEC. A dot is a space, ↵ a newline. The first {RESPONSES} responses of
        an image, at most {MAX_TOKENS} tokens of each.</p>"""
    for run in runs:
        cards = "".join(response_card(run, step, scale) for step in run["responses"])
        parts += f"<h3>{run['name']}</h3>" + (cards or '<p class="empty">No samples yet.</p>')
    return parts


# --------------------------------------------------------------------------------------------------------- the page

CSS = """
:root { color-scheme: light dark; --ink: #22262b; --soft: #676d75; --page: #f7f6f3; --card: #fff; --edge: #e4e1da;
  --c0: #0b66b0; --c1: #cb4b16; --c2: #11805f; --c3: #9a4c95; --c4: #8a6d00; --c5: #4a5560; --good: #11805f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --soft: #9aa0a8; --page: #16181b; --card: #1e2125;
  --edge: #32363c; --c0: #5cb0f2; --c1: #f2895a; --c2: #4cc39b; --c3: #d48fce; --c4: #d9b73c; --c5: #a9b4bf;
  --good: #4cc39b; } }
.r0 { color: var(--c0); } .r1 { color: var(--c1); } .r2 { color: var(--c2); } .r3 { color: var(--c3); }
.r4 { color: var(--c4); } .r5 { color: var(--c5); } * { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 48px 24px 96px; overflow-wrap: anywhere; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 20px; }
h4 { font-size: 15px; margin: 0; } h2 { font-size: 23px; letter-spacing: -0.01em; margin: 64px 0 12px; }
h3 { font-size: 17px; margin: 28px 0 12px; } dd { margin: 0; } p, li, dd { max-width: 78ch; }
.lead { font-size: 18px; margin: 0 0 10px; } code { font-size: 0.9em; }
small { color: var(--soft); font-weight: 400; font-size: 13px; } details { margin: 16px 0; }
summary, nav a, dd, .empty, .legend, .shade, .facts, thead th { color: var(--soft); }
nav { margin-top: 22px; font-size: 15px; } nav a { margin-right: 18px; display: inline-block; }
.notes, .empty { background: var(--card); border-left: 3px solid var(--edge); padding: 10px 16px; font-size: 15px; }
.notes { list-style: none; margin: 8px 0 16px; border-color: #d9a400; } dt { font-weight: 600; margin-top: 14px; }
.card ul { list-style: none; padding: 0; margin: 0; color: var(--soft); } li b { color: var(--ink); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 12px; padding: 20px; margin: 0 0 20px }
.cards, .sides { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.cards .card { margin: 0; min-width: 0; } .card h3 { margin: 0 0 8px; } figure { margin: 0; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure.card { display: flex; flex-direction: column; padding: 16px 16px 8px; }
figcaption { font-weight: 600; font-size: 15px; } .chart { width: 100%; margin-top: auto; }
.legend { font-size: 13px; margin: 2px 0 8px; } .legend span { margin-right: 14px; display: inline-block; }
.key { width: 26px; height: 8px; margin-right: 5px; }
.swatch { display: inline-block; width: 12px; height: 12px; background: currentColor; margin-right: 5px; }
svg path { fill: none; stroke: currentColor; stroke-linecap: round; stroke-linejoin: round; }
svg .line, .key path, .strip g path { stroke-width: 2; } svg .raw { opacity: 0.4; } svg .grid { stroke: var(--edge); }
svg text { fill: var(--soft); font-size: 12.5px; } svg .area { fill: currentColor; stroke: none; }
.a0 { opacity: 0.85; } .a1 { opacity: 0.55; } .a2 { opacity: 0.32; } .a3 { opacity: 0.14; } .strip { width: 140px; }
.strip .was { color: var(--soft); } .strip .now circle { fill: currentColor; }
.strip .was circle { fill: var(--card); stroke: currentColor; stroke-width: 1.5; }
table { border-collapse: collapse; font-size: 15px; }
th, td { text-align: left; padding: 3px 12px 3px 0; vertical-align: top; }
thead th { font-weight: 400; font-size: 13px; } .wide { overflow-x: auto; }
.differs { background: rgba(217, 164, 0, 0.14); }
.wide td, .wide th { border-top: 1px solid var(--edge); padding: 4px 20px 4px 8px; min-width: 9em; }
.wide th { white-space: nowrap; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; } .numbers .group th { padding-top: 12px; }
.numbers .group { border-top: 1px solid var(--edge); } .numbers .pic { width: 140px; padding-right: 0; }
.numbers td { white-space: nowrap; } .numbers .who { white-space: normal; }
.numbers td small { display: block; line-height: 1.2; } .card li { margin-bottom: 8px; font-size: 15px; }
img { display: block; width: 100%; border-radius: 6px; } .png { image-rendering: pixelated; } .qa { margin: 0; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; margin: 12px 0; }
.trio figcaption { font-weight: 400; font-size: 13px; color: var(--soft); margin-top: 4px; }
.qa b { border: 1px solid var(--edge); border-radius: 6px; padding: 0 7px; margin-left: 4px; }
.sides { margin-top: 14px; gap: 28px; } .sides > div { min-width: 0; }
.from { display: flex; gap: 12px; align-items: center; } .from img { width: 64px; }
.response { border-left: 3px solid var(--edge); padding-left: 14px; margin-top: 16px; }
.good { border-color: var(--good); } .facts { font-size: 13px; margin: 0 0 4px; } .good .facts { color: var(--good); }
.tokens i { margin-right: 1px; } .shade { font-size: 14px; }
.tokens { font: 13.5px/1.9 ui-monospace, monospace; margin: 0; max-height: 380px; overflow-y: auto; }
.tokens i, .shade i { font-style: normal; unicode-bidi: isolate; border-radius: 2px; padding: 2px 0; }
.tokens .kept, .shade .kept { box-shadow: inset 0 -2px currentColor; }
.shade span i { display: inline-block; width: 16px; height: 14px; padding: 0; vertical-align: -2px; }
.shade span { border: 1px solid var(--edge); display: inline-block; line-height: 1; }
@media (max-width: 640px) { main { padding: 28px 16px 64px; } h1 { font-size: 27px; } h2 { margin-top: 48px; }
  .lead { font-size: 16px; } .card { padding: 14px; } .pic { display: none; } th, td { padding-right: 8px; }
  .numbers td small, .trio figcaption { font-size: 12px; } }
""" + "\n".join(f".e{i} {{ background: rgba(235, 130, 30, {0.075 * i:.3f}); }}" for i in range(10))  # fmt: skip


def page(runs: list[dict]) -> str:
    """The whole page; well-formed XML too, so that a test can parse it."""
    title = " and ".join(text(run["label"], 60) for run in runs)
    terms = "".join(f"<dt>{term}</dt><dd>{said}</dd>" for term, said in GLOSSARY.items())
    parts = {"Before and after": numbers(runs), "Curves": curves(runs), "Images": gallery(runs),
             "Responses": responses(runs), "How to read this": f"<dl>{terms}</dl>"}  # fmt: skip
    return document(title, "".join(about(run) for run in runs) + settings(runs), parts)


def document(title: str, intro: str, parts: dict[str, str]) -> str:
    """A page of sections: heading -> HTML."""
    links = "".join(f'<a href="#part{i}">{heading}</a>' for i, heading in enumerate(parts))
    body = "".join(
        f'<section id="part{i}"><h2>{k}</h2>{v}</section>' for i, (k, v) in enumerate(parts.items())
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta http-equiv="Content-Security-Policy" content="{POLICY}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/><title>SaEI: {title}</title>
<style>{CSS}</style></head><body><main><h1>SaEI: {title}</h1>
{intro}<nav>{links}</nav>{body}</main></body></html>
"""


# ---------------------------------------------------------------------------------------------- the study's results

BANDS = [  # of the study's page: title, unit, y axis from zero?, key, key that stands in for it
    (
        "Training accuracy, clean images",
        "share of right responses",
        True,
        "accuracy/clean",
        "accuracy",
    ),
    ("Entropy of the responses, clean images", "nats per token", True, "entropy/clean", None),
    ("Groups of one accuracy: they teach nothing", "share of groups", True, "zero_variance", None),
    ("Rescued prompts: right only on the changed image", "share of prompts", True, "rescued", None),
]


def bands(
    arms: dict[str, list[dict]], unit: str, zero: bool, key: str, stand_in: str | None
) -> tuple[str, str]:
    """One metric by arm: the mean over seeds in a band from the lowest seed to the highest.

    -> axes and lines on frame's canvas, the arms' names in their colours (from the seventh on dashed); "" without data
    """
    lines, names = [], ""
    for i, (arm, results) in enumerate(arms.items()):
        found = [r["curves"] for r in results if key in r["curves"] or stand_in in r["curves"]]
        if len({len(c["step"]) for c in found}) > 1:
            raise ValueError(
                f"{arm}: its seeds have curves of different length; were they runs of different steps?"
            )
        if found:
            ys = np.array([c.get(key, c.get(stand_in)) for c in found])  # (seeds, points)
            look = f'class="line r{i % 6}" stroke-dasharray="{DASHES[i // 6 % 2]}"'
            lines.append((f"r{i % 6}", look, np.array(found[0]["step"]), ys))
            names += f'<span><svg viewBox="0 0 26 8" class="key"><path {look} d="M2 4H24"/></svg>{text(arm, 60)}</span>'
    if not lines:
        return "", ""
    svg, path = frame(
        *(np.concatenate([line[k].flatten() for line in lines]) for k in (2, 3)), unit, zero
    )
    for css, _, xs, ys in lines:
        outline = path(np.concatenate([xs, xs[::-1]]), np.concatenate([ys.max(0), ys.min(0)[::-1]]))
        svg += f'<path class="area a3 {css}" d="{outline}Z"/>'
    for _, look, xs, ys in lines:
        svg += f'<path {look} d="{path(xs, ys.mean(0))}"/>'
    return svg, names


def band_charts(arms: dict[str, list[dict]], charts: list[tuple]) -> str:
    """A row of cards, those of BANDS that have data."""
    drawn = [(title, *bands(arms, *rest)) for title, *rest in charts]
    cards = "".join(figure(title, svg, names) for title, svg, names in drawn if svg)
    return f'<div class="cards charts">{cards}</div>' if cards else ""


def markdown(source: str) -> str:
    """What study/tables.py writes, paragraphs and tables, as HTML."""

    def mark(cell: str) -> str:
        return re.sub(
            r"\*\*(.+?)\*\*", r"<b>\1</b>", re.sub("`(.+?)`", r"<code>\1</code>", text(cell))
        )

    parts = []
    for block in source.split("\n\n"):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        if block.startswith("|") and len(rows) > 2:
            head = "".join(f"<th>{mark(cell)}</th>" for cell in rows[0])
            body = "".join(
                "<tr>" + "".join(f"<td>{mark(cell)}</td>" for cell in row) + "</tr>"
                for row in rows[2:]
            )
            body = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            parts.append(f'<div class="wide">{body}</div>')
        else:
            parts.append(f"<p>{mark(block)}</p>")
    return "".join(parts)


def study_arms(runs: dict, wanted: tuple[str, ...]) -> dict[str, list[dict]]:
    """Name -> results of the seeds that did not fail, of the wanted arms that have any."""
    from benchmarks import study_tables  # the page of a run needs none of it

    done = study_tables.good(runs)
    return {study_tables.ARMS[arm]: list(done[arm].values()) for arm in wanted if arm in done}


def study_picture(runs: dict, wanted: tuple[str, ...]) -> str:
    """The first three of BANDS beside each other, as an SVG file's text; "" without data."""
    colours = re.findall(r"--c\d: (#\w+)", CSS)[:6]  # the page's, on white
    style = ".grid{stroke:#e4e1da} .line{stroke-width:2} path{fill:none;stroke:currentColor} text{fill:#676d75;"
    style += "font:12.5px sans-serif} .area{fill:currentColor;stroke:none;opacity:.12} .title{fill:#22262b;font-size:14px}"
    style += "".join(f" .r{i}{{color:{colour}}}" for i, colour in enumerate(colours))
    arms = study_arms(runs, wanted)
    parts = [bands(arms, *chart[1:])[0] for chart in BANDS[:3]]
    if not all(parts):
        return ""
    body = "".join(
        f'<g transform="translate({410 * i} 30)"><text class="title" x="4" y="-10">{chart[0]}</text>{part}</g>'
        for i, (chart, part) in enumerate(zip(BANDS, parts, strict=False))
    )
    for i, arm in enumerate(arms):
        x, y = 20 + 300 * (i % 4), 282 + 22 * (i // 4)
        body += f'<g transform="translate({x} {y})"><path class="line r{i % 6}" d="M0 0H24"/>'
        body += f'<text x="32" y="4">{text(arm, 60)}</text></g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1240 320"><style>{style}</style>'
        f'<rect width="1240" height="320" fill="#fff"/>{body}</svg>\n'
    )


def build_study(folder: Path, output: Path | None = None) -> Path:
    """Write the page of study/run.py's results, by default to index.html beside them, and return its path."""
    from benchmarks import study_tables  # the page of a run needs none of it

    groups = {
        "main arms": (study_tables.MAIN, BANDS),
        "controls of the update": (study_tables.CONTROLS, BANDS[:2]),
    }
    charts = ""
    for setting, runs in study_tables.load(folder).items():
        for title, (wanted, some) in groups.items():
            arms = study_arms(runs, wanted)
            drawn = (
                band_charts(study_arms(runs, dict.fromkeys(("plain", *wanted))), some)
                if arms
                else ""
            )
            charts += f"<h3>{text(setting, 60)}, {title}</h3>{drawn}" if drawn else ""
    parts = {heading: markdown(make(folder)) for heading, make in study_tables.PARTS.values()}
    parts["Curves"] = (
        charts or '<p class="empty">No run has finished yet.</p>'
    )  # instead of the picture's link
    said = "Lines are means over seeds, bands reach from the lowest seed to the highest."
    output = Path(output) if output else folder / "index.html"
    output.write_text(document("the study", f'<p class="lead">{said}</p>', parts), encoding="utf-8")
    return output


def build_report(folders: list[str | Path], output: Path | None = None) -> Path:
    """Write the page of one or several runs and return its path (default: report/index.html in the first folder).

    Raises FileNotFoundError for a folder that does not exist or in which nothing has trained.
    """
    if not folders:
        raise ValueError("build_report needs at least one run's folder")
    runs = [read_run(Path(folder), share=len(folders)) for folder in folders]
    names = [run["folder"].resolve().name for run in runs]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        run["css"] = f"r{i % 6}"
        run["label"] = name if names.count(name) == 1 else str(run["folder"])
        run["name"] = f'<b class="{run["css"]}">{text(run["label"], 60)}</b>'
    output = Path(output) if output else runs[0]["folder"] / "report" / "index.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs), encoding="utf-8")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the HTML report of one run, or of several on one page."
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that train_saei.py wrote")
    parser.add_argument(
        "--output", type=Path, help="default: report/index.html in the first folder"
    )
    args = parser.parse_args()
    try:
        if (
            len(args.folders) == 1
            and not (args.folders[0] / "metrics.jsonl").exists()
            and list(args.folders[0].glob("*/*-*.json"))
        ):
            print(build_study(args.folders[0], args.output))
        else:
            print(build_report(args.folders, args.output))
    except FileNotFoundError as error:
        raise SystemExit(f"report.py: {error}") from None


if __name__ == "__main__":
    main()
