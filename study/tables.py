"""The study's tables and intervals, from study/results alone: `python -m study.run --table`.

A difference between two arms is paired: the same seeds and the same problems on both sides,
d_si = a_si - b_si for seed s and problem i. Its 95% interval is Student's t over both, crossed,
since every seed answers the same problems:

    mean d +- t(S - 1) sqrt(var_s / S + var_i / N)    var_s: of the S seeds' means
                                                      var_i: of the N problems' means

The quantile has S - 1 degrees of freedom, because the seeds differ by more than the problems. With
fewer than 3 seeds there is no interval. A bootstrap of 3 to 5 seeds is not used: it excludes a
difference of 0 more often than in 5% of cases (tests/test_study.py has the check).
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval import pass_at_k
from study.evaluation import unpack

ARMS = {  # name of the files -> name in the tables, in their order
    "before": "before",
    "plain": "plain GRPO",
    "plain-time": "plain GRPO, SaEI's time in steps",
    "plain-rollouts": "plain GRPO, SaEI's time in rollouts",
    "temperature": "plain GRPO, matched temperature",
    "random": "random signs",
    "noise": "NoisyRollout",
    "noise-time": "NoisyRollout, SaEI's time in steps",
    "egas": "EgAS without TsEC",
    "saei-was": "SaEI, first recipe",
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
MAIN = ("plain", "plain-time", "plain-rollouts", "temperature", "random", "noise")
MAIN += ("noise-time", "egas", "saei-was", "saei")
CONTROLS = tuple(ARMS)[tuple(ARMS).index("two-updates") :]
ABLATIONS = tuple(arm for arm in ARMS if arm not in ("before", *MAIN, *CONTROLS))
BASES = {  # what an arm is compared with, if not with SaEI (ablations) or plain GRPO (controls)
    "mixed-plain": None,
    "mixed-saei": "mixed-plain",
    "kl_cov": "two-updates",
    "sent": "two-updates",
    "vogue": "noise",
    "saei-two-updates": "two-updates",
    "saei-kl_cov": "kl_cov",
}
# 97.5% quantile of Student's t by degrees of freedom
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NONE_YET = "No results yet: `python -m study.run` makes them."
Runs = dict[str, dict[int, dict]]  # arm -> seed -> result


# ------------------------------------------------------------------------------- statistics


def per_problem(part: dict, name: str) -> np.ndarray:
    """pass@k of each problem, without bias.   -> (N,) float"""
    n, k = part["samples"], int(name.removeprefix("pass@"))
    by_count = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    return by_count[unpack(part["right"])]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Differences (S, N) -> mean, low, high of their 95% interval; NaN bounds for S < 3."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be (seeds, problems), got {values.shape}")
    S, N = values.shape
    mean = float(values.mean())
    if S < 3:
        return mean, math.nan, math.nan
    variance = values.mean(axis=1).var(ddof=1) / S + values.mean(axis=0).var(ddof=1) / N
    half = T_95[min(S - 1, max(T_95))] * float(np.sqrt(variance))
    return mean, mean - half, mean + half


def paired(a: dict[int, dict], b: dict[int, dict], split: str, name: str) -> np.ndarray | None:
    """a - b on the seeds and the problems that both have.   -> (S, N), None without such a seed"""
    rows = []
    for seed in sorted(set(a) & set(b)):
        first, second = a[seed]["evaluation"].get(split), b[seed]["evaluation"].get(split)
        if first and second:
            x, y = per_problem(first, name), per_problem(second, name)
            shared = min(len(x), len(y))
            rows.append(x[:shared] - y[:shared])
    if not rows:
        return None
    shared = min(len(row) for row in rows)
    return np.stack([row[:shared] for row in rows])


# ---------------------------------------------------------------------------------- reading


def load(folder: Path) -> dict[str, Runs]:
    """{setting: {arm: {seed: result}}}, arms in the order of ARMS; without the tuning runs."""
    found = {}
    for path in sorted(Path(folder).glob("*/*-*.json")):
        result = json.loads(path.read_text())
        arms = found.setdefault(result["setting"], {})
        arms.setdefault(result["arm"], {})[result["seed"]] = result
    order = list(ARMS)
    ordered = {}
    for setting in sorted(found, reverse=True):
        known = [arm for arm in order if arm in found[setting]]
        unknown = [arm for arm in found[setting] if arm not in order]
        ordered[setting] = {arm: found[setting][arm] for arm in known + unknown}
    return ordered


def good(runs: Runs) -> Runs:
    """Without the failed runs, and without arms that have no other."""
    kept = {}
    for arm, by_seed in runs.items():
        finished = {seed: result for seed, result in by_seed.items() if "error" not in result}
        if finished:
            kept[arm] = finished
    return kept


def seeds_of(runs: Runs, arm: str) -> str:
    """The number of seeds of an arm that did not fail, and of those that did."""
    failed = sum("error" in result for result in runs[arm].values())
    return f"{len(runs[arm]) - failed}" + (f" ({failed} failed)" if failed else "")


def splits_of(runs: Runs) -> list[str]:
    """The test splits, the trained domain's first."""
    splits = {}
    for by_seed in runs.values():
        for result in by_seed.values():
            splits |= dict.fromkeys(result["evaluation"])
    return list(splits)


