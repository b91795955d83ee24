"""The study: does SaEI help, by how much, and which of its parts do? Runs, evaluates and records the arms over seeds.

    python -m study.run                                # everything that is not done yet, two runs at a time
    python -m study.run --settings shifted --seeds 5   # Ctrl-C stops it, the same command goes on
    python -m study.run --temperature                  # first: the temperature of the entropy-matched arm
    python -m study.run --try bold "--eps 0.03" --seeds 100 101    # tuning: seeds and problems of their own
    python -m study.run --table                        # the tables of docs/study.md, from results/ alone
    python -m study.run --smoke                        # two steps, eight problems, into out/smoke: does it run?

A run is an ordinary train_saei.py in out/study/<setting>/<arm>-<seed>, then its evaluation; what is kept is one small
file, study/results/<setting>/<arm>-<seed>.json, whose existence means done (a failed run's holds the error: delete the file
to try again). Order: all main arms with seed 0, then seed 1, ..., then the ablations and the controls of the update.
Seeds below 50 are the study's; those from 100 tune, on other problems (study_rows), and land in study/results/tuning, which
no table reads; those from 50 are the setting confirm's: what the study and tuning suggested, measured once, on problems
of its own.

Evaluation, greedy and n samples at temperature 1: every test split; the split's first problems once more with 32
samples; pictures with noise, blur, other brightness. confirm: the splits alone. Ablations and tuning: the first split
alone. What is stored of each problem is its number of right samples, so that arms are compared problem by problem
(study_tables.py).
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageEnhance, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
import eval as evaluation  # noqa: E402
import rewards  # noqa: E402
import train_saei  # noqa: E402
import tsec  # noqa: E402
from demo.task import make_row  # noqa: E402
from study import tables as study_tables
from vlm.policy import Policy  # noqa: E402

DOMAINS = ("plain", "shifted", "styles", "offset", "sums")
SHIFTED_FIRST = ("shifted", "plain", "styles", "offset", "sums")
SETTINGS = {  # name -> recipe; the test splits, the trained domain's first; who judges attacked pictures (None: below)
    "shifted": ("recipes/demo.yaml", SHIFTED_FIRST, None),
    "elicit": ("recipes/elicit.yaml", DOMAINS, "demo/confident"),
    "confirm": ("recipes/demo.yaml", SHIFTED_FIRST, None),
}
SAEI = {  # over the recipe, in every arm: what differs between arms is below
    "intervention": "egas",
    "adversarial_rollouts": 4,
    "condition": "clean",
    "eps": 0.00784,  # 2/255, recipes/demo.yaml's
    "pgd_steps": 3,
    "tsec_low": 0.2,
    "tsec_high": 0.8,
}
MAIN = {  # arm -> what differs from SAEI; the rollouts are 8 in all
    "plain": {"intervention": "none"},
    "temperature": {"intervention": "none", "temperature": "study/results/temperature.json"},
    "random": {"intervention": "random"},
    "noise": {"intervention": "noise"},
    "egas": {"tsec_low": 0.0, "tsec_high": 1.0},
    "saei": {},
}
LEFT_OUT = {
    "elicit": ("temperature", "noise", "egas")
}  # there the question is whether SaEI is no worse
CONFIRM = {
    "updates_per_step": 2,
    "pgd_steps": 1,
}  # over SAEI, in every arm of confirm: see docs/study.md
ABLATIONS = {  # around saei, in the first setting
    "eps-1": {"eps": 1 / 255},
    "eps-4": {"eps": 4 / 255},
    "pgd-1": {"pgd_steps": 1},
    "pgd-10": {"pgd_steps": 10},
    "low-cut-only": {"tsec_high": 1.0},
    "high-cut-only": {"tsec_low": 0.0},
    "extremes": {"tsec_keep": "extreme"},
    "scope-batch": {"tsec_scope": "batch"},
    "split-6-2": {"adversarial_rollouts": 2},
    "split-2-6": {"adversarial_rollouts": 6},
    "sampled": {"condition": "sampled"},
    "annealed": {"anneal": True},
    "mixed-plain": {"model": "demo/mixed", "intervention": "none"},  # the other warm start
    "mixed-saei": {"model": "demo/mixed"},
}
CONTROLS = {  # of the update (entropy_controls.py), in the first setting; in plain GRPO but for vogue. Not tuned
    "bonus": {"entropy_coef": 0.01},
    # about the token mean at the start; up to five times the fixed bonus, in steps that 80 steps of training can use
    "skywork": {
        "skywork_target": 0.3,
        "skywork_step": 0.001,
        "skywork_max": 0.05,
        "entropy_coef": 0.01,
    },
    "aer": {"entropy_coef": 0.01, "aer_target": 0.9},
    "ecvgpo": {},
    "vogue": {"intervention": "noise"},
    "top_entropy": {},
    # a step has 4,000 tokens: 2e-4 of them would be one; a clip of 1 is its authors'
    "clip_cov": {"cov_share": 0.01, "clip_low": 1.0, "clip_high": 1.0},
    "kl_cov": {"cov_share": 0.01, "updates_per_step": 2},
    "sent": {"cov_share": 0.01, "updates_per_step": 2},
}
CONTROLS = {
    arm: {"intervention": "none", "update_control": arm} | changes
    for arm, changes in CONTROLS.items()
}
CONTROLS["two-updates"] = {"intervention": "none", "updates_per_step": 2}  # kl_cov's, sent's plain
# SaEI with the control that had the highest pass@1 when two of the three seeds had run, and with its updates alone
CONTROLS |= {
    f"saei-{arm}": CONTROLS[arm] | {"intervention": "egas"} for arm in ("kl_cov", "two-updates")
}
FURTHER = ABLATIONS | CONTROLS
JUDGE = 99  # seed of the plain GRPO run whose policy judges the pictures of a setting
SIZES = {"problems": 2000, "samples": 8, "deep": 500, "deep_samples": 32}
SMOKE = {"problems": 8, "samples": 8, "deep": 4, "deep_samples": 32}
FRESH, TUNING = 50, 100  # the first of confirm's and of the tuning seeds
POINTS = 25  # of a curve
TIMES = ("ru_utime", "ru_stime")


# -------------------------------------------------------------------------------------------------------- what to run


def run_options(setting: str, arm: str, seed: int, smoke: bool, tried: dict) -> dict:
    """The settings of a run over its recipe. Raises ValueError where the matched temperature is not measured yet."""
    options = SAEI | (CONFIRM if setting == "confirm" else {}) | (MAIN | FURTHER | tried)[arm]
    options |= {"seed": seed, "log_prompts": 2}
    if isinstance(options.get("temperature"), str):
        path = ROOT / options["temperature"]
        found = json.loads(path.read_text()) if path.exists() else {}
        if setting not in found and not smoke:
            raise ValueError(
                f"{path} has no {setting}: python -m study.run --temperature measures it first"
            )
        options["temperature"] = found.get(setting, {"temperature": 1.1})["temperature"]
    if smoke:
        options |= {"steps": 2, "prompts_per_step": 4, "micro_prompts": 4}
    return options


def result_path(args: argparse.Namespace, setting: str, arm: str, seed: int) -> Path:
    folder = args.results / "tuning" if seed >= TUNING else args.results
    return folder / setting / f"{arm}-{seed}.json"


def jobs(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(setting, arm, seed) in the order of running. "before" is the warm start itself, evaluated."""
    seeds = (
        args.seeds
        if len(args.seeds) > 1 or args.seeds[0] >= TUNING
        else range(max(1, args.seeds[0]))
    )
    if any(seed >= TUNING for seed in seeds) != all(seed >= TUNING for seed in seeds):
        raise ValueError(
            f"seeds below {TUNING} are the study's, the others tune: not both at once, got {args.seeds}"
        )
    if args.tried and min(seeds) < TUNING:
        raise ValueError(f"--try is for tuning: give --seeds from {TUNING} on, got {args.seeds}")
    known = {"before": {}} | MAIN | FURTHER | args.tried
    if unknown := sorted(set(args.arms or ()) - set(known)):
        raise ValueError(f"unknown arms {', '.join(unknown)}; there are {', '.join(known)}")
    main = ["before", *(args.tried or MAIN)]
    listed = [(setting, arm, seed) for seed in seeds for setting in args.settings for arm in main]
    first = TUNING if min(seeds) >= TUNING else 0
    listed = [
        x
        for x in listed
        if x[1] not in LEFT_OUT.get(x[0], ()) and (x[1] != "before" or x[2] == first)
    ]
    if not args.tried and "shifted" in args.settings:
        listed += [
            ("shifted", arm, seed) for seed in list(seeds)[: args.ablation_seeds] for arm in FURTHER
        ]
    listed = [x for x in listed if not args.arms or x[1] in args.arms]
    return [
        (setting, arm, seed + FRESH * (setting == "confirm" and seed < FRESH))
        for setting, arm, seed in listed
    ]


