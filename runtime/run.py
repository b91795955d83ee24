"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl, pictures, checkpoints, and how a run goes on from them.

What train_saei.py writes and eval.py and report.py read. A checkpoint is written aside, synced and renamed when it is
whole, so the newest name is always a good one; AutoModelForImageTextToText and AutoProcessor load it. What every fault
leaves behind: docs/faults.md.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: a checkpoint gets its name when all of it is written."""
    return sorted(Path(folder).glob("checkpoints/step-[0-9]*"))


def prepare_output(cfg, accelerator: Accelerator) -> tuple[int, str]:
    """Make, empty or continue the run's folder.   -> the first step, where the parameters come from"""
    out = Path(cfg.output)
    found = checkpoints(out)
    held = (out / "metrics.jsonl").exists() or bool(found)
    if held and not (cfg.resume or cfg.overwrite):
        raise ValueError(
            f"{out} already holds a run: --resume goes on with it, --overwrite replaces it"
        )
    if cfg.resume and found:
        same_config(cfg, found[-1] / "config.yaml")
        same_processes(cfg, found[-1], accelerator.num_processes)
    accelerator.wait_for_everyone()  # nobody deletes what another process has still to look at
    if accelerator.is_main_process:
        try:
            clear(out, everything=held and not cfg.resume, logs=not (cfg.resume and found))
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
        except OSError as error:
            raise ValueError(
                f"cannot write to --output {out}: {error}; choose another folder"
            ) from error
    accelerator.wait_for_everyone()
    if cfg.resume and found:
        return int(found[-1].name.removeprefix("step-")), str(found[-1])
    return 0, cfg.model


def clear(out: Path, everything: bool, logs: bool) -> None:
    """Delete what is left half done, the logs of a run that begins anew, everything of one that is replaced."""
    for left in out.glob("checkpoints/.step-*"):  # by a process that was killed while it saved
        shutil.rmtree(left)
    if everything:
        for old in reversed(checkpoints(out)):  # killed in between, this leaves complete ones
            discard(old)
        for name in ("checkpoints", "pictures", "report", "eval"):
            shutil.rmtree(out / name, ignore_errors=True)
    if logs and out.exists():
        for name in ("metrics.jsonl", "samples.jsonl", "reference.txt", "rows.txt", "trace.json"):
            (out / name).unlink(missing_ok=True)


def same_config(cfg, path: Path) -> None:
    """Refuse to go on with another configuration; what cannot change the result may differ."""
    free = {
        "output",
        "overwrite",
        "resume",
        "steps",
        "save_every",
        "report_to",
        "log_prompts",
        "micro_prompts",
    }
    free |= {
        "keep_last",
        "micro_responses",
        "sample_prompts",
        "checkpointing",
        "self_check",
        "dry_run",
        "profile",
    }
    if cfg.anneal or cfg.intervention == "noise":
        free.discard("steps")
    before = yaml.safe_load(path.read_text())
    changed = [
        f"{k}: {before.get(k)} -> {v}"
        for k, v in asdict(cfg).items()
        if k not in free and before.get(k) != v
    ]
    if changed:
        raise ValueError(
            f"the run in {cfg.output} was started with another configuration ({'; '.join(changed)})"
        )


def weights_apart(accelerator: Accelerator) -> None:
    """save_state and load_state leave the parameters to save_pretrained and from_pretrained: one copy on disk.

    Under FSDP2 and ZeRO-2 accelerate writes and reads another before it asks these hooks.
    """
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def same_processes(cfg, checkpoint: Path, processes: int) -> None:
    """Any number of processes may go on with a run, unless the attack depends on who shares a process.

    DeepSpeed takes only as many as before, and says so itself.
    """
    before = len(list(checkpoint.glob("state/random_states_*")))  # each process leaves one
    if cfg.tsec_scope == "batch" and before != processes:
        raise ValueError(
            f"the run in {cfg.output} had {before} processes, now {processes}: tsec_scope=batch takes its quantiles "
            "over a process's prompts, so that would be another run; resume on as many as before"
        )


def same_reference(
    cfg, reference: torch.nn.Module, accelerator: Accelerator, first_step: int
) -> None:
    """Refuse to go on if cfg.model, which kl_coef pulls to, holds other weights than when the run began."""
    moved = f"model={cfg.model} holds other weights than when the run in {cfg.output} began, and kl_coef={cfg.kl_coef} "
    same_as_before(
        cfg,
        "reference.txt",
        fingerprint(reference),
        moved + "pulls to them",
        accelerator,
        first_step,
    )


