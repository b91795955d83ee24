"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl, pictures, checkpoints, resume.

train_saei.py writes it, runtime/report.py draws it. A checkpoint is written aside, synced and
renamed when it is whole, so the newest name is always a good one. AutoModelForImageTextToText and
AutoProcessor load it. docs/faults.md says what every fault leaves behind.
"""

import contextlib
import json
import math
import os
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from runtime import data
from runtime.args import RENAMED, ModelArgs, RunArgs, TrainDataArgs
from runtime.distributed import place_reference
from runtime.faults import PROJECT, one_line
from runtime.lock import FolderLock
from runtime.rollouts import Rollouts, sample_lines
from runtime.signals import Signals
from vlm.policy import Policy

# Options that cannot change the result of a run: a resumed run may set them anew.
FREE = {"output", "overwrite", "resume", "dry_run", "steps", "save_every", "keep_last"}
FREE |= {"report_to", "self_check", "profile", "gradient_checkpointing"}
FREE |= {"micro_prompts", "micro_responses", "sample_prompts"}
FREE |= {"engine", "engine_python", "engine_memory"}
TRACKER_PROJECT = "saei"  # what trackers call the run; tensorboard's folder

# What says that a run has begun in a folder.
TRACES = (".lock", "config.yaml", "metrics.jsonl", "checkpoints")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A name means a whole checkpoint."""
    found = []
    for path in Path(folder).glob("checkpoints/step-*"):
        if re.fullmatch(r"step-\d{6,}", path.name):  # not a copy that somebody named
            found.append(path)
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step-"))


class Finished(Exception):
    """The run to resume has taken all its steps. `main` then returns."""


