"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl, pictures, checkpoints, resume.

train_saei.py writes it, runtime/report.py draws it. A checkpoint is written aside, synced and
renamed when it is whole, so the newest name is always a good one. AutoModelForImageTextToText and
AutoProcessor load it. docs/faults.md says what every fault leaves behind.
"""

import contextlib
import json
import math
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
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from runtime import data
from runtime.args import RENAMED, ModelArgs, RunArgs, TrainDataArgs
from runtime.rollouts import Rollouts, sample_lines
from vlm.policy import Policy

# Options that cannot change the result of a run: a resumed run may set them anew.
FREE = {"output", "overwrite", "resume", "dry_run", "steps", "save_every", "keep_last"}
FREE |= {"report_to", "self_check", "profile", "gradient_checkpointing"}
FREE |= {"micro_prompts", "micro_responses", "sample_prompts"}


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A name means a whole checkpoint."""
    return sorted(Path(folder).glob("checkpoints/step-[0-9]*"))


class Run:
    """One run: its folder, its steps, what is logged, saved and compared when it resumes.

    run.checkpoint  the folder of the checkpoint to continue from, or None
    run.steps()     the steps that are left; ends early when a signal asked for it
    """

    def __init__(self, args: RunArgs, options: dict[str, Any], accelerator: Accelerator):
        """Prepare the folder. options: all options of the run, for config.yaml.

        Raises ValueError if the folder holds a run and neither resume nor overwrite is set, or if
        the run to resume was started with other options.
        """
        self.args, self.options, self.accelerator = args, options, accelerator
        self.folder, self.is_main = Path(args.output), accelerator.is_main_process
        found = checkpoints(self.folder)
        held = (self.folder / "metrics.jsonl").exists() or bool(found)
        if held and not (args.resume or args.overwrite):
            raise ValueError(
                f"{self.folder} already holds a run: --resume continues it, --overwrite replaces it"
            )
        self.checkpoint, self.first_step = None, 0
        if args.resume and found:
            self.checkpoint = str(found[-1])
            self.first_step = int(found[-1].name.removeprefix("step-"))
            self._refuse_other_options(found[-1] / "config.yaml")
        accelerator.wait_for_everyone()  # no process deletes what another one still has to look at
        if self.is_main:
            try:
                self._make_folder(everything=held and not args.resume)
            except OSError as error:
                raise ValueError(
                    f"cannot write to --output {self.folder}: {error}; choose another folder"
                ) from error
        accelerator.wait_for_everyone()
        self.total_accuracy, self.warned_identical = 0.0, False

    def _make_folder(self, everything: bool) -> None:
        for unfinished in self.folder.glob("checkpoints/.step-*"):  # killed while it was saved
            shutil.rmtree(unfinished)
        if everything:
            for checkpoint in reversed(checkpoints(self.folder)):  # killed, it leaves whole ones
                delete_checkpoint(checkpoint)
            for name in ("checkpoints", "pictures", "report"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for result in self.folder.glob("eval/*"):
                if not result.name.startswith("before"):  # that one is of the model to start from
                    result.unlink()
        if self.checkpoint is None:
            files = ["metrics.jsonl", "samples.jsonl", "reference.txt", "rows.txt", "trace.json"]
            for name in files:
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.options, sort_keys=False))

    def _refuse_other_options(self, path: Path) -> None:
        before = yaml.safe_load(path.read_text())
        old_names = [name for name in before if name not in self.options]
        if old_names:
            said = [f"{name} ({RENAMED.get(name, 'removed')})" for name in old_names]
            raise ValueError(
                f"{path} was written by an earlier version and cannot be resumed. Its options of "
                f"other names: {', '.join(said)}"
            )
        free = set(FREE)
        if self.options["intervention"] == "noise":  # its annealing depends on the number of steps
            free.discard("steps")
        changed = []
        for name, value in self.options.items():
            if name not in free and before.get(name) != value:
                changed.append(f"{name}: {before.get(name)} -> {value}")
        if changed:
            raise ValueError(
                f"the run in {self.folder} was started with other options ({'; '.join(changed)})"
            )

    def stop_unless_finite(self, norm: float, batch: Any, step: int) -> None:
        """Raise FloatingPointError for a gradient that is not finite, the batch saved beside it.

        All processes have the same norm and stop together, before the parameters move (ZeRO-2:
        after).
        """
        if not math.isfinite(norm):
            process = self.accelerator.process_index
            path = self.folder / f"failed-step-{step:06d}-process-{process}.pt"
            torch.save(asdict(batch), path)
            raise FloatingPointError(
                f"step {step}: the gradient is not finite (norm {norm}). The batch is in {path}, "
                "the last checkpoint is good. Likely causes: a learning rate too high, or bfloat16 "
                "parameters (float32 with mixed precision is safer)"
            )

    def same_as_before(self, name: str, found: str, message: str) -> None:
        """Compare with the run's file `name`, then write it. Differs: ValueError(message)."""
        path = self.folder / name
        if self.first_step and path.exists() and path.read_text() != found:
            raise ValueError(message)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            path.write_text(found)

    # ------------------------------------------------------------------------------ steps and logs

    def steps(self) -> Iterator[int]:
        """The steps from the checkpoint on, with a progress bar. A signal ends them early."""
        self.signals = Signals(self.accelerator)  # not before: until here a signal ends at once
        if self.is_main:
            self._forget_later_lines()
        if self.args.report_to != "none":
            shown = {k: str(v) if isinstance(v, list) else v for k, v in self.options.items()}
            shown = {name: value for name, value in shown.items() if value is not None}
            self.accelerator.init_trackers("saei", config=shown)
        steps = range(self.first_step, self.args.steps)
        traced = min(self.first_step + 1, self.args.steps - 1) if self.args.profile else None
        self.bar = tqdm(
            steps, initial=steps.start, total=steps.stop, disable=not self.is_main, unit="step"
        )
        for step in self.bar:
            trace = step == traced and self.is_main
            with profile(self.folder) if trace else contextlib.nullcontext():
                yield step
            if self.signals.agreed:
                break

    def _forget_later_lines(self) -> None:
        """A resumed run drops what came after its checkpoint. The last line may be cut anywhere."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, aside = self.folder / name, self.folder / f".{name}"
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            kept = [line + "\n" for line in lines if json.loads(line)["step"] < self.first_step]
            aside.write_text("".join(kept))
            aside.replace(path)  # killed before this, the run keeps the old file

    def log(self, step: int, metrics: dict[str, float], losses: dict[str, float]) -> None:
        """metrics: means over this process's equal share. losses: global already."""
        names = sorted(metrics)
        values = torch.tensor([metrics[name] for name in names], dtype=torch.float32)
        means = self.accelerator.reduce(values.to(self.accelerator.device), "mean").tolist()
        metrics = dict(zip(names, means, strict=True)) | losses
        metrics["memory_gib"] = peak_memory() / 2**30
        self._warn(step, metrics)
        if self.is_main:
            rounded = {name: round(value, 8) for name, value in metrics.items()}
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step} | rounded) + "\n")
            reward, entropy = f"{metrics['reward']:.2f}", f"{metrics['entropy/clean']:.3f}"
            self.bar.set_postfix(reward=reward, entropy=entropy)
        self.accelerator.log(metrics, step=step)  # last: if a tracker raises, the line is written

    def _warn(self, step: int, metrics: dict[str, float]) -> None:
        self.total_accuracy += metrics["accuracy"]
        if not self.is_main:
            return
        identical = metrics["distinct"] <= 1 / self.options["rollouts"] + 1e-6
        if identical and not self.warned_identical:
            self.warned_identical = True
            self.bar.write(
                f"warning: step {step}: all rollouts of every prompt are identical at temperature "
                f"{self.options['temperature']}. The policy has collapsed (entropy "
                f"{metrics['entropy/clean']:.2g}): raise --temperature, or start from an earlier "
                "checkpoint"
            )
        if step == self.first_step + 4 and self.total_accuracy == 0:
            self.bar.write(
                "warning: no correct answer in 5 steps. Does the problem ask for \\boxed{} or "
                "<answer> tags (--template)? Is --max_new_tokens long enough (truncated: "
                f"{metrics['truncated']:.0%})? Look at {self.folder / 'samples.jsonl'}"
            )

    def log_samples(self, step: int, rollouts: Rollouts, policy: Policy) -> None:
        """The first prompt's responses to samples.jsonl, its images to pictures/."""
        if not self.is_main:
            return
        lines, pictures = sample_lines(rollouts, policy)
        paths = {}
        for kind, images in pictures.items():
            paths[kind] = f"pictures/step-{step:06d}-0-{kind}.png"
            save_side_by_side(images, self.folder / paths[kind])
        with open(self.folder / "samples.jsonl", "a") as file:
            for line in lines:
                names = {"clean_picture": paths.get("clean"), "picture": paths.get(line["image"])}
                file.write(json.dumps({"step": step} | line | names) + "\n")

    # ---------------------------------------------------------------------- checkpoints, the end

    def save_if_due(self, step: int, wrapped: nn.Module) -> None:
        """Write a checkpoint every save_every steps, after the last one, and on a signal."""
        done = step + 1
        # asked() comes first: all processes must call it
        if self.signals.asked() or done % self.args.save_every == 0 or done == self.args.steps:
            self._save(done, wrapped)

    def _save(self, step: int, wrapped: nn.Module) -> None:
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        aside = final.with_name(f".{final.name}")
        accelerator = self.accelerator
        try:
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            weights = accelerator.get_state_dict(wrapped)
            accelerator.save_state(str(aside / "state"))
            if self.is_main:
                accelerator.unwrap_model(wrapped).save_pretrained(aside, weights)
                (aside / "config.yaml").write_text(yaml.safe_dump(self.options, sort_keys=False))
            accelerator.wait_for_everyone()
            if self.is_main:
                sync(*self.folder.glob("*.jsonl"), *aside.rglob("*"), aside)
                aside.rename(final)
                sync(final.parent)
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's full disk
            good = checkpoints(self.folder)
            error.add_note(
                f"the checkpoint of step {step} could not be written to {aside} (disk full?). The "
                f"last good one: {good[-1] if good else 'none'}. --resume true continues from it"
            )
            raise
        if self.is_main and self.args.keep_last:
            for old in checkpoints(self.folder)[: -self.args.keep_last]:
                delete_checkpoint(old)

    def finish(self) -> None:
        """End the trackers. After a signal, exit with 128 + its number, as shells expect."""
        self.accelerator.end_training()
        if self.signals.agreed:
            sys.exit(128 + self.signals.agreed)


