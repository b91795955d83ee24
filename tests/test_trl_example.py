"""extras/trl_saei.py: who saw which picture in TRL's trainer, train_saei.py's attack, refusals."""

import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
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
PLAIN = dict(max_steps=1, per_device_train_batch_size=2 * G, num_generations=G)
PLAIN |= dict(max_completion_length=48, temperature=TEMPERATURE, learning_rate=1e-4)
PLAIN |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, shuffle_dataset=False)
PLAIN |= dict(save_strategy="no", logging_steps=1, disable_tqdm=True)


def dataset(rows: list[dict]) -> Dataset:
    found = []
    for row in rows:
        prompt = [{"role": "user", "content": row["problem"]}]
        found.append({"images": row["images"], "answer": row["answer"], "prompt": prompt})
    return Dataset.from_list(found)


class Spied:
    """A trainer that keeps what its model saw.

    calls: pixel_values, tokens, states of the parameters, of each generate call.
    updates: pixel_values of the update. attacks: arguments and result of each attack.
    frozen: whether the parameters were frozen in each forward that asks for pixel gradients.
    """

    def __init__(
        self, folder, trainer=trl_saei.SaEITrainer, model=MODEL, rows=ROWS, options=None, **rest
    ):
        saei = trainer is trl_saei.SaEITrainer
        if saei:
            rest = dict(adversarial=ADVERSARIAL, eps=EPS, pgd_steps=3) | rest
        self.calls, self.updates, self.attacks, self.frozen, self.completions = [], [], [], [], []
        config = trl.GRPOConfig(str(folder), **PLAIN | (options or {}))
        self.trainer = trainer(model, self.reward, config, dataset(rows), **rest)
        model = self.model = self.trainer.model
        generate, forward = model.generate, model.forward

        def spied_generate(*args, **kwargs):
            states = {(p.requires_grad, p.grad is None) for p in model.parameters()}
            tokens = generate(*args, **kwargs)
            responses = tokens[:, kwargs["input_ids"].shape[1] :]
            self.calls.append((kwargs["pixel_values"], responses, states))
            return tokens

        @functools.wraps(forward)  # generate reads its signature
        def spied_forward(*args, **kwargs):
            pixels = kwargs.get("pixel_values")
            if kwargs.get("fused_lm_head"):
                self.updates.append(pixels)
            elif pixels is not None and pixels.requires_grad:
                self.frozen.append(not any(p.requires_grad for p in model.parameters()))
            return forward(*args, **kwargs)

        def spied_attack(*args):
            attacked = attack(*args)
            self.attacks.append((args, attacked))
            return attacked

        model.generate, model.forward = spied_generate, spied_forward
        if saei:
            attack, self.trainer.attack = self.trainer.attack, spied_attack

    def reward(self, completions, completion_ids, **columns):
        self.completions.append(completion_ids)
        return [float(len(ids) % 3) for ids in completion_ids]

    def train(self) -> dict[str, float]:
        self.trainer.train()
        return self.trainer.state.log_history[0]


@pytest.fixture(scope="module")
def spied(tmp_path_factory):
    spied = Spied(tmp_path_factory.mktemp("trl"))
    spied.log = spied.train()
    return spied


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """(patches, 3 * 2 * p * p) -> (patches, 3, 2, p, p) in [0, 1], by the processor's statistics"""
    ip = IMAGE_PROCESSOR
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (ip.image_mean, ip.image_std))
    return pixels.view(-1, 3, 2, ip.patch_size, ip.patch_size) * std + mean


# ------------------------------------------------------------------------------ one plain step


def test_half_of_a_group_sees_the_attacked_picture_and_the_update_the_clean_one(spied):
    (clean, _, _), (adversarial, _, _) = spied.calls
    images = [row["images"][0] for row in ROWS]
    pictures = [IMAGE_PROCESSOR([x], return_tensors="pt")["pixel_values"] for x in images]
    first, second = pictures
    assert torch.equal(clean, torch.cat([first, first, second, second]))
    (_, first), (_, second) = spied.attacks
    assert torch.equal(adversarial, torch.cat([first, first, second, second]))
    (update,) = spied.updates
    for pixels in update.view(2 * G, -1, update.shape[1]):  # TRL shuffles the rows of a batch
        assert any(torch.equal(pixels, picture) for picture in pictures)


def test_attack_stays_in_its_ball_and_the_frames_are_one_picture(spied):
    for (_, before, _), after in spied.attacks:
        x0, x = unit(before), unit(after)
        frames = after.view_as(x)
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])
        assert EPS / 2 < (x - x0).abs().max() <= EPS + 1e-6
        assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6


