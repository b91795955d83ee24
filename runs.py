"""A run's folder: config.yaml, metrics.jsonl, samples.jsonl, pictures, checkpoints, and how a run goes on from them.

What train_saei.py writes and eval.py and report.py read. A checkpoint is written aside and renamed when it is whole, so
the newest name is always a good one; AutoModelForImageTextToText and AutoProcessor load it.
"""

import contextlib
import json
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: a checkpoint gets its name when all of it is written."""
    return sorted(Path(folder).glob("checkpoints/step-[0-9]*"))


def prepare_output(cfg, accelerator: Accelerator) -> tuple[int, str]:
    """Make, empty or continue the run's folder.   -> the first step, where the parameters come from"""
    out = Path(cfg.output)
    held, found = (out / "metrics.jsonl").exists(), checkpoints(out)
    if held and not (cfg.resume or cfg.overwrite):
        raise ValueError(f"{out} already holds a run: --resume goes on with it, --overwrite replaces it")
    if cfg.resume and found:
        same_config(cfg, found[-1] / "config.yaml")
    accelerator.wait_for_everyone()  # nobody deletes what another process has still to look at
    if accelerator.is_main_process:
        if held and not cfg.resume:
            for name in ("checkpoints", "pictures", "report", "eval"):
                shutil.rmtree(out / name, ignore_errors=True)
        if not cfg.resume or not found:
            for name in ("metrics.jsonl", "samples.jsonl", "trace.json"):
                (out / name).unlink(missing_ok=True)
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    accelerator.wait_for_everyone()
    if cfg.resume and found:
        return int(found[-1].name.removeprefix("step-")), str(found[-1])
    return 0, cfg.model


def same_config(cfg, path: Path) -> None:
    """Refuse to go on with another configuration; what cannot change the result may differ."""
    free = {"output", "overwrite", "resume", "steps", "save_every", "report_to", "log_prompts", "micro_prompts"}
    free |= {"micro_responses", "sample_prompts", "checkpointing", "self_check", "dry_run", "profile"}
    if cfg.anneal or cfg.intervention == "noise":
        free.discard("steps")
    before = yaml.safe_load(path.read_text())
    changed = [f"{k}: {before.get(k)} -> {v}" for k, v in asdict(cfg).items() if k not in free and before.get(k) != v]
    if changed:
        raise ValueError(f"the run in {cfg.output} was started with another configuration ({'; '.join(changed)})")