def sync(*paths: Path) -> None:
    """Flush files and folders to the disk: a rename must not get there before what it names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def delete_checkpoint(checkpoint: Path) -> None:
    """Its name goes first, because a name means a whole checkpoint."""
    aside = checkpoint.with_name(f".{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def fingerprint(module: nn.Module) -> str:
    """The sum of all parameters' bit patterns: exact, the same in any order and on any device."""
    total = 0
    for p in module.parameters():
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
        total += p.detach().contiguous().view(integer).sum(dtype=torch.int64).item()
    return f"{total}\n"


# --------------------------------------------------------------------- rows and reference of a run


class Batch(NamedTuple):
    """This process's rows of one step."""

    rows: list[dict]
    numbers: list[int]  # a row that comes twice in a step has another number the second time
    seed: int
    step: int

    @property
    def problems(self) -> list:
        return [row["problem"] for row in self.rows]

    @property
    def images(self) -> list[list]:
        return [row["images"] for row in self.rows]

    def seeds(self, branch: int) -> list[int]:
        """A seed per row for one part of the step, whatever process the row is on."""
        return data.row_seeds(self.seed, self.step, self.numbers, branch)


class Batches(NamedTuple):
    """The rows of every step."""

    rows: data.Rows | data.Stream
    order: list[int] | None
    size: int  # of a step, over all processes
    run: Run

    def of_step(self, step: int) -> Batch:
        n = None if isinstance(self.rows, data.Stream) else len(self.rows)
        numbers = data.step_rows(step, self.size, n, self.run.args.seed, self.order)
        accelerator = self.run.accelerator
        numbers = numbers[accelerator.process_index :: accelerator.num_processes]
        rows = [self.rows[number % n if n else number] for number in numbers]
        return Batch(rows, numbers, self.run.args.seed, step)