def test_responses_come_back_in_the_rows_that_asked(spied):
    # generated: clean 0 0 1 1, adversarial 0 0 1 1
    generated = [row.tolist() for _, tokens, _ in spied.calls for row in tokens]
    (completions,) = spied.completions
    for completion, i in zip(completions, [0, 1, 4, 5, 2, 3, 6, 7], strict=True):
        assert completion == generated[i][: len(completion)]
    for i, ((_, _, responses), _) in enumerate(spied.attacks):
        assert responses == completions[i * G : i * G + G - ADVERSARIAL]


def test_attack_leaves_the_parameters_as_they_were(spied):
    for _, _, states in spied.calls:  # the second is after the attack
        assert states == {(True, True)}
    assert spied.frozen == [True] * 2 * 3  # two prompts, three PGD steps


def test_attack_raises_the_entropy_and_is_logged(spied):
    log = spied.log
    assert log["entropy/attacked"] > 1.1 * log["entropy/selected"] > 0
    assert EPS / 2 < log["attack/linf"] <= EPS + 1e-6
    for name in ("entropy/clean", "entropy/adversarial", "grad_norm"):
        assert log[name] > 0


def scored(policy: Policy, prompts, rows: list[list[int]]) -> Responses:
    """Given responses as train_saei.py has its own."""
    rows = [torch.tensor(row) for row in rows]
    tokens = pad_sequence(rows, batch_first=True, padding_value=policy.pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    with torch.no_grad():
        return Responses(tokens, mask, *policy.score(prompts, tokens, mask, TEMPERATURE))


def test_attack_and_entropies_are_train_saeis(spied):
    """The same responses, attacked by train_saei.py, with the policy of before the update."""
    policy, sums = Policy.from_pretrained(MODEL), Counter()
    policy.banned[:] = False  # TRL's distribution has no banned tokens
    for i, (row, ((_, _, responses), theirs)) in enumerate(zip(ROWS, spied.attacks, strict=True)):
        prompts = policy.encode([row["problem"]], [row["images"]])
        clean = scored(policy, prompts, responses)
        tsec_mask = tsec.select_tokens(clean.entropy, clean.mask)
        objective = train_saei.EntropyObjective(policy, prompts, clean, tsec_mask, TEMPERATURE)
        attacked = egas.pgd_ascent(objective, prompts.images, EPS, steps=3)
        ours = policy.to_pixel_values(attacked)["pixel_values"]
        close = (ours - theirs).abs() < 1e-5
        assert close.float().mean() > 0.99  # not all: signs of gradients that are rounding
        last = spied.completions[0][(i + 1) * G - ADVERSARIAL : (i + 1) * G]
        adversarial = scored(policy, prompts.with_images(attacked), last)
        sums["entropy/selected"] += objective(prompts.images)
        sums["entropy/attacked"] += objective(attacked)
        for name, x in {"clean": clean, "adversarial": adversarial}.items():
            sums[f"entropy/{name}"] += tsec.selective_entropy(x.entropy, x.mask).mean()
    for name, value in sums.items():
        exact = name in ("entropy/selected", "entropy/clean")
        near = pytest.approx(float(value) / 2, rel=1e-3 if exact else 1e-2)
        assert spied.log[name] == near, name


# ---------------------------------------------------------------------------------- other steps


def test_eps_0_is_plain_grpo(tmp_path):
    """Bit for bit the clean pixels.

    The most probable tokens are compared: the two halves draw sampled ones in another order.
    """
    greedy = dict(generation_kwargs={"top_k": 1}, max_completion_length=24)
    saei = Spied(tmp_path, eps=0.0, options=greedy)
    plain = Spied(tmp_path, trl.GRPOTrainer, options=greedy)
    log, plain_log = saei.train(), plain.train()
    assert torch.equal(saei.calls[1][0], saei.calls[0][0])
    assert log["entropy/attacked"] == log["entropy/selected"]
    assert saei.completions == plain.completions
    for name in ("loss", "reward"):
        assert log[name] == pytest.approx(plain_log[name], abs=1e-6)
    torch.testing.assert_close(saei.model.state_dict(), plain.model.state_dict(), atol=1e-5, rtol=0)


def test_several_pictures_and_gradient_accumulation(tmp_path):
    """A prompt's pictures are attacked together. One generation serves two micro-batches."""
    two = ROWS[0] | {"images": [row["images"][0] for row in ROWS]}
    options = dict(per_device_train_batch_size=G, gradient_accumulation_steps=2)
    options |= dict(max_completion_length=24)
    spied = Spied(tmp_path, rows=[two, ROWS[1]], adversarial=3, options=options)
    log = spied.train()
    assert [len(before) for (_, before, _), _ in spied.attacks] == [72, 36]  # patches
    assert [len(pixels) for pixels, _, _ in spied.calls] == [72 + 36, 3 * (72 + 36)]
    assert sum(map(len, spied.updates)) == G * (72 + 36) and len(spied.updates) == 2
    (_, before, _), after = spied.attacks[0]
    changed = (after - before).abs() > 0
    assert changed.view(2, -1).float().mean(dim=1).min() > 0.5  # of each picture
    assert log["entropy/attacked"] > log["entropy/selected"]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_other_qwens_with_checkpointing_and_lora(kind, tmp_path):
    torch.manual_seed(0)
    model, processor = families.build(kind)
    processor.tokenizer.padding_side = "left"  # as TRL sets it on one that it loads itself
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    options = dict(gradient_checkpointing=True, max_completion_length=6)
    rest = dict(adversarial=1, pgd_steps=1, processing_class=processor, peft_config=lora)
    spied = Spied(tmp_path, model=model, options=options, **rest)
    trained = [p.requires_grad for p in spied.model.parameters()]
    log = spied.train()
    assert log["entropy/attacked"] > log["entropy/selected"]
    assert any(trained) and trained == [p.requires_grad for p in spied.model.parameters()]
    assert spied.model.is_gradient_checkpointing
    spied.trainer.evaluate(dataset(ROWS[::-1]))
    assert len(spied.attacks) == 2  # those of training: evaluation sees clean pictures


# -------------------------------------------------------------------- tokens, prompt and reward


def test_no_image_or_video_token_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_saei.SaEITrainer, "train", lambda self: None)
    monkeypatch.setattr(trl_saei, "load", lambda name: dataset(ROWS))
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--max_completion_length", "3"]
    trainer = trl_saei.main(options)
    forward, model_config = trainer.model.forward, trainer.model.config
    media = [model_config.image_token_id, model_config.video_token_id]

    @functools.wraps(forward)
    def eager(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., media] = 100.0
        return output

    trainer.model.forward = eager
    ids = trainer.processing_class.tokenizer("How many pips?")["input_ids"]
    (response,), _ = trainer._generate_single_turn([ids], None, {}, 1)
    assert response and not set(response) & set(media)
    trainer.generation_config.suppress_tokens = None
    (response,), _ = trainer._generate_single_turn([ids], None, {}, 1)
    assert len(response) == 3 and set(response) <= set(media)