class Run:
    """One run: its folder, its steps, what is logged, saved and compared when it resumes.

    run.checkpoint  the folder of the checkpoint to continue from, or None
    run.steps()     the steps that are left; ends early when a signal asked for it
    """

    def __init__(self, args: RunArgs, options: dict[str, Any], accelerator: Accelerator):
        """Lock and check the folder. options: all options of the run, for config.yaml.

        Nothing of an earlier run changes before `steps`, so a fault of the data or the model
        costs nothing.

        Raises ValueError if another process writes to the folder, if it holds a run and neither
        resume nor overwrite is set, if there is nothing to resume, or if the run to resume was
        started with other options; Finished if that one has all its steps.
        """
        self.args, self.options, self.accelerator = args, options, accelerator
        self.folder, self.is_main = Path(args.output), accelerator.is_main_process
        self.lock, self.signals, self.bar = FolderLock(self.folder), None, None
        open_runs.append(self)
        self._on_main(self._refuse_nothing_to_resume)
        while not self._on_main(self.lock.attempt):
            time.sleep(0.5)
        self.checkpoint, self.first_step = self._on_main(self._check_folder)
        if self.checkpoint and self.first_step >= args.steps:
            self._print(f"{self.folder}: already finished at step {self.first_step}")
            self._print(self.summary())
            accelerator.end_training()
            raise Finished
        self.same_files: dict[str, str] = {}  # by name: what a resumed run must find again
        self.total_accuracy, self.warned_identical = 0.0, False

    def _on_main(self, function: Callable[[], Any]) -> Any:
        """What the main process's function() returns, or the ValueError it raises, on all."""
        result = [None]
        if self.is_main:
            try:
                result = [function()]
            except ValueError as error:
                result = [error]
            except OSError as error:
                said = f"cannot write to --output {self.folder}: {error}; choose another folder"
                result = [ValueError(said)]
        (result,) = broadcast_object_list(result)
        if isinstance(result, ValueError):
            raise result
        return result

    def _refuse_nothing_to_resume(self) -> None:
        if self.args.resume and not any((self.folder / name).exists() for name in TRACES):
            raise ValueError(
                f"nothing to resume in {self.folder}: no run has begun there. Start without "
                "--resume, or correct --output"
            )

    def _check_folder(self) -> tuple[str | None, int]:
        """-> the checkpoint to continue from or None, the first step.   Changes nothing."""
        found, args = checkpoints(self.folder), self.args
        metrics = self.folder / "metrics.jsonl"  # empty if the first step failed
        held = bool(found) or (metrics.exists() and metrics.stat().st_size > 0)
        if held and not (args.resume or args.overwrite):
            raise ValueError(
                f"{self.folder} already holds a run: --resume continues it, --overwrite replaces it"
            )
        newest = found[-1] if found and args.resume else None
        if newest:
            self._refuse_other_options(newest / "config.yaml")
            return str(newest), step_of(newest)
        if args.resume:
            if held:
                self._refuse_other_options(self.folder / "config.yaml")
            self._print(f"{self.folder} has no checkpoint yet: the run starts again at step 0")
        return None, 0

    def _begin(self) -> None:
        """Write what the run begins with. An old run that it does not resume is deleted."""
        for unfinished in self.folder.glob("checkpoints/.step-*"):  # killed while it was saved
            shutil.rmtree(unfinished)
        begun = checkpoints(self.folder) or (self.folder / "metrics.jsonl").exists()
        if begun and not self.args.resume:  # else the folder may hold evaluations, no run
            self._delete_run()
        if self.checkpoint is None:
            files = ["metrics.jsonl", "samples.jsonl", "reference.txt", "rows.txt", "trace.json"]
            for name in files:
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "pictures").mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.options, sort_keys=False))
        for name, content in self.same_files.items():
            (self.folder / name).write_text(content)

    def _delete_run(self) -> None:
        """What a run wrote, and nothing else. Killed here, it leaves whole checkpoints."""
        for checkpoint in reversed(checkpoints(self.folder)):
            delete_checkpoint(checkpoint)
        for name in ("checkpoints", "pictures", "report", ".aim"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for failed in self.folder.glob("failed-step-*-process-*.pt"):
            failed.unlink()
        for result in self.folder.glob("eval/*.json*"):
            if not result.name.startswith("before"):  # that one is of the model to start from
                result.unlink()
        tensorboard = self.folder / TRACKER_PROJECT
        for path in sorted(tensorboard.glob("**/*"), reverse=True):  # files before their folder
            if "tfevents" in path.name or path.name == "hparams.yml":
                path.unlink()
            elif path.is_dir():
                with contextlib.suppress(OSError):  # somebody's file is in it
                    path.rmdir()
        with contextlib.suppress(OSError):
            tensorboard.rmdir()

    def _refuse_other_options(self, path: Path) -> None:
        try:
            before = dict(yaml.safe_load(path.read_text()))
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} cannot be read, so nothing says with which options the run began "
                f"({one_line(error)}): --overwrite replaces it"
            ) from error
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
        """Raise ValueError(message) if the run to resume began with another content of `name`."""
        path = self.folder / name
        if self.first_step and path.exists() and path.read_text() != found:
            raise ValueError(message)
        self.accelerator.wait_for_everyone()  # all have read it: `steps` writes it
        self.same_files[name] = found

    # ------------------------------------------------------------------------------ steps and logs

    def steps(self) -> Iterator[int]:
        """The steps from the checkpoint on, with a progress bar. A signal ends them early.

        With --overwrite this is where the old run is deleted.
        """
        self._on_main(self._begin)
        self.step, self.parent = self.first_step, os.getppid()
        say = self._say_stopping if self.is_main else lambda number: None
        self.signals = Signals(self.accelerator, say)  # not before: until here one ends at once
        if self.is_main:
            self._forget_later_lines()
        if self.args.report_to != "none":
            shown = {k: str(v) if isinstance(v, list) else v for k, v in self.options.items()}
            shown = {name: value for name, value in shown.items() if value is not None}
            self.accelerator.init_trackers(TRACKER_PROJECT, config=shown)
        steps = range(self.first_step, self.args.steps)
        traced = min(self.first_step + 1, self.args.steps - 1) if self.args.profile else None
        self.bar = tqdm(
            steps, initial=steps.start, total=steps.stop, disable=not self.is_main, unit="step"
        )
        for step in self.bar:
            self.step, trace = step, step == traced and self.is_main
            reset_peak_memory()
            with profile(self.folder) if trace else contextlib.nullcontext():
                yield step
            if self.signals.agreed:
                break

    def _forget_later_lines(self) -> None:
        """A resumed run drops what came after its checkpoint. The last line may be cut anywhere."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, aside = self.folder / name, self.folder / f".{name}"
            lines = path.read_text(errors="replace").split("\n") if path.exists() else []
            kept = []
            for line in lines[:-1]:
                try:
                    if json.loads(line)["step"] < self.first_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # a power cut: after what was synced
                    pass
            aside.write_text("".join(kept))
            aside.replace(path)  # killed before this, the run keeps the old file

    def _say_stopping(self, number: int) -> None:
        """The first signal: what happens now, on the screen and in the lock.

        accelerate's launcher ends at Ctrl-C, in a traceback that hides the line, so it comes twice.
        """
        with contextlib.suppress(OSError):
            self.lock.mark_stopping()
        if self.bar is not None:
            self.bar.disable = True  # it would overwrite the line, or fail as `| tee` is gone
        after = ""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            after = f" The launcher waits {seconds} s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), then kills."
        doing = f"finishing step {self.step + 1}, saving"
        name, pid = signal.Signals(number).name, os.getpid()
        say(f"{name}: {doing}; Ctrl-C again to stop at once (or kill {pid}).{after}")

        def say_again() -> None:
            while os.getppid() == self.parent:
                time.sleep(1)
                if self not in open_runs:
                    return
            say(f"the launcher has ended, process {pid} has not: {doing}; kill {pid} stops it")

        threading.Thread(target=say_again, daemon=True).start()

    def log(self, step: int, metrics: dict[str, float], losses: dict[str, float]) -> None:
        """metrics: means over this process's equal share. losses: global already."""
        names = sorted(metrics)
        values = torch.tensor([metrics[name] for name in names], dtype=torch.float32)
        means = self.accelerator.reduce(values.to(self.accelerator.device), "mean").tolist()
        metrics = dict(zip(names, means, strict=True)) | losses
        metrics["memory_gib"] = peak_memory() / 2**30
        self._warn(step, metrics)
        if self.is_main:
            self.lock.check()
            rounded = {name: round(value, 8) for name, value in metrics.items()}
            with self._writing("metrics.jsonl"), open(self.folder / "metrics.jsonl", "a") as file:
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
        with self._writing("samples.jsonl"):
            for kind, images in pictures.items():
                paths[kind] = f"pictures/step-{step:06d}-0-{kind}.png"
                save_side_by_side(images, self.folder / paths[kind])
            with open(self.folder / "samples.jsonl", "a") as file:
                for line in lines:
                    names = {"clean_picture": paths.get("clean")}
                    names["picture"] = paths.get(line["image"])
                    file.write(json.dumps({"step": step} | line | names) + "\n")

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """An error of writing says which file of the run it was and what there is to resume."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            # a RuntimeError of torch.save's zip writer is a full disk, one of a collective is not
            words = ("PytorchStreamWriter", "inline_container")
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
                raise
            good = checkpoints(self.folder)
            resume = "There is no checkpoint to resume from: --resume true starts again at step 0"
            if good:
                resume = f"The last good checkpoint: {good[-1]}. --resume true continues from it"
            failed = OSError(f"{self.folder / what} could not be written (disk full?): {error}")
            failed.add_note(resume)
            raise failed from error

    # ---------------------------------------------------------------------- checkpoints, the end

    def save_if_due(self, step: int, wrapped: nn.Module) -> None:
        """Write a checkpoint every save_every steps, after the last one, and on a signal."""
        done = step + 1
        # asked() comes first: all processes must call it
        if self.signals.asked() or done % self.args.save_every == 0 or done == self.args.steps:
            if self.is_main and self.signals.agreed and not self.signals.received:
                self._say_stopping(self.signals.agreed)  # another process got the signal
            self._save(done, wrapped)
            self.signals.asked()  # a signal while it was saved: there is nothing more to finish

    def _save(self, step: int, wrapped: nn.Module) -> None:
        final = self.folder / "checkpoints" / f"step-{step:06d}"
        aside = final.with_name(f".{final.name}")
        accelerator = self.accelerator
        leave_lost_screen()
        if self.is_main:
            self.lock.check()
        with self._writing(f"checkpoints/{final.name}"):
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
        if self.is_main and self.args.keep_last:
            for old in checkpoints(self.folder)[: -self.args.keep_last]:
                delete_checkpoint(old)

    def finish(self) -> None:
        """End the trackers, say where everything is. After a signal, exit with 128 + its number."""
        self.accelerator.wait_for_everyone()  # one that left earlier was seen to abort (gloo)
        self.accelerator.end_training()
        self.bar.close()
        if self.signals.agreed:
            self._print(f"stopped after step {self.step + 1}; --resume true continues the run")
        self._print(self.summary())
        if self.signals.agreed:
            sys.exit(128 + self.signals.agreed)

    def summary(self) -> str:
        """Where the run's results are, and the command that draws its page."""
        newest = [f"checkpoints/{path.name}" for path in checkpoints(self.folder)[-1:]]
        files = ", ".join(["metrics.jsonl", "samples.jsonl", *newest])
        command = f"python -m runtime.report {shlex.quote(str(self.folder))}"
        if Path.cwd() != PROJECT:
            command = f"PYTHONPATH={shlex.quote(str(PROJECT))} {command}"
        return f"{self.folder} holds {files}. For the page: {command}"

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone, or the `tee` behind a pipe
            self.accelerator.print(line, flush=True)

    def close(self) -> None:
        """Leave the folder to others, and give the signals back."""
        if self.signals:
            self.signals.restore()
        self.lock.release()


open_runs: list[Run] = []  # of this process


@contextlib.contextmanager
def runs_closed() -> Iterator[None]:
    """However it ends, afterwards no run holds a folder or the signals, so a notebook goes on."""
    try:
        yield
    except Finished:
        pass
    finally:
        while open_runs:
            open_runs.pop().close()


def leave_to_parent() -> None:
    """In a forked child: a grandchild of a reward function must not keep the folder's lock."""
    for run in open_runs:
        run.lock.close()
        if run.signals:
            run.signals.leave_to_parent()


os.register_at_fork(after_in_child=leave_to_parent)


def say(line: str) -> None:
    """To the screen, also while another thread is printing, or if the screen is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def leave_lost_screen() -> None:
    """A terminal or a `| tee` that is gone must not cost the checkpoint: lines go nowhere then."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


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
    reference = args.load()
    run.same_as_before(
        "reference.txt",
        fingerprint(reference),
        f"model={args.model} holds other weights than when the run in {run.folder} began, and "
        "kl_coef pulls to them; put the first ones back",
    )
    place_reference(run.accelerator, reference)
    return reference


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


def reset_peak_memory() -> None:
    """`peak_memory` counts from here. Resident memory has no such thing."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


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
