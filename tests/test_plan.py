"""runtime/plan.py: --dry_run says what training would do, and the first step's peak beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT, short

from demo.task import make_row
from runtime import args, launch, plan, run
from runtime.memory import Launch, Work, read_launch
from tests.families import KINDS, make_policy, picture
from train_saei import load_config, main
from vlm.policy import Policy, Responses


def without_weights(source: str | Path, folder: Path) -> str:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def test_dry_run_without_weights_trains_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    model, out = without_weights(tiny, tmp_path / "model"), tmp_path / "out"
    options = dict(model=model, output=str(out), dry_run=True, steps=5, prompts_per_step=8)
    options |= dict(updates_per_step=2, micro_prompts=2, micro_responses=6, sample_prompts=3)
    config = load_config(**options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main(config)
    lines, memory, settings, end = capsys.readouterr().out.split("\n\n")
    title, settings = settings.split("\n", 1)
    assert title == "Settings that differ from the defaults:"
    assert yaml.safe_load(settings) == options
    assert end == "dry run: nothing was trained or written\n"
    count = sum(p.numel() for p in Policy.from_pretrained(tiny).parameters())
    for said in (
        f"qwen2_5_vl, {count:,} parameters, {count:,} trained",
        "96 x 96",
        "at most 9 per prompt",  # 96 / (16 * 2) squared
        "1,000,000 rows",
        "updates 10",
        "8 prompts x 8 responses, 4 of 8 adversarial",
        "one of 2, DDP: 4 prompts; samples 3 at a time, updates 2 prompts and 6 responses at a",
    ):
        assert said in lines, said
    assert memory.splitlines()[-1].startswith("  in all, with") and not out.exists()
    monkeypatch.setenv("RANK", "1")
    main(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "45.06 GB each, 3 written, 2 kept: at most 135.17 GB on the disk"),
        ({"keep_last": 0}, "45.06 GB each, 3 written, all kept: at most 135.17 GB on the disk"),
        ({"steps": 50}, "45.06 GB each, 1 written, all kept: at most 45.06 GB on the disk"),
        ({"steps": 500}, "45.06 GB each, 10 written, 2 kept: at most 135.17 GB on the disk"),
        ({"keep_last": 1}, "45.06 GB each, 3 written, 1 kept: at most 90.11 GB on the disk"),
    ],
    ids=str,
)
def test_the_disk_that_checkpoints_take(options, said):
    """3B in float32 with AdamW's state: 12 bytes a parameter."""
    size = 12 * 3_754_622_976
    assert plan.disk(size, args.RunArgs(**{"steps": 101} | options)) == said


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_can_be_planned(kind, tmp_path):
    policy, image, problem = make_policy(kind), picture(40, 40), "how many dots ?"
    policy.save_pretrained(tmp_path / "all")
    image.save(tmp_path / "a.png")
    rows, streaming = tmp_path / "rows.jsonl", kind == "gemma3"
    rows.write_text('{"image": "a.png", "problem": "how many dots ?", "answer": "1"}\n')
    model = without_weights(tmp_path / "all", tmp_path / "model")
    text = plan.describe(load_config(model=model, dataset=str(rows), streaming=streaming), Launch())
    tokens = int(re.search(r"image tokens: +at most (\d+)", text)[1])
    with_image, alone = ({"problem": problem, "images": x} for x in ([image], []))
    assert 4 <= tokens <= policy.prompt_tokens(with_image) - policy.prompt_tokens(alone)
    assert ("streamed" if streaming else "1 rows") in text


