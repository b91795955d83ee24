"""The study's tables and intervals, from results/ alone: `python -m study.run --table`, docs/study.md.

A difference is paired: the same seeds and the same problems on both sides, d_si = a_si - b_si. Its 95% interval is of
Student's t over both, crossed, as every seed answers the same problems:
    mean d +- t(S - 1) sqrt(var_s / S + var_i / N)    var_s of the seeds' means, var_i of the problems'
The quantile is that of S - 1 degrees of freedom, since the seeds decide: they differ by more than the problems. A
bootstrap of 3 to 5 seeds leaves a difference of 0 out more often than in the 5% it says: tests/test_study.py has the
check, which it fails. With fewer than 3 seeds there is no interval.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from eval import pass_at_k  # noqa: E402

ARMS = {
    "before": "before",
    "plain": "plain GRPO",
    "temperature": "plain GRPO, T of SaEI's entropy",
    "random": "random signs",
    "noise": "NoisyRollout",
    "egas": "EgAS without TsEC",
    "saei": "SaEI",
    "eps-1": "eps 1/255",
    "eps-4": "eps 4/255",
    "pgd-1": "1 PGD step",
    "pgd-10": "10 PGD steps",
    "low-cut-only": "TsEC, low cut alone",
    "high-cut-only": "TsEC, high cut alone",
    "extremes": "TsEC reversed: the extremes",
    "scope-batch": "TsEC over the batch",
    "split-6-2": "6 clean, 2 adversarial",
    "split-2-6": "2 clean, 6 adversarial",
    "sampled": "conditioned on the sampled image",
    "annealed": "eps annealed",
    "mixed-plain": "from demo/mixed: plain GRPO",
    "mixed-saei": "from demo/mixed: SaEI, minus plain GRPO from there",
    "two-updates": "plain GRPO, 2 updates a batch",
    "bonus": "entropy bonus",
    "skywork": "Skywork's adaptive bonus",
    "aer": "AER",
    "ecvgpo": "ECVGPO",
    "vogue": "VOGUE",
    "top_entropy": "80/20",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov, 2 updates a batch",
    "sent": "SENT's tokens, 2 updates a batch",
    "saei-two-updates": "SaEI, 2 updates a batch",
    "saei-kl_cov": "SaEI and KL-Cov, 2 updates a batch",
}
CONTROLS = tuple(ARMS)[tuple(ARMS).index("two-updates") :]
BASES = {
    "mixed-saei": "mixed-plain",
    "mixed-plain": None,
    "kl_cov": "two-updates",
    "sent": "two-updates",
}
BASES |= {"vogue": "noise", "saei-two-updates": "two-updates", "saei-kl_cov": "kl_cov"}
MAIN = ("plain", "temperature", "random", "noise", "egas", "saei")
T_95 = {
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # by degrees of freedom
Runs = dict[str, dict[int, dict]]  # arm -> seed -> result

# --------------------------------------------------------------------------------------------------------- statistics


def unpack(text: str) -> np.ndarray:
    """study.pack's string -> (N,) counts"""
    return np.array([int(c, 36) for c in text], dtype=np.int64)