def test_prompt_asks_for_what_the_reward_reads(monkeypatch):
    rows = Dataset.from_list([{"problem": "<image>Find x.", "answer": "3"}])
    monkeypatch.setattr(trl_saei, "load_dataset", lambda name, split: rows)
    (message,) = trl_saei.load("some/set")["prompt"][0]
    assert message["role"] == "user"
    assert message["content"].startswith("Find x.") and "\\boxed{}" in message["content"]


def test_reward_reads_the_last_box():
    texts = ["\\boxed{3} then \\boxed{11}", "\\boxed{11} then \\boxed{3}", "11", "\\boxed{111}"]
    completions = [[{"content": text}] for text in texts]
    assert trl_saei.boxed(completions, ["11"] * 4) == [1.0, 0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------- refusals


def test_a_trl_that_generates_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", lambda self, prompts: None)
    message = r"has \['self', 'prompts'\], not .*written for trl 1.16.0, this is"
    with pytest.raises(RuntimeError, match=message):
        Spied(tmp_path)
    monkeypatch.delattr(trl.GRPOTrainer, "_generate_single_turn")
    with pytest.raises(RuntimeError, match=r"has \[\], not"):
        Spied(tmp_path)


def after_init(monkeypatch, change):
    init = trl.GRPOTrainer.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", changed)


@pytest.mark.parametrize("name", trl_saei.READ + trl_saei.REFUSED)
def test_a_trl_without_an_attribute_is_refused(name, tmp_path, monkeypatch):
    after_init(monkeypatch, lambda trainer: trainer.__dict__.pop(name, None))
    monkeypatch.delattr(trl.GRPOTrainer, name, raising=False)
    with pytest.raises(RuntimeError, match=f"GRPOTrainer has no {name}: .*trl 1.16.0"):
        Spied(tmp_path)


@pytest.mark.parametrize("name", trl_saei.REFUSED)
def test_another_way_to_generate_or_a_sharded_model_is_refused(name, tmp_path, monkeypatch):
    after_init(monkeypatch, lambda trainer: setattr(trainer, name, True))
    with pytest.raises(ValueError, match=f"no .'{name}'"):
        Spied(tmp_path)


def test_an_update_on_other_pictures_is_refused(tmp_path, monkeypatch):
    spied = Spied(tmp_path, options=dict(max_completion_length=4))
    complete = trl.GRPOTrainer._generate_and_score_completions

    def attacked(self, inputs):
        batch = complete(self, inputs)
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
    for ids in ([[1], [1], [2], [2]], [[1]] * 6):
        with pytest.raises(ValueError, match="a group is split"):
            trainer._generate_single_turn(ids, [[0]] * len(ids), {}, 4)