def weights_apart(accelerator: Accelerator) -> None:
    """save_state and load_state leave the parameters to save_pretrained and from_pretrained: one copy on disk."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save_checkpoint(cfg, accelerator: Accelerator, wrapped: torch.nn.Module, step: int) -> None:
    """Write parameters, processor, optimiser and random states aside, then rename: a name means a whole checkpoint."""
    final = Path(cfg.output) / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(f".{final.name}")
    if accelerator.is_main_process:
        for old in (aside, final):
            shutil.rmtree(old, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(wrapped)
    accelerator.save_state(str(aside / "state"))
    if accelerator.is_main_process:
        accelerator.unwrap_model(wrapped).save_pretrained(aside, weights)
        (aside / "config.yaml").write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.rename(final)


def save_side_by_side(images: list[Tensor], path: Path) -> None:
    """A prompt's images of any sizes in one 8-bit PNG; a single one as it is."""
    height = max(x.shape[1] for x in images)
    columns = [torch.nn.functional.pad(x, (0, 0, 0, height - x.shape[1]), value=1.0) for x in images]
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
        return {f"seconds/{k}": v for k, v in self.phases.items()} | {"seconds/step": self.last - self.start}


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
        self.earned, self.identical = 0.0, False  # what the warnings go by
        self.main = accelerator.is_main_process
        if self.main:
            for name in ("metrics.jsonl", "samples.jsonl"):  # a resumed run forgets what came after its checkpoint
                path = self.out / name
                lines = path.read_text().splitlines() if path.exists() else []
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first_step]
                path.write_text("".join(line + "\n" for line in kept))
        if cfg.report_to != "none":
            accelerator.init_trackers("saei", config={k: v for k, v in asdict(cfg).items() if v is not None})

    def progress(self, steps: range) -> Iterator[int]:
        self.bar = tqdm(steps, initial=steps.start, total=steps.stop, disable=not self.main, unit="step")
        profiled = min(steps.start + 1, steps.stop - 1) if self.cfg.profile and self.main else None
        for step in self.bar:
            with profile(self.out) if step == profiled else contextlib.nullcontext():
                yield step

    def step(self, step: int, metrics: dict[str, float], losses: dict[str, float]) -> None:
        """metrics are means of this process's equal share: their mean is the global one; losses are global already."""
        names = sorted(metrics)
        values = torch.tensor([metrics[name] for name in names], device=self.accelerator.device, dtype=torch.float32)
        metrics = dict(zip(names, self.accelerator.reduce(values, "mean").tolist(), strict=True)) | losses
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        metrics["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else memory
        self.warn(step, metrics)
        self.accelerator.log(metrics, step=step)
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step} | {k: round(v, 8) for k, v in metrics.items()}) + "\n")
            self.bar.set_postfix(reward=f"{metrics['reward']:.2f}", entropy=f"{metrics['entropy/clean']:.3f}")

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        self.earned += metrics["accuracy"]
        if self.main and metrics["distinct"] <= 1 / self.cfg.rollouts and not self.identical:
            self.identical = True  # said once
            self.bar.write(
                f"warning: step {step}: all rollouts of every prompt are identical although temperature is "
                f"{self.cfg.temperature}: the policy has collapsed (entropy {metrics['entropy/clean']:.2g}); raise "
                "--temperature, or start from an earlier checkpoint"
            )
        if self.main and step == 4 and self.earned == 0:
            self.bar.write(
                "warning: no correct answer in 5 steps. Does the problem ask for \\boxed{} or <answer> tags, is "
                f"--max_new_tokens long enough (truncated: {metrics['truncated']:.0%})? Look at samples.jsonl"
            )

    def samples(self, step: int, policy, rows: list[int], x) -> None:
        """One line a response of the first prompts of the main process, with tokens, entropies and what TsEC kept."""
        if not self.main:
            return
        lines = []
        for p in range(min(self.cfg.log_prompts, len(rows))):
            pictures = {"clean": x.prompts, "adversarial": x.attacked} if x.fresh else {"clean": x.prompts}
            pictures = pictures if x.prompts.counts[p] else {}  # text alone
            names = {kind: f"pictures/step-{step:06d}-{p}-{kind}.png" for kind in pictures}
            for kind, prompts in pictures.items():
                save_side_by_side(prompts[p : p + 1].images, self.out / names[kind])
            for g, text in enumerate(x.texts[p]):
                n, kind = self.cfg.clean_rollouts, "clean" if g < self.cfg.clean_rollouts else "adversarial"
                r, i = (x.clean, p * n + g) if g < n else (x.fresh, p * (self.cfg.rollouts - n) + g - n)
                tokens, entropy = r.tokens[i][r.mask[i]].tolist(), r.entropy[i][r.mask[i]].tolist()
                line = {"step": step, "prompt": p, "row": rows[p], "image": kind, "response": text}
                line |= {name: x.batch[p][name] for name in ("problem", "answer")}
                line |= {name: values[p, g].item() for name, values in (x.scores | {"advantage": x.advantages}).items()}
                line |= {"truncated": tokens[-1] not in policy.eos_ids, "entropy": [round(h, 4) for h in entropy]}
                line |= {"tokens": [policy.processor.tokenizer.decode([token]) for token in tokens]}
                line |= {"kept": x.keep[i][r.mask[i]].tolist() if kind == "clean" else None}
                lines.append(line | {"clean_picture": names.get("clean"), "picture": names.get(kind)})
        with open(self.out / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