def per_problem(part: dict, name: str) -> np.ndarray:
    """greedy, or pass@k without bias, of each problem.   -> (N,) float"""
    if name == "greedy":
        return unpack(part["greedy"]).astype(float)
    n, k = part["samples"], int(name.removeprefix("pass@"))
    return np.array([pass_at_k(n, c, k) for c in range(n + 1)])[unpack(part["right"])]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of differences (S, N) and its 95% interval, as the header says.   -> mean, low, high; NaN for S < 3"""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be (seeds, problems), got {values.shape}")
    S, N = values.shape
    if S < 3:
        return float(values.mean()), float("nan"), float("nan")
    variance = values.mean(axis=1).var(ddof=1) / S + values.mean(axis=0).var(ddof=1) / N
    half = T_95[min(S - 1, max(T_95))] * float(np.sqrt(variance))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def paired(a: dict[int, dict], b: dict[int, dict], split: str, name: str) -> np.ndarray | None:
    """a - b on the seeds and the problems that both have.   -> (S, N), or None where there is no such seed"""
    rows = []
    for seed in sorted(set(a) & set(b)):
        both = [x[seed]["evaluation"].get(split) for x in (a, b)]
        if all(both):
            x, y = (per_problem(part, name) for part in both)
            rows.append(x[: len(y)] - y[: len(x)])
    return np.stack([row[: min(map(len, rows))] for row in rows]) if rows else None


# ------------------------------------------------------------------------------------------------------------ reading


def load(folder: Path) -> dict[str, Runs]:
    """{setting: {arm: {seed: result}}} in the order of ARMS; study/results/tuning is not looked at."""
    found = {}
    for path in sorted(Path(folder).glob("*/*-*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["setting"], {}).setdefault(result["arm"], {})[result["seed"]] = (
            result
        )
    order = list(ARMS)
    place = {
        arm: order.index(arm) if arm in order else len(order)
        for runs in found.values()
        for arm in runs
    }
    return {
        s: dict(sorted(runs.items(), key=lambda x: place[x[0]]))
        for s, runs in sorted(found.items(), reverse=True)
    }


def good(runs: Runs) -> Runs:
    """Without the failed runs, and without arms that have no other."""
    kept = {
        arm: {seed: r for seed, r in by_seed.items() if "error" not in r}
        for arm, by_seed in runs.items()
    }
    return {arm: by_seed for arm, by_seed in kept.items() if by_seed}


def named(arm: str) -> str:
    return ARMS.get(arm, arm)


def seeds_of(runs: Runs, arm: str) -> str:
    """How many seeds an arm has that did not fail, and how many that did."""
    failed = sum("error" in r for r in runs[arm].values())
    return f"{len(runs[arm]) - failed}" + f" ({failed} failed)" * bool(failed)


def splits_of(runs: Runs) -> list[str]:
    """The test splits, the trained domain's first."""
    return list(
        dict.fromkeys(
            split
            for by_seed in runs.values()
            for r in by_seed.values()
            for split in r["evaluation"]
        )
    )


# -------------------------------------------------------------------------------------------------------------- cells


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def spread(values: list[float], digits: int = 3) -> str:
    """mean (lowest to highest), over seeds"""
    if not values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return (
        mean
        if len(values) == 1
        else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def change(values: np.ndarray | None) -> str:
    """mean [interval], and in how many of the seeds it is above 0; bold where the interval leaves 0 out"""
    if values is None:
        return "–"
    mean, low, high = interval(values)
    said = f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else "")
    above = int((values.mean(axis=1) > 0).sum())
    return (f"**{said}**" if low > 0 or high < 0 else said) + f" {above}/{len(values)}"


def column(by_seed: dict[int, dict], split: str, name: str) -> list[float]:
    """A value a seed."""
    parts = [
        r.get("deep") if name == "pass@32" else r["evaluation"].get(split) for r in by_seed.values()
    ]
    if name in ("entropy", "answers"):
        return [part[name] for part in parts if part]
    return [float(per_problem(part, name).mean()) for part in parts if part]


def curve_mean(result: dict, name: str, start: float, stop: float) -> float:
    """Mean of a curve from one share of the run to another; NaN where the run has no such curve."""
    values = result.get("curves", {}).get(name, [])
    first = min(int(start * len(values)), len(values) - 1)
    return (
        float(np.mean(values[first : max(first + 1, round(stop * len(values)))]))
        if values
        else float("nan")
    )


def curve_cell(by_seed: dict[int, dict], name: str, start: float = 0.0, stop: float = 1.0) -> str:
    values = [curve_mean(r, name, start, stop) for r in by_seed.values()]
    return "–" if np.isnan(values).all() else f"{np.nanmean(values):.3f}"


# ------------------------------------------------------------------------------------------------------------- tables