def run_all(args: argparse.Namespace) -> None:
    """Every job that has no result yet, args.jobs at a time, each a process group of its own, so that a stop stops
    the training below it too.
    """
    waiting = [job for job in jobs(args) if not result_path(args, *job).exists()]
    print(f"{len(jobs(args))} runs, {len(waiting)} to do", flush=True)
    for setting, arm, seed in waiting:  # what cannot be configured stops here and not in the night
        if arm != "before":
            train_saei.load_config(train_arguments(args, setting, arm, seed))
    for setting in {job[0] for job in waiting}:
        make_judge(args, setting)
    running, done = {}, 0

    def stop(*_) -> None:
        raise KeyboardInterrupt

    (
        signal.signal(signal.SIGINT, stop),
        signal.signal(signal.SIGTERM, stop),
    )  # a background job has SIGINT ignored
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    *map(str, job),
                    "--results",
                    str(args.results),
                ]
                command += ["--out", str(args.out), "--tried", json.dumps(args.tried)]
                command += ["--sizes", json.dumps(args.sizes)] + ["--smoke"] * args.smoke
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                running[
                    subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
                ] = job
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                job, done = running.pop(process), done + 1
                if not result_path(args, *job).exists():
                    raise RuntimeError(
                        f"{' '.join(map(str, job))} ended with {process.returncode} and left no result"
                    )
                print(
                    f"{time.strftime('%H:%M:%S')} {' '.join(map(str, job))}, {len(waiting)} to start",
                    flush=True,
                )
    except KeyboardInterrupt:
        sys.exit(f"stopped after {done} runs; the same command goes on")
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------------ one run