# ------------------------------------------------------------------------------------ cells


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def spread(values: list[float], digits: int = 3) -> str:
    """mean (lowest to highest), over seeds"""
    if not values:
        return "–"
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def change(values: np.ndarray | None) -> str:
    """mean [interval], and in how many of the seeds it is above 0; bold where 0 is outside."""
    if values is None:
        return "–"
    mean, low, high = interval(values)
    text = f"{mean:+.3f}"
    if math.isfinite(low):
        text += f" [{low:+.3f}, {high:+.3f}]"
    if low > 0 or high < 0:
        text = f"**{text}**"
    above = int((values.mean(axis=1) > 0).sum())
    return f"{text} {above}/{len(values)}"


def column(by_seed: dict[int, dict], split: str, name: str) -> list[float]:
    """One value per seed: pass@k, or a mean that the results hold."""
    values = []
    for result in by_seed.values():
        part = result.get("deep") if name == "pass@32" else result["evaluation"].get(split)
        if part and name.startswith("pass@"):
            values.append(float(per_problem(part, name).mean()))
        elif part:
            values.append(part[name])
    return values


def minutes_of(by_seed: dict[int, dict]) -> list[float]:
    return [run["seconds/cpu"] / 60 for run in by_seed.values() if "seconds/cpu" in run]


def curve_mean(result: dict, name: str, start: float, stop: float) -> float:
    """Mean of a curve from one share of the run to another; NaN where there is no such curve."""
    values = result.get("curves", {}).get(name, [])
    if not values:
        return math.nan
    first = min(int(start * len(values)), len(values) - 1)
    return float(np.mean(values[first : max(first + 1, round(stop * len(values)))]))


def curve_cell(by_seed: dict[int, dict], name: str, start: float = 0.0, stop: float = 1.0) -> str:
    values = [curve_mean(result, name, start, stop) for result in by_seed.values()]
    return "–" if np.isnan(values).all() else f"{np.nanmean(values):.3f}"


# ----------------------------------------------------------------------- tables of a setting


def main_table(setting: str, runs: Runs) -> str:
    """The trained domain, by arm: mean and range over seeds."""
    kept = good(runs)
    results = [result for by_seed in kept.values() for result in by_seed.values()]
    deep = any("deep" in result for result in results)
    split, *others = splits_of(kept)
    names = ["greedy", "pass@1", "pass@8"] + ["pass@32"] * deep + ["entropy", "answers"]
    rows = []
    for arm in [arm for arm in runs if arm in ("before", *MAIN)]:
        by_seed = kept.get(arm, {})
        cells = [spread(column(by_seed, split, name)) for name in names]
        elsewhere = [column(by_seed, other, "pass@1") for other in others]  # (domains, seeds)
        cells.append(spread(np.mean(elsewhere, axis=0).tolist() if by_seed and others else []))
        label = ARMS[arm]
        if arm == "temperature":
            found = {result["config"]["temperature"] for result in by_seed.values()}
            label = ", ".join([label, *map(str, sorted(found))])
        seeds = "" if arm == "before" else seeds_of(runs, arm)
        rows.append([label, seeds, *cells, spread(minutes_of(by_seed), 1)])
    head = ["arm", "seeds", *names, f"pass@1, {len(others)} untrained domains", "minutes"]
    sizes = results[0]["sizes"]
    commits = sorted({f"`{result['commit']}`" for result in results})
    note = f"{setting}: {split}, {sizes['problems']:,} fresh problems, greedy and "
    note += f"{sizes['samples']} samples each"
    if deep:
        note += f"; pass@32 from {sizes['deep_samples']} samples of the first {sizes['deep']:,}"
    note += ". Mean (lowest to highest) over seeds; answers: distinct ones among a problem's "
    note += "samples; minutes of CPU time for the training. "
    note += f"Code of {', '.join(commits)}."
    return f"{table(head, rows)}\n\n{note}"


