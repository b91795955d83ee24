"""The study: does SaEI help, by how much, and which of its parts do? Trains, evaluates and records.

    python -m study.run                                # every run without a result, two at a time
    python -m study.run --settings shifted --seeds 5   # Ctrl-C stops it; the same command continues
    python -m study.run --temperature                  # first: the temperature of one of the arms
    python -m study.run --try bold "--eps 0.03" --seeds 100 101    # tuning
    python -m study.run --table                        # the tables of docs/study.md
    python -m study.run --smoke                        # two steps, eight problems, into out/smoke

An arm is one configuration. A setting is a recipe with its test splits. A run is one arm in one
setting with one seed: train_saei.py into out/study/<setting>/<arm>-<seed>, then the evaluation
(study/evaluation.py). It leaves study/results/<setting>/<arm>-<seed>.json. A run that has this file
is done. If the run failed, the file holds the error: delete it to try again.

The main arms run first, seed by seed, then the ablations and the controls of the update. Seeds
below 50 are those of the settings shifted, elicit and charts, 50 to 79 those of confirm and bars,
80 to 89 those of paid and bars-tuned, 90 to 99 those of long. Seeds from 100 on tune: they have
problems of their own, and their results go to study/results/tuning, which no table reads.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

import train_saei
from study import tables
from study.evaluation import FRESH, LONG, PAID, TUNING, diagnose, evaluate
from vlm.policy import Policy

ROOT = Path(__file__).resolve().parent.parent


class Setting(NamedTuple):
    recipe: str
    model: str
    domains: tuple[str, ...]  # their test splits are evaluated; the trained domain is the first
    judge: str | None = None  # the policy that judges changed pictures; None: see make_judge


SHIFTED = ("shifted", "plain", "styles", "offset", "sums")
PLAIN = ("plain", "shifted", "styles", "offset", "sums")
BARS = ("charts-styles", "charts", "charts-shifted", "charts-offset", "charts-sums")
CHARTS = ("charts-shifted", "charts", "charts-styles", "charts-offset", "charts-sums")
SETTINGS = {
    "shifted": Setting("recipes/demo.yaml", "demo/confident", SHIFTED),
    "elicit": Setting("recipes/elicit.yaml", "demo/mixed", PLAIN, "demo/confident"),
    "confirm": Setting("recipes/demo.yaml", "demo/confident", SHIFTED),
    "paid": Setting("recipes/demo.yaml", "demo/confident", SHIFTED),
    "long": Setting("recipes/demo.yaml", "demo/confident", SHIFTED),
    "bars": Setting("recipes/charts.yaml", "demo/confident-charts", BARS),
    "bars-tuned": Setting("recipes/charts.yaml", "demo/confident-charts", BARS),
    "charts": Setting("recipes/charts.yaml", "demo/confident-charts", CHARTS),
}
# Of the settings without changed pictures
FIRST_SEED = {"confirm": FRESH, "paid": PAID, "long": LONG, "charts": 0}
FIRST_SEED |= {"bars": FRESH, "bars-tuned": PAID}
SAEI = {  # over the recipe, in every arm
    "rollouts": 8,
    "adversarial_rollouts": 4,
    "intervention": "egas",
    "condition": "clean",
    "eps": 0.00784,  # 2/255 to three digits
    "pgd_steps": 3,
    "tsec_low": 0.2,
    "tsec_high": 0.8,
}
FIRST_RECIPE = {"prompts_per_step": 16, "steps": 80, "save_every": 80}  # of the demo, until paid
CONFIRM = {"updates_per_step": 2, "pgd_steps": 1}  # over SAEI, in every arm of confirm
TEMPERATURES = ROOT / "study/results/temperature.json"
MAIN = {  # arm -> what differs from SAEI
    "plain": {"intervention": "none"},
    "temperature": {"intervention": "none"},  # and the temperature of TEMPERATURES
    "random": {"intervention": "random"},
    "noise": {"intervention": "noise"},
    "egas": {"tsec_low": 0.0, "tsec_high": 1.0},
    "saei": {},
}
# Over SAEI, in the later settings: the same rollouts in twice as many steps of half the prompts.
ON_POLICY = {"prompts_per_step": 8, "steps": 160, "save_every": 160, "pgd_steps": 1}
# Over ON_POLICY, in long; each checkpoint is evaluated.
LONGER = {"steps": 320, "save_every": 80, "keep_last": 0}
# Over ON_POLICY. bars-tuned has the recipe's lr, which was each arm's best in tuning.
CHARTS_CHANGES = {"charts": {"split": "charts-shifted/train", "lr": 2e-4}, "bars": {"lr": 1e-4}}
# Of paid and the charts' settings: what the attack's time buys the others, and SaEI's first recipe.
# CPU seconds of paid's tuning seeds 104 and 105: plain 79 and 82, noise 92 and 97, saei 105 and
# 112, plain with 10 rollouts 91 and 93. So plain gets 1.36 times its steps, or 13 rollouts, and
# noise 1.15 times.
PAID_ARMS = {
    "plain-time": {"intervention": "none", "steps": 217, "save_every": 217},
    "plain-rollouts": {"intervention": "none", "rollouts": 13},
    "noise-time": {"intervention": "noise", "steps": 184, "save_every": 184},
    "saei-was": FIRST_RECIPE | {"pgd_steps": 3},
}
OF_CHARTS = ("temperature", "random", "noise", "egas", "plain-rollouts", "saei-was")
LEFT_OUT = {
    "elicit": ("temperature", "noise", "egas"),  # it asks whether SaEI is no worse
    "paid": ("temperature",),  # nearly plain GRPO
    "long": ("temperature", "random", "noise", "egas"),
    "bars": OF_CHARTS,
    "bars-tuned": OF_CHARTS,
    "charts": OF_CHARTS,
}
ABLATIONS = {  # of SAEI, in the setting shifted
    "eps-1": {"eps": 1 / 255},
    "eps-4": {"eps": 4 / 255},
    "pgd-1": {"pgd_steps": 1},
    "pgd-10": {"pgd_steps": 10},
    "low-cut-only": {"tsec_high": 1.0},
    "high-cut-only": {"tsec_low": 0.0},
    "extremes": {"tsec_keep": "extreme"},
    "split-6-2": {"adversarial_rollouts": 2},
    "split-2-6": {"adversarial_rollouts": 6},
    "sampled": {"condition": "sampled"},
    "mixed-plain": {"model": "demo/mixed", "intervention": "none"},
    "mixed-saei": {"model": "demo/mixed"},
}
REMOVED = {  # arms with results that ran with an option that was removed since
    "scope-batch": "tsec_scope",
    "annealed": "anneal",
}
COV = {"cov_share": 0.01}  # a step has 4,000 tokens: the default share of 2e-4 would be one token
CONTROLS = {  # of the update (extras/entropy_controls.py), in plain GRPO, in shifted; not tuned
    "bonus": {"entropy_coef": 0.01},
    "skywork": {"entropy_coef": 0.01, "skywork_target": 0.3},  # target: the mean at the start
    "aer": {"entropy_coef": 0.01, "aer_target": 0.9},
    "ecvgpo": {},
    "vogue": {"intervention": "noise"},
    "top_entropy": {},
    "clip_cov": COV | {"clip_low": 1.0, "clip_high": 1.0},  # its authors' clip
    "kl_cov": COV | {"updates_per_step": 2},
    "sent": COV | {"updates_per_step": 2},
}
for control, options in CONTROLS.items():
    CONTROLS[control] = {"intervention": "none", "update_control": control} | options
# Plain GRPO with the two updates of kl_cov and sent. SaEI with these updates, and with the control
# that had the highest pass@1 when two of the three seeds had run.
CONTROLS["two-updates"] = {"intervention": "none", "updates_per_step": 2}
CONTROLS["saei-kl_cov"] = CONTROLS["kl_cov"] | {"intervention": "egas"}
CONTROLS["saei-two-updates"] = {"updates_per_step": 2}
FURTHER = ABLATIONS | CONTROLS
JUDGE_SEED = 99
SIZES = {"problems": 2000, "samples": 8, "deep": 500, "deep_samples": 32}
SMOKE = {"problems": 8, "samples": 8, "deep": 4, "deep_samples": 32}
POINTS = 25  # of a stored curve


# ------------------------------------------------------------------------------ what to run


def run_options(setting: str, arm: str, seed: int, smoke: bool, tried: dict) -> dict:
    """The options of a run over its recipe.

    Raises ValueError where the temperature of the arm `temperature` has not been measured yet.
    """
    options = {"model": SETTINGS[setting].model} | SAEI
    if setting in ("shifted", "confirm"):
        options |= FIRST_RECIPE
    if setting == "confirm":
        options |= CONFIRM
    if setting not in ("shifted", "confirm", "elicit"):
        options |= ON_POLICY | CHARTS_CHANGES.get(setting, {})
    if setting == "long":
        options |= LONGER
    options |= (MAIN | FURTHER | PAID_ARMS | tried)[arm] | {"seed": seed}
    if arm == "temperature":
        found = json.loads(TEMPERATURES.read_text()) if TEMPERATURES.exists() else {}
        if setting not in found:
            raise ValueError(f"{TEMPERATURES} has no {setting}: python -m study.run --temperature")
        options["temperature"] = found[setting]["temperature"]
    if smoke:
        options |= {"steps": 2, "save_every": 1, "prompts_per_step": 4, "micro_prompts": 4}
    return options


def train_arguments(
    args: argparse.Namespace, setting: str, arm: str, seed: int, **changes
) -> list[str]:
    """The command line of train_saei.py for a run, with other options changed."""
    options = run_options(setting, arm, seed, args.smoke, args.tried)
    options |= {"output": args.out / setting / f"{arm}-{seed}", "overwrite": True} | changes
    arguments = ["--config", SETTINGS[setting].recipe]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def result_path(results: Path, setting: str, arm: str, seed: int) -> Path:
    folder = results / "tuning" if seed >= TUNING else results
    return folder / setting / f"{arm}-{seed}.json"


def check_jobs(args: argparse.Namespace, seeds: list[int]) -> None:
    """Raises ValueError for arms and seeds that cannot be run."""
    if min(seeds) < TUNING <= max(seeds):
        raise ValueError(f"seeds from {TUNING} on are for tuning, the others not: got {seeds}")
    if args.tried and min(seeds) < TUNING:
        raise ValueError(f"--try is for tuning: give --seeds from {TUNING} on, got {seeds}")
    known = {"before", *MAIN, *FURTHER, *PAID_ARMS, *args.tried}
    for arm in args.arms or ():
        if arm in REMOVED:
            raise ValueError(
                f"{arm} ran with the option {REMOVED[arm]}, which was removed since: its results "
                "are kept, but it cannot be run any more"
            )
        if arm not in known:
            raise ValueError(f"unknown arm {arm}; there are {', '.join(sorted(known))}")


def jobs(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(setting, arm, seed) in the order of running. The arm "before" is the untrained model."""
    seeds = args.seeds
    if len(seeds) == 1 and seeds[0] < TUNING:  # a number of seeds
        seeds = list(range(max(1, seeds[0])))
    check_jobs(args, seeds)
    first_seed = TUNING if min(seeds) >= TUNING else 0
    listed = []
    for seed in seeds:
        for setting in args.settings:
            number = seed + FIRST_SEED.get(setting, 0) if seed < FRESH else seed
            if seed == first_seed:
                listed.append((setting, "before", number))
            arms = MAIN if setting in ("shifted", "elicit", "confirm", "long") else MAIN | PAID_ARMS
            for arm in args.tried or arms:
                if arm not in LEFT_OUT.get(setting, ()):
                    listed.append((setting, arm, number))
    if not args.tried and "shifted" in args.settings:
        for seed in seeds[: args.ablation_seeds]:
            listed += [("shifted", arm, seed) for arm in FURTHER]
    return [job for job in listed if not args.arms or job[1] in args.arms]