def main_table(setting: str, runs: Runs) -> str:
    """The trained domain, by arm: mean and range over seeds."""
    kept = good(runs)
    deep = any("deep" in r for done in kept.values() for r in done.values())
    (split, *others), names = (
        splits_of(kept),
        ["greedy", "pass@1", "pass@8", *["pass@32"] * deep, "entropy", "answers"],
    )
    rows = []
    for arm in [arm for arm in runs if arm in ("before", *MAIN)]:
        done = kept.get(arm, {})
        cells = [spread(column(done, split, name)) for name in names]
        elsewhere = [column(done, other, "pass@1") for other in others]  # (domains, seeds)
        cells.append(spread([float(np.mean(x)) for x in zip(*elsewhere, strict=True)]))
        minutes = spread([r["seconds/cpu"] / 60 for r in done.values() if "seconds/cpu" in r], 1)
        name = ARMS[arm] + "".join(
            {f", {r['config']['temperature']}" for r in done.values() if arm == "temperature"}
        )
        rows.append([name, seeds_of(runs, arm) if arm != "before" else "", *cells, minutes])
    sizes = next(iter(next(iter(kept.values())).values()))["sizes"]
    commits = sorted({f"`{r['commit']}`" for done in kept.values() for r in done.values()})
    note = f"{setting}: {split}, {sizes['problems']:,} fresh problems, greedy and {sizes['samples']} samples each"
    note += (
        f"; pass@32 from {sizes['deep_samples']} samples of the first {sizes['deep']:,}"
        if deep
        else ""
    )
    note += ". Mean (lowest to highest) over seeds; answers: distinct ones among a problem's samples; minutes of CPU "
    note += f"time for the training. Code of {', '.join(commits)}."
    head = ["arm", "seeds", *names, f"pass@1, {len(others)} untrained domains", "minutes"]
    return table(head, rows) + f"\n\n{note}"


def differences(setting: str, runs: Runs) -> tuple[str, int]:
    """SaEI minus every other main arm on every split.   -> tables, number of intervals"""
    kept, parts, count = good(runs), [], 0
    others = [arm for arm in MAIN if arm in kept and arm != "saei"]
    if "saei" not in kept or not others:
        return "", 0
    for name in ("pass@1", "pass@8"):
        values = [
            [paired(kept["saei"], kept[arm], split, name) for split in splits_of(kept)]
            for arm in others
        ]
        rows = [[ARMS[arm], *map(change, row)] for arm, row in zip(others, values, strict=True)]
        parts.append(table([f"{name}, {setting}: SaEI minus", *splits_of(kept)], rows))
        count += sum(x is not None for row in values for x in row)
    return "\n\n".join(parts), count


def short_table(setting: str, runs: Runs) -> str:
    """The README's: every main arm on the trained domain; what SaEI has over it there and, pooled, elsewhere."""
    kept, rows = good(runs), []
    first, *others = splits_of(kept)
    for arm in [arm for arm in kept if arm in ("before", *MAIN)]:
        own, cells = column(kept[arm], first, "pass@1"), [""] * 3
        if arm not in ("before", "saei"):
            pairs = [
                paired(kept.get("saei", {}), kept[arm], split, "pass@1")
                for split in (first, *others)
            ]
            pooled = None if any(x is None for x in pairs) else np.concatenate(pairs[1:], axis=1)
            cells = map(
                change, (pairs[0], paired(kept.get("saei", {}), kept[arm], first, "pass@8"), pooled)
            )
        minutes = [r["seconds/cpu"] / 60 for r in kept[arm].values() if "seconds/cpu" in r]
        cost = f"{np.mean(minutes):.1f}" if minutes else ""
        seeds = seeds_of(runs, arm) if arm != "before" else ""
        rows.append(
            [
                ARMS[arm],
                seeds,
                spread(own),
                spread(column(kept[arm], first, "pass@8")),
                *cells,
                cost,
            ]
        )
    head = [f"arm, {setting}", "seeds", "pass@1", "pass@8", "SaEI minus it: pass@1", "pass@8"]
    return table([*head, f"pass@1, {len(others)} untrained domains", "minutes"], rows)