def short_table(setting: str, runs: Runs) -> str:
    """The README's: the main arms on the trained domain, and what SaEI has over each of them."""
    kept, rows = good(runs), []
    first, *others = splits_of(kept)
    saei = kept.get("saei", {})
    for arm in [arm for arm in kept if arm in ("before", *MAIN)]:
        cells = ["", "", ""]
        if arm not in ("before", "saei"):
            pairs = [paired(saei, kept[arm], split, "pass@1") for split in (first, *others)]
            eight = paired(saei, kept[arm], first, "pass@8")
            missing = any(pair is None for pair in pairs)
            pooled = None if missing else np.concatenate(pairs[1:], axis=1)
            cells = [change(pairs[0]), change(eight), change(pooled)]
        means = [spread(column(kept[arm], first, name)) for name in ("pass@1", "pass@8")]
        minutes = minutes_of(kept[arm])
        seeds = "" if arm == "before" else seeds_of(runs, arm)
        cost = f"{np.mean(minutes):.1f}" if minutes else ""
        rows.append([ARMS[arm], seeds, *means, *cells, cost])
    head = [f"arm, {setting}", "seeds", "pass@1", "pass@8", "SaEI minus it: pass@1", "pass@8"]
    return table([*head, f"pass@1, {len(others)} untrained domains", "minutes"], rows)


def differences(setting: str, runs: Runs) -> tuple[str, int]:
    """SaEI minus every other main arm on every split.   -> tables, number of intervals"""
    kept, parts, count = good(runs), [], 0
    others = [arm for arm in MAIN if arm in kept and arm != "saei"]
    if "saei" not in kept or not others:
        return "", 0
    splits = splits_of(kept)
    for name in ("pass@1", "pass@8"):
        rows = []
        for arm in others:
            pairs = [paired(kept["saei"], kept[arm], split, name) for split in splits]
            count += sum(pair is not None for pair in pairs)
            rows.append([ARMS[arm], *map(change, pairs)])
        parts.append(table([f"{name}, {setting}: SaEI minus", *splits], rows))
    return "\n\n".join(parts), count


def compared(setting: str, runs: Runs, arms: tuple[str, ...], base: str) -> tuple[str, int]:
    """The arms, each minus `base` or its own base in BASES.   -> table, number of intervals"""
    kept, rows, count = good(runs), [], 0
    for arm in [arm for arm in arms if arm in kept]:
        split, other = splits_of(kept)[0], BASES.get(arm, base)
        cells = [spread(column(kept[arm], split, n)) for n in ("pass@1", "pass@8", "entropy")]
        against = kept.get(other, {})
        pairs = [paired(kept[arm], against, split, name) for name in ("pass@1", "pass@8")]
        count += sum(pair is not None for pair in pairs)
        seconds = [result["seconds"]["seconds/step"] for result in kept[arm].values()]
        label = ARMS[other] if against else ""
        row = [ARMS[arm], seeds_of(runs, arm), *cells, label, *map(change, pairs)]
        rows.append([*row, spread(seconds, 2)])
    head = [f"arm, {setting}", "seeds", "pass@1", "pass@8", "entropy", "minus"]
    head += ["pass@1", "pass@8", "seconds a step"]
    return (table(head, rows) if rows else ""), count


def ablation_table(setting: str, runs: Runs) -> tuple[str, int]:
    """The ablations against SaEI."""
    return compared(setting, runs, ABLATIONS, "saei")


def control_table(setting: str, runs: Runs) -> tuple[str, int]:
    """The controls of the update, against plain GRPO with as many updates (VOGUE: with noise)."""
    return compared(setting, runs, CONTROLS, "plain")