def run_all(args: argparse.Namespace) -> None:
    """Every job without a result, args.jobs at a time.

    Each is a process group of its own, so that stopping it stops its training too.
    """
    listed = jobs(args)
    waiting = [job for job in listed if not result_path(args.results, *job).exists()]
    print(f"{len(listed)} runs, {len(waiting)} to do", flush=True)
    for job in waiting:  # an invalid configuration stops here, not hours later
        if job[1] != "before":
            train_saei.load_config(train_arguments(args, *job))
    for setting in {setting for setting, _, _ in waiting} - {"long"}:
        make_judge(args, setting)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)  # a background job ignores it by default
    signal.signal(signal.SIGTERM, stop)
    running, done = {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                running[start(job)] = job
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, code = running.pop(process), process.returncode
                done += 1
                name = " ".join(map(str, job))
                if not result_path(args.results, *job).exists():
                    raise RuntimeError(f"{name} ended with {code} and left no result")
                print(f"{time.strftime('%H:%M:%S')} {name}, {len(waiting)} to start", flush=True)
    except KeyboardInterrupt:
        sys.exit(f"stopped after {done} runs; the same command continues")
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)


def start(job: tuple[str, str, int]) -> subprocess.Popen:
    """This command again, for one run."""
    command = [sys.executable, "-m", "study.run", *sys.argv[1:], "--one", *map(str, job)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


# ---------------------------------------------------------------------------------- one run


def one_run(args: argparse.Namespace, setting: str, arm: str, seed: int) -> None:
    """Train, evaluate, and write the result, or the error of a failed run."""
    torch.set_num_threads(1)
    began = time.time()
    folder = args.out / setting / f"{arm}-{seed}"
    result = {"setting": setting, "arm": arm, "seed": seed, "commit": commit(), "sizes": args.sizes}
    try:
        model = ROOT / SETTINGS[setting].model
        if arm != "before":
            result["seconds/cpu"] = train(train_arguments(args, setting, arm, seed))
            model = last_checkpoint(folder)
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config["output"] = None  # a path of this machine
            result |= {"config": config} | training(folder)
        extent = "all"
        if arm in FURTHER or seed >= TUNING:
            extent = "first split"
        elif setting in FIRST_SEED:
            extent = "splits"
        splits = [f"{domain}/test" for domain in SETTINGS[setting].domains]
        result |= evaluate(Policy.from_pretrained(str(model)), splits, seed, args.sizes, extent)
        if arm != "before" and setting == "long":
            result["on the way"] = on_the_way(folder, result, splits, seed, args.sizes)
        elif arm != "before":
            make_judge(args, setting)
            result["diagnostics"] = diagnose(folder, judge_of(args, setting))
    except (RuntimeError, ArithmeticError, ValueError, OSError) as error:
        result["error"] = f"{type(error).__name__}: {error}"[-3000:]
    result["seconds/total"] = round(time.time() - began, 1)
    path = result_path(args.results, setting, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result) + "\n")
    aside.rename(path)  # so that the name means a complete result
    for name in ("checkpoints", "pictures"):
        shutil.rmtree(folder / name, ignore_errors=True)