def corruption_table(setting: str, runs: Runs) -> str:
    kept = {arm: done for arm, done in good(runs).items() if arm in ("before", *MAIN)}
    names = next(
        (
            list(r["corrupted"])
            for done in kept.values()
            for r in done.values()
            if r.get("corrupted")
        ),
        [],
    )
    if not names:
        return ""
    split, rows = splits_of(kept)[0], []
    for arm, done in kept.items():
        means = [
            [unpack(r["corrupted"][name]).mean() for r in done.values() if r.get("corrupted")]
            for name in names
        ]
        rows.append([ARMS[arm], spread(column(done, split, "greedy")), *map(spread, means)])
    return table([f"greedy, {setting}", "as it is", *names], rows)


def compared(setting: str, runs: Runs, arms: list[str], base: str) -> tuple[str, int]:
    """The arms, and their differences to `base` or, where BASES names another arm, to that.   -> table, intervals"""
    kept, rows, count = good(runs), [], 0
    for arm in [arm for arm in arms if arm in kept]:
        own = BASES.get(arm, base)
        values = [
            paired(kept[arm], kept.get(own, {}), splits_of(kept)[0], name)
            for name in ("pass@1", "pass@8")
        ]
        count += sum(x is not None for x in values)
        cells = [
            spread(column(kept[arm], splits_of(kept)[0], name))
            for name in ("pass@1", "pass@8", "entropy")
        ]
        step = spread([r["seconds"]["seconds/step"] for r in kept[arm].values()], 2)
        against = ARMS[own] if own in kept else ""
        rows.append([named(arm), seeds_of(runs, arm), *cells, against, *map(change, values), step])
    head = [
        f"arm, {setting}",
        "seeds",
        "pass@1",
        "pass@8",
        "entropy",
        "minus",
        "pass@1",
        "pass@8",
        "seconds a step",
    ]
    return (table(head, rows) if rows else ""), count


def ablation_table(setting: str, runs: Runs) -> tuple[str, int]:
    """Every arm that is no main one and no control, against SaEI."""
    return compared(
        setting, runs, [arm for arm in runs if arm not in ("before", *MAIN, *CONTROLS)], "saei"
    )


def control_table(setting: str, runs: Runs) -> tuple[str, int]:
    """The controls of the update, against plain GRPO of as many updates or, VOGUE, with its noise."""
    return compared(setting, runs, [arm for arm in CONTROLS if arm in runs], "plain")


def diagnostic_table(setting: str, runs: Runs) -> str:
    """What the training looked like: means over steps and seeds."""
    head = [
        f"arm, {setting}",
        "entropy, first fifth",
        "last fifth",
        "on the changed image",
        "groups that teach, start",
    ]
    head += [
        "all steps",
        "rescued",
        "lost",
        "accuracy, clean",
        "accuracy, changed",
        "judge, clean",
        "judge, changed",
    ]
    rows = []
    for arm, done in good(runs).items():
        if arm == "before":
            continue
        teach = [
            [1 - curve_mean(r, "zero_variance", 0, stop) for r in done.values()]
            for stop in (0.2, 1.0)
        ]
        judges = [r["diagnostics"]["judge"] for r in done.values() if "judge" in r["diagnostics"]]
        cells = [
            curve_cell(done, "entropy/clean", 0, 0.2),
            curve_cell(done, "entropy/clean", 0.8, 1),
        ]
        cells += [curve_cell(done, "entropy/fresh"), *(f"{np.mean(x):.3f}" for x in teach)]
        cells += [
            curve_cell(done, name)
            for name in ("rescued", "lost", "accuracy/clean", "accuracy/adversarial")
        ]
        cells += [
            f"{np.mean([j[k] for j in judges]):.3f}" if judges else "–"
            for k in ("clean_picture", "picture")
        ]
        rows.append([ARMS.get(arm, arm), *cells])
    note = (
        "Entropy at the sampling temperature, nats. Groups that teach: with different accuracies, in the first fifth "
        "of the steps and in all. Rescued: prompts with a right response to the changed image and no right one to the "
        "clean one; lost: the other way round. Judge: greedy accuracy on pictures of the training, before and "
        "after they were changed, of another policy: plain GRPO of another seed, in elicit the later warm start. It is "
        "a relative, so what the attack transfers to it counts as lost. Rescued and lost compare where both halves are "
        "of one size."
    )
    if not rows:
        return ""
    return table(head, rows) + f"\n\n{note}"