def load_rows(args: TrainDataArgs, run: Run, policy: Policy, prompts_per_step: int) -> Batches:
    """The rows to train on, checked. Raises ValueError if they changed since the run began.

    policy: its processor counts the tokens of prompts, it needs no weights.
    """
    rows = args.load(
        args.split,
        seed=run.args.seed,
        prompt_tokens=policy.prompt_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
    )
    order = data.load_order(args.order, rows) if args.order else None
    if not args.streaming:
        checksum = zlib.crc32(str(order).encode())
        run.same_as_before(
            "rows.txt",
            f"{len(rows)} rows {rows.fingerprint()}, order {checksum:08x}\n",
            f"{args.order or args.dataset} holds other rows than when the run in {run.folder} "
            "began; put the first ones back",
        )
    return Batches(rows, order, prompts_per_step, run)


def load_reference(args: ModelArgs, run: Run) -> Policy:
    """The initial policy, for the KL term. Raises ValueError if it changed since the run began."""
    reference = args.load().to(run.accelerator.device)
    reference.requires_grad_(False)
    run.same_as_before(
        "reference.txt",
        fingerprint(reference),
        f"model={args.model} holds other weights than when the run in {run.folder} began, and "
        "kl_coef pulls to them; put the first ones back",
    )
    return reference