def corruption_table(setting: str, runs: Runs) -> str:
    """Greedy accuracy on changed pictures."""
    rows, names = [], []
    for arm, by_seed in good(runs).items():
        found = [result["corrupted"] for result in by_seed.values() if result.get("corrupted")]
        if arm in ("before", *MAIN) and found:
            names = list(found[0])
            means = [spread([result[name] for result in found]) for name in names]
            unchanged = spread(column(by_seed, splits_of(runs)[0], "greedy"))
            rows.append([ARMS[arm], unchanged, *means])
    return table([f"greedy, {setting}", "as it is", *names], rows) if rows else ""


def diagnostic_table(setting: str, runs: Runs) -> str:
    """What the training looked like: means over steps and seeds."""
    head = [f"arm, {setting}", "entropy, first fifth", "last fifth", "on the changed image"]
    head += ["groups that teach, start", "all steps", "rescued", "lost"]
    head += ["accuracy, clean", "accuracy, changed", "judge, clean", "judge, changed"]
    rows = []
    for arm, by_seed in good(runs).items():
        if arm == "before":
            continue
        cells = [curve_cell(by_seed, "entropy/clean", 0, 0.2)]
        cells += [
            curve_cell(by_seed, "entropy/clean", 0.8, 1),
            curve_cell(by_seed, "entropy/adversarial"),
        ]
        for stop in (0.2, 1.0):
            equal = [curve_mean(result, "zero_variance", 0, stop) for result in by_seed.values()]
            cells.append(f"{np.mean([1 - share for share in equal]):.3f}")
        for name in ("rescued", "lost", "accuracy/clean", "accuracy/adversarial"):
            cells.append(curve_cell(by_seed, name))
        found = [result["diagnostics"] for result in by_seed.values()]
        judges = [result["judge"] for result in found if "judge" in result]
        for name in ("clean_picture", "picture"):
            cells.append(f"{np.mean([j[name] for j in judges]):.3f}" if judges else "–")
        rows.append([ARMS.get(arm, arm), *cells])
    note = (
        "Entropy at the sampling temperature, nats. Groups that teach: with different accuracies, "
        "in the first fifth of the steps and in all. Rescued: prompts with a right response to the "
        "changed image and no right one to the clean one; lost: the other way round. Judge: greedy "
        "accuracy on pictures of the training, before and after they were changed, of another "
        "policy: plain GRPO of another seed, in elicit the later warm start. It is a relative, so "
        "what the attack transfers to it counts as lost. Rescued and lost compare where both "
        "halves are of one size."
    )
    return f"{table(head, rows)}\n\n{note}" if rows else ""


def token_table(setting: str, runs: Runs) -> str:
    """What TsEC kept in SaEI's runs, by what a token is for."""
    found = [r["diagnostics"]["tokens"] for r in good(runs).get("saei", {}).values()]
    if not found:
        return ""
    totals, examples = {}, {}
    for one in found:
        for kind, numbers in one["kinds"].items():
            totals[kind] = totals.get(kind, np.zeros(4)) + numbers
        for fate, tokens in one["examples"].items():
            examples.setdefault(fate, Counter()).update(tokens)
    rows = []
    for kind, (kept, low, high, entropy) in totals.items():
        n = kept + low + high
        shares = [f"{share / n:.0%}" for share in (kept, low, high)]
        rows.append([kind, f"{n:,.0f}", *shares, f"{entropy / n:.3f}"])
    head = [f"tokens, {setting}", "number", "kept", "dropped: low entropy", "dropped: high"]
    shown = {}
    for fate, counter in examples.items():
        tokens = [token.strip().replace("|", "∣") or "␣" for token, _ in counter.most_common(6)]
        shown[fate] = " ".join(f"`{token}`" for token in tokens)
    note = f"The commonest: kept {shown['kept']}; low {shown['low']}; high {shown['high']}."
    return f"{table([*head, 'mean entropy'], rows)}\n\n{note}"


def clean_accuracy(result: dict, stop: float) -> float:
    """Training accuracy on clean images over the fifth of the run that ends at a share of it."""
    name = "accuracy/clean" if "accuracy/clean" in result["curves"] else "accuracy"
    stop = min(stop, 1.0)
    return curve_mean(result, name, max(0.0, stop - 0.2), stop)


