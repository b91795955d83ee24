"""extras/trl_saei.py: who saw which picture in TRL's trainer, the attack beside train_saei.py's, the refusals."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor

import egas
import train_saei
import tsec
from demo.task import make_row
from extras import trl_saei
from tests import tiny as families
from vlm.policy import Policy, Responses

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(ROOT / "demo" / "confident")
G, ADVERSARIAL, EPS, TEMPERATURE = 4, 2, 2 / 255, 0.8
IMAGE_PROCESSOR = AutoProcessor.from_pretrained(MODEL).image_processor
ROWS = [make_row("shifted/train", i) for i in range(2)]


def config(folder, **options) -> trl.GRPOConfig:
    plain = dict(
        max_steps=1, per_device_train_batch_size=2 * G, num_generations=G, max_completion_length=48
    )
    plain |= dict(
        temperature=TEMPERATURE,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-4,
        disable_tqdm=True,
    )
    return trl.GRPOConfig(
        str(folder), **plain | dict(gradient_checkpointing=False, shuffle_dataset=False) | options
    )


def dataset(rows=ROWS) -> Dataset:
    rows = [{"images": r["images"], "answer": r["answer"], "problem": r["problem"]} for r in rows]
    return Dataset.from_list(
        [r | {"prompt": [{"role": "user", "content": r.pop("problem")}]} for r in rows]
    )


class Spied:
    """A trainer; pixel_values and tokens of each of its generate calls, pixel_values of its update, its attacks."""

    def __init__(
        self, folder, trainer=trl_saei.SaEITrainer, model=MODEL, rows=ROWS, options=None, **rest
    ):
        if trainer is trl_saei.SaEITrainer:
            rest = dict(adversarial=ADVERSARIAL, eps=EPS) | rest
        self.calls, self.updates, self.attacks, self.frozen, self.completions = [], [], [], [], []
        self.trainer = trainer(
            model, self.reward, config(folder, **options or {}), dataset(rows), **rest
        )
        model = self.model = self.trainer.model
        generate, forward = model.generate, model.forward

        def spied_generate(*args, **kwargs):
            states = [(p.requires_grad, p.grad is None) for p in model.parameters()]
            tokens = generate(*args, **kwargs)
            self.calls.append(
                (kwargs["pixel_values"], tokens[:, kwargs["input_ids"].shape[1] :], set(states))
            )
            return tokens

        @functools.wraps(forward)  # generate reads its signature
        def spied_forward(*args, **kwargs):
            if kwargs.get("fused_lm_head"):
                self.updates.append(kwargs["pixel_values"])
            elif torch.is_tensor(pixels := kwargs.get("pixel_values")) and pixels.requires_grad:
                self.frozen.append(not any(p.requires_grad for p in model.parameters()))
            return forward(*args, **kwargs)

        model.generate, model.forward = spied_generate, spied_forward
        if trainer is trl_saei.SaEITrainer:
            attack = self.trainer.attack
            self.trainer.attack = lambda *args: (
                self.attacks.append((args, attack(*args))) or self.attacks[-1][1]
            )

    def reward(self, completions, completion_ids, **columns):
        self.completions.append(completion_ids)
        return [float(len(ids) % 3) for ids in completion_ids]

    def train(self):
        self.trainer.train()
        return self.trainer.state.log_history[0]


@pytest.fixture(scope="module")
def spied(tmp_path_factory):
    spied = Spied(tmp_path_factory.mktemp("trl"))
    spied.log = spied.train()
    return spied


def processed(image) -> torch.Tensor:
    return IMAGE_PROCESSOR([image], return_tensors="pt")["pixel_values"]


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """(patches, 3 * 2 * p * p) -> (patches, 3, 2, p, p) in [0, 1], by the processor's own statistics"""
    ip = IMAGE_PROCESSOR
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (ip.image_mean, ip.image_std))
    return pixels.view(-1, 3, 2, ip.patch_size, ip.patch_size) * std + mean