def same_rows(cfg, n: int, accelerator: Accelerator, first_step: int) -> None:
    """Refuse to go on if the set has more or fewer usable rows, or --order lists others, than when the run began."""
    order = zlib.crc32(Path(cfg.order).read_bytes()) if cfg.order else 0
    moved = f"{cfg.order or cfg.dataset} has other rows than when the run in {cfg.output} began: the order would change"
    same_as_before(
        cfg, "rows.txt", f"{n} rows, order {order:08x}\n", moved, accelerator, first_step
    )


def same_as_before(
    cfg, name: str, found: str, moved: str, accelerator: Accelerator, first_step: int
) -> None:
    """Compare with the run's file of that name, then write it. Raises ValueError, with `moved`, if it differs."""
    path = Path(cfg.output) / name
    if first_step and path.exists() and path.read_text() != found:
        raise ValueError(f"{moved}; put the first ones back")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.write_text(found)


def fingerprint(module: torch.nn.Module) -> str:
    """The sum of all parameters' bit patterns: exact, and the same in any order, on any device."""
    total = 0
    for p in module.parameters():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
        total += p.detach().contiguous().view(integer).sum(dtype=torch.int64).item()
    return f"{total}\n"


def save_checkpoint(cfg, accelerator: Accelerator, wrapped: torch.nn.Module, step: int) -> None:
    """Write parameters, processor, optimiser and random states aside, sync, rename: a name means a whole checkpoint.

    Then all but the keep_last newest go. Raises what the writing raised, with a note on what is left.
    """
    final = Path(cfg.output) / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(f".{final.name}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        weights = accelerator.get_state_dict(wrapped)
        accelerator.save_state(str(aside / "state"))
        if accelerator.is_main_process:
            accelerator.unwrap_model(wrapped).save_pretrained(aside, weights)
            (aside / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sync(*Path(cfg.output).glob("*.jsonl"), *aside.rglob("*"), aside)
            aside.rename(final)  # never over another one: that name is nobody else's
            sync(final.parent)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch's writers turn a full disk into a RuntimeError
        good = checkpoints(cfg.output)
        error.add_note(
            f"the checkpoint of step {step} could not be written to {aside} (is the disk full?). "
            f"The last complete one: {good[-1] if good else 'none'}; --resume true goes on from it"
        )
        raise
    if accelerator.is_main_process and cfg.keep_last:
        for old in checkpoints(cfg.output)[: -cfg.keep_last]:
            discard(old)


def sync(*paths: Path) -> None:
    """Files' contents and folders' entries reach the disk: a rename must not get there before what it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; its name goes first, as a name means a whole one."""
    aside = checkpoint.with_name(f".{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def signals_given_back() -> Iterator[None]:
    """Whatever happens inside, SIGTERM and SIGINT afterwards do what they did before: a notebook goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """SIGTERM and SIGINT ask for the end at the next step boundary; a second one ends the process at once.

    A signal within a second of the first counts as the same: a launcher passes on what its children got as well.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.agreed, self.when = accelerator, 0, 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number: int, _frame) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
            print(
                f"{signal.Signals(number).name}: finishing the step, saving; once more ends at once",
                file=sys.stderr,
            )
        elif time.monotonic() - self.when > 1:
            os._exit(128 + number)

    def asked(self) -> bool:
        """Whether any process was asked to stop. All must call it, and all get the same answer."""
        mine = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(mine).max())
        return self.agreed > 0

    def leave(self) -> None:
        """If a signal was the end, exit with 128 + its number, as shells and schedulers have it."""
        if self.agreed:
            sys.exit(128 + self.agreed)


def save_side_by_side(images: list[Tensor], path: Path) -> None:
    """A prompt's images of any sizes in one 8-bit PNG; a single one as it is."""
    height = max(x.shape[1] for x in images)
    columns = [
        torch.nn.functional.pad(x, (0, 0, 0, height - x.shape[1]), value=1.0) for x in images
    ]
    save_image(torch.cat(columns, dim=2), path)


class Clock:
    """Seconds per phase of a step."""

    def __init__(self, device: torch.device):
        self.device, self.phases, self.start = device, {}, time.perf_counter()
        self.last = self.start

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        return {f"seconds/{k}": v for k, v in self.phases.items()} | {
            "seconds/step": self.last - self.start
        }


@contextlib.contextmanager
def profile(folder: Path) -> Iterator[None]:
    """Write what runs inside to folder/trace.json (chrome://tracing, Perfetto) and print the operators by self time."""
    with torch.profiler.profile() as trace:  # CPU, and CUDA where there is one
        yield
    trace.export_chrome_trace(str(folder / "trace.json"))
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    tqdm.write(trace.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40))