def cost_table(setting: str, runs: Runs) -> str:
    """Seconds per step; training accuracy at equal steps and at the CPU time of plain GRPO."""
    kept, rows = good(runs), []
    plain = kept.get("plain", {})
    for arm in [arm for arm in kept if arm in (*MAIN, "pgd-1")]:
        cells = []
        for phase in ("step", "sample", "attack", "update"):
            seconds = [r["seconds"].get(f"seconds/{phase}", 0) for r in kept[arm].values()]
            cells.append(f"{np.mean(seconds):.2f}")
        equal, less = [], []  # of the seeds that both arms have
        for seed, result in kept[arm].items():
            cost, base = result.get("seconds/cpu"), plain.get(seed, {}).get("seconds/cpu")
            if cost and base:
                equal.append(clean_accuracy(result, base / cost))
                less.append(equal[-1] - clean_accuracy(plain[seed], 1.0))
        # an interval over seeds alone: two "problems" with the same differences
        difference = change(np.array([less, less]).T) if less and arm != "plain" else ""
        ends = [clean_accuracy(result, 1.0) for result in kept[arm].values()]
        rows.append([ARMS[arm], *cells, spread(ends), spread(equal), difference])
    head = [f"arm, {setting}", "seconds a step", "sampling", "attack", "update"]
    head += ["accuracy, last fifth", "accuracy at plain GRPO's CPU time", "minus plain GRPO's"]
    note = "Seconds by the clock, two runs at a time beside other work: docs/speed.md compares "
    note += "costs. Accuracy of the responses to clean images while training, mean over a fifth "
    note += "of the run. Intervals over seeds."
    return f"{table(head, rows)}\n\n{note}" if rows else ""


def long_table(folder: Path) -> str:
    """The setting long: plain GRPO and SaEI after more and more steps.

    The last row has SaEI at three quarters of the steps, which takes about plain GRPO's CPU time.
    """
    kept = good(load(folder).get("long", {}))
    plain, saei = kept.get("plain"), kept.get("saei")
    if not plain or not saei:
        return NONE_YET
    (first, *others), rows = splits_of(kept), []
    some = next(iter(saei.values()))
    steps = [*some["on the way"], str(some["steps"])]
    for of_plain, of_saei in [*zip(steps, steps, strict=True), (steps[-1], steps[-2])]:
        at, row = [], [of_plain, of_saei]
        for arm, step in ((plain, of_plain), (saei, of_saei)):
            at.append({seed: run["on the way"].get(step, run) for seed, run in arm.items()})
            row += [f"{np.mean(column(at[-1], first, name)):.3f}" for name in ("pass@1", "pass@8")]
            elsewhere = [column(at[-1], other, "pass@1") for other in others]
            row += [f"{np.mean(elsewhere):.3f}", f"{np.mean(minutes_of(at[-1])):.1f}"]
        row += [change(paired(at[1], at[0], first, name)) for name in ("pass@1", "pass@8")]
        pooled = [paired(at[1], at[0], other, "pass@1") for other in others]
        rows.append([*row, change(np.concatenate(pooled, axis=1))])
    four = [" pass@1", " pass@8", f" pass@1, {len(others)} untrained domains", " minutes"]
    head = ["plain GRPO: steps", "SaEI: steps", *["plain GRPO:" + name for name in four]]
    head += [*["SaEI:" + name for name in four], "SaEI minus plain GRPO: pass@1", "pass@8"]
    head.append("pass@1, untrained domains")
    problems = some["sizes"]["problems"]
    note = f"{len(saei)} seeds, {problems:,} fresh problems a domain, 8 samples each. Minutes of "
    note += "CPU time up to the step. The last row compares at about equal CPU time. "
    note += f"`python -m study.run --settings long --seeds {len(saei)} --problems {problems}`"
    return f"{table(head, rows)}\n\n{note}"


# ------------------------------------------------------------------------- sections of a page


def compared_settings(folder: Path) -> list[tuple[str, Runs]]:
    """All settings but long, which has a table of its own."""
    return [(setting, runs) for setting, runs in load(folder).items() if setting != "long"]


def each(folder: Path, make: Callable[[str, Runs], str]) -> str:
    """A table of every setting that has a finished run."""
    parts = [make(setting, runs) for setting, runs in compared_settings(folder) if good(runs)]
    return "\n\n".join(part for part in parts if part) or NONE_YET