# ------------------------------------------------------------------------------------------ signals


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Afterwards SIGTERM and SIGINT do what they did before, so that a notebook goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """SIGTERM and SIGINT ask for the end after the current step. A second one ends at once.

    A signal within a second of the first counts as the same: a launcher passes on what its children
    got.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received, self.agreed, self.when = accelerator, 0, 0, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: Any) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
            name = signal.Signals(number).name
            print(
                f"{name}: finishing the step and saving. A second one ends at once", file=sys.stderr
            )
        elif time.monotonic() - self.when > 1:
            os._exit(128 + number)

    def asked(self) -> bool:
        """Whether any process got a signal. All must call it, and all get the same answer."""
        mine = torch.tensor([self.received], device=self.accelerator.device)
        self.agreed = int(self.accelerator.gather(mine).max())
        return self.agreed > 0


# ------------------------------------------------------------------------- time, memory, pictures


class Clock:
    """Seconds per phase of a step."""

    def __init__(self, device: torch.device):
        self.device, self.phases, self.start = device, {}, time.perf_counter()
        self.last = self.start

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """{"seconds/PHASE": ..., "seconds/step": ...}"""
        found = {f"seconds/{phase}": seconds for phase, seconds in self.phases.items()}
        return found | {"seconds/step": self.last - self.start}


def peak_memory() -> float:
    """Bytes: of CUDA memory allocated at most, without CUDA of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


@contextlib.contextmanager
def profile(folder: Path) -> Iterator[None]:
    """Write folder/trace.json (chrome://tracing, Perfetto); print the slowest operators."""
    with torch.profiler.profile() as trace:  # CPU, and CUDA where there is one
        yield
    trace.export_chrome_trace(str(folder / "trace.json"))
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40)
    tqdm.write(table)


def save_side_by_side(images: list[Tensor], path: Path) -> None:
    """A prompt's images of any sizes in one 8-bit PNG."""
    height = max(x.shape[1] for x in images)
    columns = []
    for x in images:
        columns.append(nn.functional.pad(x, (0, 0, 0, height - x.shape[1]), value=1.0))
    save_image(torch.cat(columns, dim=2), path)