def on_the_way(folder: Path, result: dict, splits: list[str], seed: int, sizes: dict) -> dict:
    """{step: {"evaluation", "seconds/cpu"}} of a run's checkpoints before the last.

    The CPU time up to a step is the run's, in proportion to the seconds of the steps.
    """
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    seconds = np.cumsum([json.loads(line)["seconds/step"] for line in lines])
    found = {}
    for path in sorted((folder / "checkpoints").iterdir())[:-1]:
        step = int(path.name.removeprefix("step-"))
        policy = Policy.from_pretrained(str(path))
        found[step] = evaluate(policy, splits, seed, sizes, "splits")
        if "seconds/cpu" in result:
            share = seconds[step - 1] / seconds[-1]
            found[step]["seconds/cpu"] = round(result["seconds/cpu"] * share, 1)
    return found


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of a finished run's last step."""
    steps = yaml.safe_load((folder / "config.yaml").read_text())["steps"]
    return folder / "checkpoints" / f"step-{steps:06d}"


def judge_of(args: argparse.Namespace, setting: str) -> Path:
    given = SETTINGS[setting].judge
    return ROOT / given if given else args.out / setting / "judge"


def make_judge(args: argparse.Namespace, setting: str) -> None:
    """Where no model knows the domain: plain GRPO in it, with a seed that no arm has."""
    if not judge_of(args, setting).exists():
        print(f"{setting}: a judge is trained first", flush=True)
        train(train_arguments(args, setting, "plain", JUDGE_SEED))
        last_checkpoint(args.out / setting / f"plain-{JUDGE_SEED}").rename(judge_of(args, setting))