def train_arguments(args: argparse.Namespace, setting: str, arm: str, seed: int) -> list[str]:
    options = run_options(setting, arm, seed, args.smoke, args.tried)
    options |= {"output": args.out / setting / f"{arm}-{seed}", "overwrite": True}
    pairs = [(f"--{name}", str(value)) for name, value in options.items()]
    return ["--config", SETTINGS[setting][0], *(x for pair in pairs for x in pair)]


def one_run(args: argparse.Namespace, setting: str, arm: str, seed: int) -> None:
    """Train, unless the last checkpoint is there, evaluate, and write the result, or the error of a failed run."""
    torch.set_num_threads(1)
    started, folder, recipe = (
        time.time(),
        args.out / setting / f"{arm}-{seed}",
        SETTINGS[setting][0],
    )
    result = {"setting": setting, "arm": arm, "seed": seed, "commit": commit(), "sizes": args.sizes}
    try:
        if arm == "before":
            model = ROOT / yaml.safe_load((ROOT / recipe).read_text())["model"]
        else:
            cfg = train_saei.load_config(train_arguments(args, setting, arm, seed))
            model = folder / "checkpoints" / f"step-{cfg.steps:06d}"
            if not model.exists():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                train(train_arguments(args, setting, arm, seed))
                spent = [
                    getattr(resource.getrusage(resource.RUSAGE_CHILDREN), x) - getattr(before, x)
                    for x in TIMES
                ]
                result["seconds/cpu"] = round(sum(spent), 1)
            result |= {"config": yaml.safe_load((folder / "config.yaml").read_text())} | training(
                folder
            )
            result["config"] |= {"output": None}  # a path of this machine
        began = time.time()
        policy = Policy.from_pretrained(str(model))
        with torch.no_grad():
            extent = (
                "first split"
                if arm in FURTHER or seed >= TUNING
                else "splits"
                if setting == "confirm"
                else "all"
            )
            result |= evaluate(policy, SETTINGS[setting][1], seed, args.sizes, extent)
            result["seconds/evaluation"] = round(time.time() - began, 1)
            if arm != "before":
                make_judge(args, setting)
                result["diagnostics"] = diagnose(folder, judge_of(args, setting))
    except (RuntimeError, ArithmeticError, ValueError, OSError) as error:
        result["error"] = f"{type(error).__name__}: {error}"[-3000:]
    result["seconds/total"] = round(time.time() - started, 1)
    path = result_path(args, setting, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result) + "\n")
    aside.rename(path)  # a name means a whole result
    for name in ("checkpoints", "pictures"):
        shutil.rmtree(folder / name, ignore_errors=True)