def token_table(setting: str, runs: Runs) -> str:
    """What TsEC kept in SaEI's runs, by what a token is for."""
    found = [r["diagnostics"]["tokens"] for r in good(runs).get("saei", {}).values()]
    if not found:
        return ""
    total, examples = Counter(), {}
    for one in found:
        for kind, numbers in one["kinds"].items():
            total.update({(kind, i): x for i, x in enumerate(numbers)})
        for fate, tokens in one["examples"].items():
            examples.setdefault(fate, Counter()).update(tokens)
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in total):
        numbers = [total[kind, i] for i in range(3)]
        n = sum(numbers)
        rows.append(
            [kind, f"{n:,}", *(f"{x / n:.0%}" for x in numbers), f"{total[kind, 3] / n:.3f}"]
        )
    head = [
        f"tokens, {setting}",
        "number",
        "kept",
        "dropped: low entropy",
        "dropped: high",
        "mean entropy",
    ]
    shown = {
        fate: " ".join(f"`{t.strip().replace('|', '∣') or '␣'}`" for t, _ in c.most_common(6))
        for fate, c in examples.items()
    }
    note = f"The commonest: kept {shown['kept']}; low {shown['low']}; high {shown['high']}."
    return table(head, rows) + f"\n\n{note}"


def cost_table(setting: str, runs: Runs) -> str:
    """Seconds a step, and training accuracy on clean images at equal steps and at the CPU time of plain GRPO."""
    kept, rows = good(runs), []
    kept = {arm: done for arm, done in kept.items() if arm in (*MAIN, "pgd-1")}
    phases = ("step", "sample", "attack", "update")
    for arm, done in kept.items():
        seconds = [
            f"{np.mean([r['seconds'].get(f'seconds/{x}', 0) for r in done.values()]):.2f}"
            for x in phases
        ]
        ends = [clean_accuracy(r, 1.0) for r in done.values()]
        cost = {s: r.get("seconds/cpu") for s, r in done.items()}
        base = {s: r.get("seconds/cpu") for s, r in kept.get("plain", {}).items()}
        both = [s for s in cost if cost[s] and base.get(s)]
        equal = [clean_accuracy(done[s], base[s] / cost[s]) for s in both]
        less = [x - clean_accuracy(kept["plain"][s], 1.0) for x, s in zip(equal, both, strict=True)]
        difference = (
            change(np.array([less, less]).T) if less and arm != "plain" else ""
        )  # of seeds alone
        rows.append([ARMS[arm], *seconds, spread(ends), spread(equal), difference])
    head = [
        f"arm, {setting}",
        "seconds a step",
        "sampling",
        "attack",
        "update",
        "accuracy, last fifth",
    ]
    head += ["accuracy at plain GRPO's CPU time", "minus plain GRPO's"]
    note = "Seconds by the clock, two runs at a time beside other work: docs/speed.md compares costs. Accuracy of the "
    note += "responses to clean images while training, mean over a fifth of the run. Intervals over seeds."
    return table(head, rows) + f"\n\n{note}" if rows else ""


def clean_accuracy(result: dict, stop: float) -> float:
    """Training accuracy on clean images over the fifth of the run that ends at a share of it."""
    name = "accuracy/clean" if "accuracy/clean" in result["curves"] else "accuracy"
    stop = min(stop, 1.0)
    return curve_mean(result, name, max(0.0, stop - 0.2), stop)