class Log:
    """metrics.jsonl, samples.jsonl, pictures, the progress bar, the trackers, and warnings that name a cure."""

    def __init__(self, cfg, accelerator: Accelerator, first_step: int):
        self.cfg, self.accelerator, self.out = cfg, accelerator, Path(cfg.output)
        self.first_step, self.earned, self.identical = (
            first_step,
            0.0,
            False,
        )  # what the warnings go by
        self.main = accelerator.is_main_process
        if self.main:
            for name in (
                "metrics.jsonl",
                "samples.jsonl",
            ):  # a resumed run forgets what came after its checkpoint
                path, aside = self.out / name, self.out / f".{name}"
                lines = (
                    path.read_text().split("\n")[:-1] if path.exists() else []
                )  # the last may be cut anywhere
                kept = [line for line in lines if json.loads(line)["step"] < first_step]
                aside.write_text("".join(line + "\n" for line in kept))
                aside.replace(path)  # killed in between, it leaves the old one
        if cfg.report_to != "none":
            accelerator.init_trackers(
                "saei",
                config={
                    k: str(v) if isinstance(v, list) else v
                    for k, v in asdict(cfg).items()
                    if v is not None
                },
            )

    def progress(self, steps: range) -> Iterator[int]:
        self.bar = tqdm(
            steps, initial=steps.start, total=steps.stop, disable=not self.main, unit="step"
        )
        profiled = min(steps.start + 1, steps.stop - 1) if self.cfg.profile and self.main else None
        for step in self.bar:
            with profile(self.out) if step == profiled else contextlib.nullcontext():
                yield step

    def step(self, step: int, metrics: dict[str, float], losses: dict[str, float]) -> None:
        """metrics are means of this process's equal share: their mean is the global one; losses are global already."""
        names = sorted(metrics)
        values = torch.tensor(
            [metrics[name] for name in names], device=self.accelerator.device, dtype=torch.float32
        )
        metrics = (
            dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True)) | losses
        )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        metrics["memory_gib"] = (
            torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else memory
        )
        self.warn(step, metrics)
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(
                    json.dumps({"step": step} | {k: round(v, 8) for k, v in metrics.items()}) + "\n"
                )
            self.bar.set_postfix(
                reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy/clean']:.3f}"
            )
        self.accelerator.log(
            metrics, step=step
        )  # last: a tracker that raises has not lost the line

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        self.earned += metrics["accuracy"]
        if self.main and metrics["distinct"] <= 1 / self.cfg.rollouts + 1e-6 and not self.identical:
            self.identical = True  # said once
            self.bar.write(
                f"warning: step {step}: all rollouts of every prompt are identical although temperature is "
                f"{self.cfg.temperature}: the policy has collapsed (entropy {metrics['entropy/clean']:.2g}); raise "
                "--temperature, or start from an earlier checkpoint"
            )
        if self.main and step == self.first_step + 4 and self.earned == 0:
            self.bar.write(
                "warning: no correct answer in 5 steps. Does the problem ask for \\boxed{} or <answer> tags, is "
                f"--max_new_tokens long enough (truncated: {metrics['truncated']:.0%})? Look at samples.jsonl"
            )

    def samples(self, step: int, policy, x) -> None:
        """One line a response of the first prompts of the main process, with tokens, entropies and what TsEC kept."""
        if not self.main:
            return
        lines = []
        for p in range(min(self.cfg.log_prompts, len(x.batch))):
            pictures = (
                {"clean": x.prompts, "adversarial": x.attacked} if x.fresh else {"clean": x.prompts}
            )
            pictures = pictures if x.prompts.counts[p] else {}  # text alone
            names = {kind: f"pictures/step-{step:06d}-{p}-{kind}.png" for kind in pictures}
            for kind, prompts in pictures.items():
                save_side_by_side(prompts[p : p + 1].images, self.out / names[kind])
            for g, text in enumerate(x.texts[p]):
                n, kind = (
                    self.cfg.clean_rollouts,
                    "clean" if g < self.cfg.clean_rollouts else "adversarial",
                )
                r, i = (
                    (x.clean, p * n + g)
                    if g < n
                    else (x.fresh, p * (self.cfg.rollouts - n) + g - n)
                )
                tokens, entropy = r.tokens[i][r.mask[i]].tolist(), r.entropy[i][r.mask[i]].tolist()
                line = {
                    "step": step,
                    "prompt": p,
                    "row": x.batch[p]["row"],
                    "image": kind,
                    "response": text,
                }
                line |= {name: x.batch[p][name] for name in ("problem", "answer")}
                line |= {
                    name: values[p, g].item()
                    for name, values in (x.scores | {"advantage": x.advantages}).items()
                }
                line |= {
                    "truncated": tokens[-1] not in policy.eos_ids,
                    "entropy": [round(h, 4) for h in entropy],
                }
                line |= {"tokens": [policy.processor.tokenizer.decode([token]) for token in tokens]}
                line |= {"kept": x.keep[i][r.mask[i]].tolist() if kind == "clean" else None}
                lines.append(
                    line | {"clean_picture": names.get("clean"), "picture": names.get(kind)}
                )
        with open(self.out / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