def judge_of(args: argparse.Namespace, setting: str) -> Path:
    """The checkpoint that judges a setting's pictures: a warm start of another kind, or make_judge's."""
    given = SETTINGS[setting][2]
    return ROOT / given if given else args.out / setting / "judge"


def make_judge(args: argparse.Namespace, setting: str) -> None:
    """Where no warm start knows the domain: plain GRPO in it, with a seed that no arm has."""
    if not judge_of(args, setting).exists():
        print(f"{setting}: a judge is trained first", flush=True)
        arguments = train_arguments(args, setting, "plain", JUDGE)
        train(arguments)
        (checkpoint,) = (args.out / setting / f"plain-{JUDGE}/checkpoints").iterdir()
        checkpoint.rename(judge_of(args, setting))


def train(arguments: list[str]) -> None:
    command, environment = (
        [sys.executable, "train_saei.py", *arguments],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train_saei.py ended with {done.returncode}: {done.stderr[-2000:]}")


def commit() -> str:
    """The newest commit that changed more than results and pages, and whether something has changed since."""
    code = [".", ":!results", ":!*.md"]
    git = lambda *words: subprocess.run(
        ["git", *words, "--", *code], cwd=ROOT, capture_output=True, text=True
    )  # noqa: E731
    return git("log", "-1", "--format=%h").stdout.strip() + "+" * bool(
        git("status", "--porcelain", "-uno").stdout
    )


def training(folder: Path) -> dict:
    """metrics.jsonl, thinned to POINTS means of neighbouring steps, and what a step took."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step, total in zip(steps, np.cumsum([step["seconds/step"] for step in steps]), strict=True):
        step["elapsed"] = total
    names = [
        n
        for n in steps[0]
        if n == "seconds/step" or not n.startswith(("seconds", "clip", "memory", "lr"))
    ]
    blocks = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    curves = {
        n: [round(float(np.mean([steps[i][n] for i in block])), 5) for block in blocks]
        for n in names
    }
    seconds = {
        n: round(float(np.median([s[n] for s in steps])), 3)
        for n in steps[0]
        if n.startswith("seconds")
    }
    return {
        "steps": len(steps),
        "curves": curves,
        "seconds": seconds,
        "seconds/train": round(steps[-1]["elapsed"], 1),
    }


# --------------------------------------------------------------------------------------------------------- evaluation


def study_rows(split: str, count: int, seed: int) -> list[dict]:
    """The first problems of a split. What the study, tuning and confirm see is drawn from a seed each."""
    drawn = 1 if seed >= TUNING else 2 if seed >= FRESH else 0
    return [make_row(split, i, seed=drawn) for i in range(count)]


CORRUPTIONS = {
    "noise": lambda x, i: noisy(x, i, 20.0),  # standard deviation, in grey levels
    "blur": lambda x, i: x.filter(ImageFilter.GaussianBlur(1.0)),
    "darker": lambda x, i: ImageEnhance.Brightness(x).enhance(0.6),
    "brighter": lambda x, i: ImageEnhance.Brightness(x).enhance(1.4),
}


def noisy(image: Image.Image, i: int, std: float) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    return Image.fromarray(
        (pixels + std * np.random.default_rng(i).standard_normal(pixels.shape))
        .clip(0, 255)
        .astype("uint8")
    )


def evaluate(policy: Policy, domains: tuple[str, ...], seed: int, sizes: dict, extent: str) -> dict:
    """{"evaluation": {split: ...}, "deep": ..., "corrupted": {name: greedy}}; extent: all | splits | first split."""
    splits = [f"{domain}/test" for domain in domains[: 1 if extent == "first split" else None]]
    rows = {split: study_rows(split, sizes["problems"], seed) for split in splits}
    found = {
        "evaluation": {split: graded(policy, rows[split], sizes["samples"], 0) for split in splits}
    }
    if extent == "all":
        first = rows[splits[0]]
        found["deep"] = graded(policy, first[: sizes["deep"]], sizes["deep_samples"], 1)
        changed = {
            name: [row | {"images": [change(row["images"][0], i)]} for i, row in enumerate(first)]
            for name, change in CORRUPTIONS.items()
        }
        found["corrupted"] = {name: pack(greedy(policy, changed[name])) for name in CORRUPTIONS}
    return found


def graded(policy: Policy, rows: list[dict], samples: int, seed: int) -> dict:
    """eval.py's records of the rows, packed: a character a problem; entropy and distinct answers are means."""
    cfg, records = evaluation.EvalConfig("", "", samples=samples, k=[1]), []
    width = max(1, 768 // samples)  # many rows a batch: a decode step costs little more for them
    for start in range(0, len(rows), width):
        seeds = [
            int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
            for i in range(start, start + width)
        ]
        part = rows[start : start + width]
        records += evaluation.evaluate_rows(policy, part, seeds[: len(part)], cfg)
    answers = [
        len({rewards.extract_answer(text) for text in record["responses"]}) for record in records
    ]
    return {
        "samples": samples,
        "greedy": pack([record["greedy_right"] for record in records]),
        "right": pack([sum(record["right"]) for record in records]),
        "entropy": round(float(np.mean([record["entropy"] for record in records])), 5),
        "answers": round(float(np.mean(answers)), 4),
        "truncated": round(float(np.mean([record["truncated"] for record in records])), 5),
    }


def pack(counts: list[float]) -> str:
    """Small counts as one string, a base-36 digit each: study_tables.unpack reads it."""
    return "".join(np.base_repr(int(c), 36) for c in counts)


@torch.no_grad()
def greedy(policy: Policy, rows: list[dict], width: int = 200) -> list[float]:
    """1 where the most likely answer is right, else 0."""
    right = []
    for start in range(0, len(rows), width):
        part = rows[start : start + width]
        prompts = policy.encode([row["problem"] for row in part], [row["images"] for row in part])
        texts = policy.decode(policy.sample(prompts, 1, [0] * len(part), 64, temperature=0.0))
        right += rewards.accuracy_reward(texts, answer=[row["answer"] for row in part])
    return right


# -------------------------------------------------------------------------------------------------------- diagnostics


def diagnose(folder: Path, judge: Path) -> dict:
    """From samples.jsonl and its pictures: what TsEC kept, and whether the attacked pictures still show the answer."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = {"tokens": token_kinds([line for line in lines if line["image"] == "clean"])}
    attacked = {
        (line["step"], line["prompt"]): line for line in lines if line["image"] == "adversarial"
    }
    if (
        attacked
    ):  # transfer: another policy on the pictures of the training, before and after the attack
        policy = Policy.from_pretrained(str(judge))
        found["judge"] = {"model": judge.name, "pictures": len(attacked)}
        for name in ("clean_picture", "picture"):
            rows = [
                line | {"images": [Image.open(folder / line[name])]} for line in attacked.values()
            ]
            found["judge"][name] = round(float(np.mean(greedy(policy, rows))), 4)
    return found


def kinds_of(tokens: list[str]) -> list[str]:
    """What each token of a response is for: frame (tags, box, spaces, the end), answer, digit, colour, sign, words."""
    text, at, kinds = "".join(tokens), 0, []
    boxes = [match.span(1) for match in re.finditer(r"\\boxed\{([^}]*)\}", text)]
    frames = [match.span() for match in re.finditer(r"</?think>|\\boxed\{|\}", text)]
    for token in tokens:
        middle, at = at + len(token) / 2, at + len(token)
        inside = lambda spans: any(low <= middle < high for low, high in spans)  # noqa: E731, B023
        word = token.strip()
        kinds.append(
            "answer" if inside(boxes) else "frame" if inside(frames) or not word or word.startswith("<|")
            else "digit" if word.isdigit() else "colour" if word in ("red", "blue", "green", "yellow")
            else "sign" if not any(c.isalpha() for c in word) else "words"
        )  # fmt: skip
    return kinds


def token_kinds(lines: list[dict]) -> dict:
    """kind -> [kept, dropped for low entropy, dropped for high], their entropies' sums, the commonest tokens of each"""
    counts, sums, examples = (
        Counter(),
        Counter(),
        {name: Counter() for name in ("kept", "low", "high")},
    )
    for line in lines:
        kept = [h for h, k in zip(line["entropy"], line["kept"], strict=True) if k]
        middle = float(np.median(kept or line["entropy"]))
        for token, kind, h, k in zip(
            line["tokens"], kinds_of(line["tokens"]), line["entropy"], line["kept"], strict=True
        ):
            fate = "kept" if k else "low" if h < middle else "high"
            counts[kind, fate] += 1
            sums[kind] += h
            examples[fate][token] += 1
    kinds = sorted({kind for kind, _ in counts})
    table = {
        kind: [counts[kind, fate] for fate in examples] + [round(sums[kind], 3)] for kind in kinds
    }
    return {
        "kinds": table,
        "examples": {fate: [t for t, _ in c.most_common(8)] for fate, c in examples.items()},
    }


# ------------------------------------------------------------------------------------- the temperature of equal entropy


@torch.no_grad()
def mean_entropy(cfg: train_saei.Config, policy: Policy, rows: list[dict]) -> float:
    """Entropy of the rollouts of one step, all of a group's, at the sampling temperature, nats."""
    values, width = [], 16
    for start in range(0, len(rows), width):
        batch, seeds = (
            rows[start : start + width],
            list(range(start, start + len(rows[start : start + width]))),
        )
        prompts = policy.encode([row["problem"] for row in batch], [row["images"] for row in batch])
        clean = train_saei.sample(cfg, policy, prompts, cfg.clean_rollouts, seeds)
        halves = [clean]
        if cfg.adversarial_rollouts:
            cuts = (cfg.tsec_low, cfg.tsec_high, cfg.tsec_scope, cfg.tsec_keep)
            keep = tsec.select_tokens(clean.entropy, clean.mask, *cuts)
            attacked = train_saei.intervene(cfg, policy, prompts, clean, keep, 0, seeds, len(batch))
            halves.append(
                train_saei.sample(
                    cfg, policy, attacked, cfg.adversarial_rollouts, [s + 2**20 for s in seeds]
                )
            )
        values += torch.cat(
            [tsec.selective_entropy(half.entropy, half.mask) for half in halves]
        ).tolist()
    return float(np.mean(values))


def match_temperature(args: argparse.Namespace, setting: str, problems: int = 256) -> dict:
    """T at which the warm start's rollouts have, in plain GRPO, the entropy that SaEI's have; on tuning rows.

    Entropy rises with T: bisection of [0.5, 2], always with the same random numbers, to 2% of the difference at
    T = 1. An attack that does not raise the entropy of the rollouts gets a T below 1, and the file shows it.
    """
    arguments = [train_arguments(args, setting, arm, TUNING) for arm in ("saei", "plain")]
    saei, plain = map(train_saei.load_config, arguments)
    policy = Policy.from_pretrained(str(ROOT / saei.model))
    rows = [make_row(saei.split, i, seed=TUNING) for i in range(problems)]

    def excess(temperature: float) -> float:
        plain.temperature = temperature
        return mean_entropy(plain, policy, rows) - target

    target = mean_entropy(saei, policy, rows)
    at_one = excess(1.0)
    found = {"plain entropy at 1": target + at_one, "saei entropy": target, "problems": problems}
    low, high = 0.5, 2.0
    tolerance = max(0.02 * abs(at_one), 1e-4)
    for _ in range(12):
        middle = (low + high) / 2
        gap = excess(middle)
        if abs(gap) < tolerance:
            break
        low, high = (middle, high) if gap < 0 else (low, middle)
    found["plain entropy at temperature"] = target + gap
    return {"temperature": round(middle, 4)} | {
        name: round(value, 5) for name, value in found.items()
    }


# ------------------------------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", help="of the main arms and the ablations; unset: all")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[5], help="a number n: seeds 0..n-1; or the seeds"
    )
    parser.add_argument(
        "--ablation_seeds", type=int, default=3, help="so many of the seeds, for the ablations"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    for name, value in SIZES.items():
        parser.add_argument(
            f"--{name}", type=int, default=value, help="of the evaluation: see above"
        )
    parser.add_argument(
        "--try",
        dest="attempts",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "OPTIONS"),
        help="tune an arm",
    )
    parser.add_argument(
        "--temperature", action="store_true", help="measure study/results/temperature.json and stop"
    )
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "study/results", help="where the results go"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out/study", help="where the runs go")
    for name in ("--one", "--tried", "--sizes"):  # between this script and itself
        parser.add_argument(name, nargs=3 if name == "--one" else None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.tried = json.loads(args.tried) if args.tried else {}
    for name, options in args.attempts:
        words = shlex.split(options)
        args.tried[name] = {
            k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)
        }
    if args.samples < 8 or args.deep_samples < 32:
        parser.error(
            "pass@8 needs --samples 8 and pass@32 needs --deep_samples 32, or more; a digit holds at most 35"
        )
    sizes = SMOKE if args.smoke else {name: getattr(args, name) for name in SIZES}
    args.sizes = json.loads(args.sizes) if args.sizes else sizes
    if args.smoke and not args.one:
        args.results, args.out = ROOT / "out/smoke/results", ROOT / "out/smoke/runs"
        args.seeds, args.ablation_seeds = [1], 1
    return args


def main() -> None:
    args = parse_arguments()
    if args.table:
        print(study_tables.everything(args.results))
    elif args.one:
        setting, arm, seed = args.one
        one_run(args, setting, arm, int(seed))
    elif args.temperature:
        torch.set_num_threads(1)
        path = args.results / "temperature.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        for setting in args.settings:
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(
                json.dumps(found | {setting: match_temperature(args, setting)}, indent=1) + "\n"
            )
        print(path.read_text())
    else:
        try:
            run_all(args)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