def failures(found: dict[str, Runs]) -> str:
    lines = [
        f"- {setting}, {arm}, seed {seed}: {r['error'].splitlines()[-1][:200]}"
        for setting, runs in found.items() for arm, done in runs.items() for seed, r in done.items() if "error" in r
    ]  # fmt: skip
    return "\n".join(lines) or "No run has failed."


# -------------------------------------------------------------------------------------------------- a page's sections

NONE_YET = "No results yet: `python -m study.run` makes them."


def each(folder: Path, make) -> str:
    """A table of every setting that has a finished run, below each other."""
    found = {setting: runs for setting, runs in load(folder).items() if good(runs)}
    return (
        "\n\n".join(part for setting, runs in found.items() if (part := make(setting, runs)))
        or NONE_YET
    )


def study_main(folder: Path) -> str:
    return each(folder, main_table)


def study_short(folder: Path) -> str:
    results = [r for runs in load(folder).values() for x in good(runs).values() for r in x.values()]
    budgets = sorted(
        {
            r["steps"] * r["config"]["prompts_per_step"] * r["config"]["rollouts"]
            for r in results
            if "steps" in r
        }
    )
    note = (
        f"Rollouts of a run, whatever the arm: {' or '.join(f'{x:,}' for x in budgets)}; fresh problems a domain: "
        f"{' or '.join(f'{x:,}' for x in sorted({r['sizes']['problems'] for r in results}))}, 8 samples each. Mean "
        "(lowest to highest) over seeds. Differences: same seeds and problems, 95% interval over both, seeds above 0; "
        "bold: 0 is outside. Minutes of CPU time of the training. `python -m study.run`"
    )
    return f"{each(folder, short_table)}\n\n{note}" if results else NONE_YET


def study_differences(folder: Path) -> str:
    """All intervals, and how many there are."""
    found = {setting: runs for setting, runs in load(folder).items() if good(runs)}
    pairs = [
        make(setting, runs)
        for make in (differences, ablation_table, control_table)
        for setting, runs in found.items()
    ]
    count = sum(n for _, n in pairs)
    text = "\n\n".join(part for part, _ in pairs if part) or NONE_YET
    if not count:
        return text
    return text + (
        f"\n\nMean [95% interval over seeds and problems, paired] and the number of seeds above 0; bold: 0 is outside. "
        f"{count} comparisons were made in these tables and none is corrected for that: about {count / 20:.0f} "
        "intervals would leave 0 out by chance alone. The first columns are means over an arm's own seeds, differences "
        "over those that it shares with what is subtracted; failed runs are left out and counted."
    )


def study_corruption(folder: Path) -> str:
    return each(folder, corruption_table)


def study_diagnostics(folder: Path) -> str:
    return each(folder, diagnostic_table)


def study_tokens(folder: Path) -> str:
    return each(folder, token_table)


def study_cost(folder: Path) -> str:
    return each(folder, cost_table)


def study_failures(folder: Path) -> str:
    return failures(load(folder))


def study_picture(folder: Path) -> str:
    """The link to picture's file, where there is one."""
    return f"![{PICTURE}](study.svg)" if picture(folder) else NONE_YET


PICTURE = "Training accuracy on clean images, entropy and groups that teach nothing, by arm, in the setting shifted"


def picture(folder: Path) -> str:
    """docs/study.svg's text: the main arms' curves in the first setting; "" without results."""
    from runtime import report

    return report.study_picture(load(folder).get("shifted", {}), MAIN)


PARTS = {  # marker of docs/study.md -> heading, what makes it
    "study-main": ("The trained domain", study_main),
    "study-picture": ("Curves", study_picture),
    "study-differences": ("Differences and ablations", study_differences),
    "study-corruption": ("Changed pictures", study_corruption),
    "study-diagnostics": ("What happened while training", study_diagnostics),
    "study-tokens": ("What TsEC keeps", study_tokens),
    "study-cost": ("Cost", study_cost),
    "study-failures": ("Failed runs", study_failures),
}


def everything(folder: Path) -> str:
    return "\n\n".join(f"## {heading}\n\n{make(folder)}" for heading, make in PARTS.values())