def study_short(folder: Path) -> str:
    """The main arms of all settings, with the size of their runs and evaluations."""
    sizes = []
    for setting, runs in compared_settings(folder):
        rollouts, problems = set(), set()
        for by_seed in good(runs).values():
            for result in by_seed.values():
                problems.add(result["sizes"]["problems"])
                if "steps" in result:
                    config = result["config"]
                    prompts = result["steps"] * config["prompts_per_step"]
                    rollouts.add(prompts * config["rollouts"])
        if rollouts:
            bounds = " to ".join(f"{x:,}" for x in sorted({min(rollouts), max(rollouts)}))
            sizes.append(f"{setting}: {bounds} rollouts, {max(problems):,} problems")
    if not sizes:
        return NONE_YET
    note = f"Rollouts of a run, fresh problems of a domain: {'; '.join(sizes)}. 8 samples of each "
    note += "problem. Mean (lowest to highest) over seeds. Differences: same seeds and problems, "
    note += "95% interval over both, seeds above 0; bold: 0 is outside. Minutes of CPU time of the "
    note += "training. `python -m study.run`"
    return f"{each(folder, short_table)}\n\n{note}"


def readme_table(folder: Path) -> str:
    """One row per main arm of paid: its cost, pass@1 and pass@8, and what SaEI has over it."""
    kept = good(load(folder).get("paid", {}))
    if "saei" not in kept:
        return NONE_YET
    first, saei, rows = splits_of(kept)[0], kept["saei"], []
    for arm in [arm for arm in MAIN if arm in kept]:
        row = [ARMS[arm], f"{np.mean(minutes_of(kept[arm])):.2f}"]
        for name in ("pass@1", "pass@8"):
            difference = change(paired(saei, kept[arm], first, name)) if arm != "saei" else ""
            row += [f"{np.mean(column(kept[arm], first, name)):.3f}", difference]
        rows.append(row)
    head = ["arm", "CPU minutes", "pass@1", "SaEI minus it", "pass@8", "SaEI minus it"]
    sizes = next(iter(saei.values()))["sizes"]
    note = f"{len(saei)} seeds per arm, {sizes['problems']:,} fresh problems, 8 samples each. "
    note += "Differences: mean, 95% interval over seeds and problems (bold: 0 is outside), and in "
    note += "how many seeds SaEI is ahead. `python -m study.run --settings paid --seeds 8 "
    note += f"--problems {sizes['problems']} --results out/study-results` measures them anew "
    note += "(about 4 CPU hours). "
    note += "`python -m benchmarks.tables` makes the tables from the stored results."
    return f"{table(head, rows)}\n\n{note}"


def study_differences(folder: Path) -> str:
    """All intervals, and how many there are."""
    parts, count = [], 0
    for make in (differences, ablation_table, control_table):
        for setting, runs in compared_settings(folder):
            part, intervals = make(setting, runs) if good(runs) else ("", 0)
            count += intervals
            parts += [part] if part else []
    if not count:
        return "\n\n".join(parts) or NONE_YET
    note = "Mean [95% interval over seeds and problems, paired] and the number of seeds above 0; "
    note += f"bold: 0 is outside. {count} comparisons were made in these tables and none is "
    note += f"corrected for that: about {count / 20:.0f} intervals would leave 0 out by chance "
    note += "alone. The first columns are means over an arm's own seeds, differences over those "
    note += "that it shares with what is subtracted; failed runs are left out and counted."
    return "\n\n".join([*parts, note])


def study_failures(folder: Path) -> str:
    lines = []
    for setting, runs in load(folder).items():
        for arm, by_seed in runs.items():
            for seed, result in by_seed.items():
                if "error" in result:
                    said = result["error"].splitlines()[-1][:200]
                    lines.append(f"- {setting}, {arm}, seed {seed}: {said}")
    return "\n".join(lines) or "No run has failed."


PARTS = {  # marker of docs/study.md -> heading, what makes it from the folder of the results
    "study-main": ("The trained domain", lambda folder: each(folder, main_table)),
    "study-differences": ("Differences and ablations", study_differences),
    "study-long": ("Longer runs", long_table),
    "study-corruption": ("Changed pictures", lambda folder: each(folder, corruption_table)),
    "study-diagnostics": ("During training", lambda folder: each(folder, diagnostic_table)),
    "study-tokens": ("What TsEC keeps", lambda folder: each(folder, token_table)),
    "study-cost": ("Cost", lambda folder: each(folder, cost_table)),
    "study-failures": ("Failed runs", study_failures),
}


def everything(folder: Path) -> str:
    return "\n\n".join(f"## {heading}\n\n{make(folder)}" for heading, make in PARTS.values())