def train(arguments: list[str]) -> float:
    """Run train_saei.py.   -> seconds of CPU time"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "train_saei.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"train_saei.py ended with {done.returncode}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return round(user + system, 1)


def git(*words: str) -> str:
    """git's answer about the code: results and pages are left out."""
    command = ["git", *words, "--", ".", ":!study/results", ":!*.md"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The newest commit that changed code, with a + if files have changed since."""
    changed = git("status", "--porcelain", "-uno")
    return git("log", "-1", "--format=%h") + ("+" if changed else "")


def training(folder: Path) -> dict:
    """metrics.jsonl as curves of POINTS means of neighbouring steps, and median seconds."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curves, seconds = {}, {}
    for name in steps[0]:
        values = np.array([step[name] for step in steps if name in step])
        blocks = np.array_split(np.arange(len(values)), min(POINTS, len(values)))
        if name.startswith("seconds"):
            seconds[name] = round(float(np.median(values)), 3)
        elif not name.startswith(("clip", "memory", "lr")):
            curves[name] = [round(float(values[block].mean()), 5) for block in blocks]
    return {"steps": len(steps), "curves": curves, "seconds": seconds}


# -------------------------------------------------------- the temperature of equal entropy


def rollout_entropy(args: argparse.Namespace, setting: str, arm: str, temperature: float) -> float:
    """Entropy of all rollouts of a step without an update, at the sampling temperature, nats."""
    folder = args.out / "temperature"
    size = {"steps": 1, "prompts_per_step": 256, "micro_prompts": 16, "lr": 1e-12}
    changes = size | {"temperature": temperature, "output": folder}
    train(train_arguments(args, setting, arm, TUNING, **changes))
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    halves = [metrics[name] for name in ("entropy/clean", "entropy/adversarial") if name in metrics]
    return float(np.mean(halves))  # halves of 4 responses each; plain GRPO has one half of 8


def match_temperature(args: argparse.Namespace, setting: str) -> dict:
    """The temperature at which plain GRPO's rollouts have the entropy of SaEI's, before training.

    Entropy rises with the temperature: bisection of [0.5, 2], with the same random numbers, to 2%
    of the difference at temperature 1. Where the attack does not raise the entropy of the
    rollouts, the temperature found is below 1.
    """
    target = rollout_entropy(args, setting, "saei", 1.0)
    at_one = rollout_entropy(args, setting, "plain", 1.0)
    tolerance = max(0.02 * abs(target - at_one), 1e-4)
    low, high = 0.5, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        found = rollout_entropy(args, setting, "plain", middle)
        if abs(found - target) < tolerance:
            break
        low, high = (middle, high) if found < target else (low, middle)
    return {
        "temperature": round(middle, 4),
        "plain entropy at 1": round(at_one, 5),
        "saei entropy": round(target, 5),
        "problems": 256,
        "plain entropy at temperature": round(found, 5),
    }


# ----------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    add("--arms", nargs="+", help="default: all")
    add("--seeds", type=int, nargs="+", default=[5], help="a number n for 0 to n-1, or the seeds")
    add("--ablation_seeds", type=int, default=3, help="number of seeds of the ablations")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    for name, value in SIZES.items():
        add(f"--{name}", type=int, default=value, help="of the evaluation")
    add("--try", dest="attempts", nargs=2, action="append", default=[], metavar=("ARM", "OPTIONS"))
    add("--temperature", action="store_true", help="measure temperature.json and stop")
    add("--table", action="store_true", help="print the tables and stop")
    add("--smoke", action="store_true")
    add("--results", type=Path, default=ROOT / "study/results", help="folder of the results")
    add("--out", type=Path, default=ROOT / "out/study", help="folder of the runs")
    add("--one", nargs=3, help=argparse.SUPPRESS)  # set by `start`
    args = parser.parse_args()
    args.tried = {}
    for arm, options in args.attempts:
        words = shlex.split(options)
        names = [name.removeprefix("--") for name in words[::2]]
        args.tried[arm] = dict(zip(names, words[1::2], strict=True))
    if args.samples < 8 or args.deep_samples < 32 or max(args.samples, args.deep_samples) > 255:
        parser.error("pass@8 needs --samples 8, pass@32 --deep_samples 32; at most 255 are stored")
    args.sizes = {name: getattr(args, name) for name in SIZES}
    if args.smoke:
        args.sizes, args.seeds, args.ablation_seeds = SMOKE, [1], 1
        args.results, args.out = ROOT / "out/smoke/results", ROOT / "out/smoke/runs"
    return args


def measure_temperatures(args: argparse.Namespace) -> None:
    for setting in args.settings:
        measured = match_temperature(args, setting)
        found = json.loads(TEMPERATURES.read_text()) if TEMPERATURES.exists() else {}
        TEMPERATURES.write_text(json.dumps(found | {setting: measured}, indent=1) + "\n")
        print(setting, measured)


def main() -> None:
    args = parse_arguments()
    try:
        if args.table:
            print(tables.everything(args.results))
        elif args.one:
            setting, arm, seed = args.one
            one_run(args, setting, arm, int(seed))
        elif args.temperature:
            measure_temperatures(args)
        else:
            run_all(args)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"study.run: {error}")


if __name__ == "__main__":
    main()