@pytest.mark.parametrize(
    "way, said",
    [
        (["--config_file", "recipes/accelerate/fsdp2.yaml"], "one of 8, FSDP2, bfloat16"),
        (["--config_file", "recipes/accelerate/zero2.yaml"], "one of 8, ZeRO-2, bfloat16"),
        (["--config_file", "recipes/accelerate/ddp.yaml", "--num_processes", "4"], "one of 4, DDP"),
        (["--num_processes", "1", "--mixed_precision", "no"], "one process: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_launcher_plans_with_one_process_and_without_a_gpu(way, said, monkeypatch):
    """The command of a run with --dry_run true behind it. DeepSpeed need not be installed."""
    started = []

    def run(command: list[str], env: dict[str, str], check: bool):
        started.append((command, env))
        return SimpleNamespace(returncode=7)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "run", run)
    words = ["train_saei.py", "--config", "recipes/demo.yaml", "--dry_run", "true"]
    with pytest.raises(SystemExit) as ended:
        launch.main([*way, *words])
    ((command, environment),) = started
    assert ended.value.code == 7 and command == [sys.executable, *words]
    with mock.patch.dict(os.environ, environment, clear=True):
        config = load_config(["--config", "recipes/demo.yaml"])
        text = plan.describe(config, read_launch())
    assert re.search(r"per device: +(.*)", text)[1].startswith(said)


def test_without_dry_run_accelerate_launches(monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "launch_command", launched.append)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for words in ([], ["--dry_run", "false"]):
        launch.main(["--num_processes", "2", "train_saei.py", *words])
    assert [args.num_processes for args in launched] == [2, 2]


# ------------------------------------------------------------------------- the peak beside the plan


def step_of(tiny, tmp_path, device: str):
    """A configuration, the run of it, and the rollouts of a step: 2 prompts, responses of 6."""
    config = short(tiny, tmp_path / "out")
    policy = Policy.from_pretrained(tiny)
    rows = [make_row("plain/train", i) for i in range(2)]
    prompts = policy.encode([row["problem"] for row in rows], [row["images"] for row in rows])
    tokens = torch.full((4, 6), 20)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    responses = Responses(tokens, mask, torch.zeros(4, 6), torch.zeros(4, 6))
    said = []
    of_run = SimpleNamespace(first_step=0, is_main=True, bar=SimpleNamespace(write=said.append))
    of_run.accelerator = SimpleNamespace(device=torch.device(device))
    sampled = SimpleNamespace(prompts=prompts, responses=[responses])
    return config, of_run, sampled, said


def test_the_first_step_on_a_gpu_prints_its_peak_beside_the_plan(tiny, tmp_path, monkeypatch):
    config, of_run, sampled, said = step_of(tiny, tmp_path, "cuda")
    monkeypatch.setattr(plan, "peak_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(plan, "peak", lambda parts: 5 * parts["parameters"])
    plan.compare(config, of_run, sampled, 0)
    plan.compare(config, of_run, sampled, 1)
    (line,) = said
    planned = 5 * sum(p.nbytes for p in Policy.from_pretrained(tiny).parameters()) / 2**30
    L = sampled.prompts.ids.shape[1]
    assert line == (
        f"step 1: peak memory 3.0 GiB, planned {planned:.1f} GiB for its prompts of {L} and "
        "responses of 6 tokens"
    )


def test_the_plan_beside_the_peak_is_of_the_steps_own_sizes(tiny, tmp_path, monkeypatch):
    config, of_run, sampled, _ = step_of(tiny, tmp_path, "cuda")
    seen = []
    monkeypatch.setattr(plan, "estimate", lambda c, policy, work, launch: seen.append(work) or {})
    plan.compare(config, of_run, sampled, 0)
    patches = sampled.prompts.images[0][0].numel() // 16**2
    L = sampled.prompts.ids.shape[1]
    assert seen == [Work(prompts=2, micro=2, L=L, patches=patches, T=6, one_pass=True)]


def test_nothing_is_compared_without_a_gpu(tiny, tmp_path):
    config, of_run, sampled, said = step_of(tiny, tmp_path, "cpu")
    plan.compare(config, of_run, sampled, 0)
    assert said == []


def test_a_steps_peak_is_its_own(tiny, tmp_path, monkeypatch):
    """The count starts anew with each step."""
    resets = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    run.reset_peak_memory()
    assert resets == [1]
    monkeypatch.setattr(run, "reset_peak_memory", lambda: resets.append(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(short(tiny, tmp_path / "out"))
    assert resets == [1, 2, 2]