def test_half_of_a_group_sees_the_attacked_picture_and_the_update_the_clean_one(spied):
    (clean, _, _), (attacked, _, _) = spied.calls
    pictures = [processed(row["images"][0]) for row in ROWS]
    half = lambda pair: torch.cat([x for x in pair for _ in range(G // 2)])  # noqa: E731
    assert torch.equal(clean, half(pictures))
    assert len(spied.attacks) == 2  # one a prompt
    assert torch.equal(attacked, half([after for _, after in spied.attacks]))
    (update,) = spied.updates
    groups = update.view(2 * G, -1, update.shape[1])  # TRL shuffles the rows of a batch
    assert all(any(torch.equal(x, y) for y in pictures) for x in groups)


def test_attack_stays_in_its_ball_and_the_frames_are_one_picture(spied):
    for (_, before, _), after in spied.attacks:
        x0, x = unit(before), unit(after)
        assert torch.equal(after.view_as(x)[:, :, 0], after.view_as(x)[:, :, 1])
        assert EPS / 2 < (x - x0).abs().max() <= EPS + 1e-6
        assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6


def test_responses_come_back_in_the_rows_that_asked(spied):
    generated = [
        row.tolist() for _, tokens, _ in spied.calls for row in tokens
    ]  # clean 0 0 1 1, adversarial 0 0 1 1
    (completions,) = spied.completions
    assert len(completions) == 2 * G
    for i, j in enumerate([0, 1, 4, 5, 2, 3, 6, 7]):
        assert completions[i] == generated[j][: len(completions[i])]
    for i, ((_, _, responses), _) in enumerate(spied.attacks):
        assert responses == completions[i * G : i * G + G - ADVERSARIAL]


def test_attack_leaves_the_parameters_as_they_were(spied):
    assert all(states == {(True, True)} for _, _, states in spied.calls)  # after the attack, too
    assert (
        spied.frozen == [True] * 2 * 3
    )  # in it none asks for a gradient: two prompts, three steps


def test_attack_raises_the_entropy_and_is_logged(spied):
    log = spied.log
    assert log["entropy/attacked"] > 1.1 * log["entropy/selected"] > 0
    assert EPS / 2 < log["attack/linf"] <= EPS + 1e-6
    assert log["entropy/clean"] > 0 and log["entropy/fresh"] > 0 and log["grad_norm"] > 0


def padded(policy: Policy, prompts, rows: list[list[int]]) -> Responses:
    """Given responses as train_saei.py has its own, scored by the policy."""
    T = max(map(len, rows))
    tokens = torch.tensor([row + [policy.pad_id] * (T - len(row)) for row in rows])
    mask = torch.arange(T) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.no_grad():
        return Responses(tokens, mask, *policy.score(prompts, tokens, mask, TEMPERATURE))


def test_attack_and_entropies_are_train_saeis(spied):
    """The same responses, attacked by train_saei.py with the policy as it was before the trainer's update."""
    policy, sums = Policy.from_pretrained(MODEL), Counter()
    policy.banned[:] = False  # TRL's distribution has no banned tokens
    for i, (row, ((_, _, responses), theirs)) in enumerate(zip(ROWS, spied.attacks, strict=True)):
        prompts = policy.encode([row["problem"]], [row["images"]])
        clean = padded(policy, prompts, responses)
        keep = tsec.select_tokens(clean.entropy, clean.mask)
        objective = train_saei.entropy_objective(policy, prompts, clean, keep, TEMPERATURE)
        attacked = egas.pgd_ascent(objective, prompts.images, EPS, steps=3)
        ours = policy.to_pixel_values(attacked)["pixel_values"]
        assert (
            (ours - theirs).abs() < 1e-5
        ).float().mean() > 0.99  # but for signs of gradients that are rounding
        fresh = padded(
            policy,
            prompts.with_images(attacked),
            spied.completions[0][(i + 1) * G - ADVERSARIAL : (i + 1) * G],
        )
        sums["entropy/selected"] += objective(prompts.images).item() / 2
        sums["entropy/attacked"] += objective(attacked).item() / 2
        sums["entropy/clean"] += tsec.selective_entropy(clean.entropy, clean.mask).mean().item() / 2
        sums["entropy/fresh"] += tsec.selective_entropy(fresh.entropy, fresh.mask).mean().item() / 2
    for name, value in sums.items():
        exact = name in ("entropy/selected", "entropy/clean")
        assert spied.log[name] == pytest.approx(value, rel=1e-3 if exact else 1e-2), name


def test_eps_0_is_plain_grpo(tmp_path):
    """Bit for bit the clean pixels. Sampled tokens: the two halves draw from the generator in another order than all
    rows at once, so the comparison is of the most probable ones."""
    greedy = dict(generation_kwargs={"top_k": 1})
    saei, plain = (
        Spied(tmp_path, eps=0.0, options=greedy),
        Spied(tmp_path, trl.GRPOTrainer, options=greedy),
    )
    log, plain_log = saei.train(), plain.train()
    assert torch.equal(saei.calls[1][0], saei.calls[0][0])
    assert log["entropy/attacked"] == log["entropy/selected"]
    assert saei.completions == plain.completions
    for name in ("loss", "reward"):
        assert log[name] == pytest.approx(plain_log[name], abs=1e-6)
    for (name, ours), theirs in zip(
        saei.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)


def test_several_pictures_and_gradient_accumulation(tmp_path):
    """A prompt's pictures are attacked together, each row with its own; one generation for two micro-batches."""
    two = ROWS[0] | {"images": [x["images"][0] for x in ROWS]}
    options = dict(per_device_train_batch_size=G, gradient_accumulation_steps=2)
    spied = Spied(tmp_path, rows=[two, ROWS[1]], adversarial=3, options=options)
    log = spied.train()
    assert [len(before) for (_, before, _), _ in spied.attacks] == [72, 36]  # patches
    assert [len(pixels) for pixels, _, _ in spied.calls] == [72 + 36, 3 * (72 + 36)]
    assert sum(map(len, spied.updates)) == G * (72 + 36) and len(spied.updates) == 2
    (_, before, _), after = spied.attacks[0]
    assert ((after - before).abs() > 0).view(2, -1).float().mean(dim=1).min() > 0.5
    assert log["entropy/attacked"] > log["entropy/selected"]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_other_qwens_with_checkpointing_and_lora(kind, tmp_path):
    torch.manual_seed(0)
    model, processor = families.build(kind)
    processor.tokenizer.padding_side = (
        "left"  # TRL pads so, and a processor that it did not load must do the same
    )
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    options = dict(gradient_checkpointing=True, max_completion_length=6)
    rest = dict(adversarial=1, pgd_steps=1, processing_class=processor, peft_config=lora)
    spied = Spied(tmp_path, model=model, options=options, **rest)
    trained = {name for name, p in spied.model.named_parameters() if p.requires_grad}
    log = spied.train()
    assert log["entropy/attacked"] > log["entropy/selected"]
    assert trained == {name for name, p in spied.model.named_parameters() if p.requires_grad}
    assert spied.model.is_gradient_checkpointing
    spied.trainer.evaluate(dataset(ROWS[::-1]))
    assert len(spied.attacks) == 2  # those of training: evaluation sees clean pictures


def copied(folder: Path, *arguments: str) -> str:
    """Run the example where nothing of ours is but what its docstring says, on pictures in a folder of their own."""
    alone = folder / "alone"
    alone.mkdir()
    for name in ("egas.py", "tsec.py", "extras/trl_saei.py"):
        shutil.copy(ROOT / name, alone)
    data = folder / "rows" / "train"
    data.mkdir(parents=True)
    for i, row in enumerate(ROWS):
        row["images"][0].save(data / f"{i}.png")
    lines = [
        {"file_name": f"{i}.png", "problem": r["problem"], "answer": r["answer"]}
        for i, r in enumerate(ROWS)
    ]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [
        sys.executable,
        "trl_saei.py",
        "--model",
        MODEL,
        "--dataset",
        str(folder / "rows"),
        *arguments,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "OMP_NUM_THREADS": "1"
    }
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        command, cwd=alone, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_copied_alone_it_trains_and_the_attack_raises_the_entropy(tmp_path):
    size = dict(
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        adversarial=1,
        max_completion_length=24,
    )
    printed = copied(
        tmp_path, *(word for name, value in size.items() for word in (f"--{name}", str(value)))
    )
    _, table = printed.split("step entropy/selected")
    rows = [list(map(float, line.split())) for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == [1, 2]
    for _, selected, attacked, clean, fresh, linf, _ in rows:
        assert attacked > selected > 0 and clean > 0 and fresh > 0
        assert linf == pytest.approx(2 / 255, abs=1e-4)


def test_no_image_token_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_saei.SaEITrainer, "train", lambda self: None)
    monkeypatch.setattr(trl_saei, "load", lambda name: dataset())
    size = ("--output_dir", str(tmp_path), "--use_cpu", "true", "--max_completion_length", "3")
    trainer = trl_saei.main([*size])
    forward, image = trainer.model.forward, trainer.model.config.image_token_id

    @functools.wraps(forward)
    def eager(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., image] = 100.0
        return output

    trainer.model.forward = eager
    ids = trainer.processing_class.tokenizer("How many pips?")["input_ids"]
    (response,), _ = trainer._generate_single_turn([ids], None, {}, 1)
    assert response and image not in response
    trainer.generation_config.suppress_tokens = None
    (response,), _ = trainer._generate_single_turn([ids], None, {}, 1)
    assert response == [image] * 3


def test_prompt_asks_for_what_the_reward_reads(monkeypatch):
    rows = Dataset.from_list([{"problem": "<image>Find x.", "answer": "3"}])
    monkeypatch.setattr(trl_saei, "load_dataset", lambda name, split: rows)
    (message,) = trl_saei.load("some/set")["prompt"][0]
    assert (
        message["role"] == "user"
        and message["content"].startswith("Find x.")
        and "\\boxed{}" in message["content"]
    )


def test_reward_reads_the_last_box():
    texts = ["\\boxed{3} then \\boxed{11}", "\\boxed{11} then \\boxed{3}", "11", "\\boxed{111}"]
    assert trl_saei.boxed([[{"content": x}] for x in texts], ["11"] * 4) == [1.0, 0.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_trl_that_generates_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", lambda self, prompts: None)
    with pytest.raises(
        RuntimeError, match=r"\['self', 'prompts'\], not .*written for trl 1.16.0, this is"
    ):
        Spied(tmp_path)
    monkeypatch.delattr(trl.GRPOTrainer, "_generate_single_turn")
    with pytest.raises(RuntimeError, match=r"arguments are \[\]"):
        Spied(tmp_path)


def after_init(monkeypatch, change):
    init = trl.GRPOTrainer.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", changed)


def test_a_trl_without_an_attribute_is_refused(tmp_path, monkeypatch):
    after_init(monkeypatch, lambda self: delattr(self, "use_vllm"))
    with pytest.raises(RuntimeError, match="GRPOTrainer has no use_vllm: .*trl 1.16.0"):
        Spied(tmp_path)


@pytest.mark.parametrize("name", ["use_vllm", "tools", "is_fsdp_enabled", "is_deepspeed_enabled"])
def test_another_way_to_generate_or_a_sharded_model_is_refused(name, tmp_path, monkeypatch):
    after_init(monkeypatch, lambda self: setattr(self, name, True))
    with pytest.raises(ValueError, match=f"no .'{name}'"):
        Spied(tmp_path)


def test_an_update_on_other_pictures_is_refused(tmp_path, monkeypatch):
    spied, scored = Spied(tmp_path), trl.GRPOTrainer._generate_and_score_completions

    def attacked(self, inputs):
        batch = scored(self, inputs)
        return batch | {"pixel_values": batch["pixel_values"] + 1e-3}

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", attacked)
    with pytest.raises(RuntimeError, match="does not see the clean pictures"):
        spied.train()


def test_what_it_cannot_do_is_refused(tmp_path):
    for adversarial in (0, G):
        with pytest.raises(ValueError, match=f"num_generations = {G}, got {adversarial}"):
            Spied(tmp_path, adversarial=adversarial)
    model, processor = families.build("llava")
    with pytest.raises(ValueError, match="Qwen-VL"):
        Spied(tmp_path, model=model, processing_class=processor)
    trainer = Spied(tmp_path).trainer
    trainer.model.train()
    with pytest.raises(ValueError, match="a group is split"):
        trainer._generate_single_turn([[1], [1], [2], [2]], [[0]] * 4, {}, 4)
    with pytest.raises(ValueError, match="a group is split"):
        trainer._generate_single_turn([[1]] * 6, [[0]] * 6, {}, 4)
