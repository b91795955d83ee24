"""report.py on synthetic runs: what the page says, what it leaves out, and what it survives."""

import base64
import io
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from runtime import report


def write_run(
    folder: Path,
    intervention: str = "egas",
    steps: int = 40,
    evals=("before", "after"),
    seed: int = 0,
) -> Path:
    """A synthetic run in the formats of train_saei.py: made-up curves, pictures of four dice, made-up responses."""
    rng, attacked = random.Random(seed), intervention != "none"
    (folder / "pictures").mkdir(parents=True)
    config = {
        "model": "demo/synthetic",
        "dataset": "demo",
        "split": "shifted/train",
        "intervention": intervention,
    }
    config |= {
        "eps": 4 / 255,
        "steps": 40,
        "rollouts": 8,
        "adversarial_rollouts": 4,
        "prompts_per_step": 16,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = open(folder / "metrics.jsonl", "w")
    samples = open(folder / "samples.jsonl", "w")
    for step in range(steps):
        rise = (0.45 if attacked else 0.25) * (1 - math.exp(-step / 15))
        record = {
            "step": step,
            "reward": 0.2 + rise + rng.gauss(0, 0.05),
            "accuracy": 0.15 + rise,
            "length": 20.0,
        }
        record |= {
            "entropy/clean": 0.3 * math.exp(-step / 25) + 0.03,
            "entropy/selected": 0.4 - step / 200,
        }
        record |= {
            "zero_variance": 0.5 + rng.gauss(0, 0.05),
            "tsec/kept": 0.6 + rng.gauss(0, 0.02),
            "loss": -0.1,
        }
        record |= {
            "seconds/sample": 1.2,
            "seconds/update": 0.9 + 0.2 * rng.random(),
            "seconds/step": 2.4 + attacked,
        }
        if attacked:
            record |= {
                "accuracy/clean": 0.17 + rise + rng.gauss(0, 0.04),
                "accuracy/adversarial": 0.1 + rise,
            }
            record |= {
                "entropy/attacked": 0.47 - step / 200,
                "entropy/fresh": 0.35 * math.exp(-step / 30) + 0.05,
            }
            record |= {
                "attack/psnr": 38.2 + rng.gauss(0, 0.3),
                "attack/linf": 4 / 255,
                "seconds/attack": 0.8,
            }
        metrics.write(json.dumps(record) + "\n")

        clean = Image.new("RGB", (96, 96), "#e8ece6")
        for i in range(4):
            x, y = 12 + 44 * (i % 2), 10 + 44 * (i // 2)
            ImageDraw.Draw(clean).rounded_rectangle(
                (x, y, x + 32, y + 32), 6, fill=("red", "navy", "green", "orange")[i]
            )
        signs = np.random.default_rng(step).choice([-4, 4], (96, 96, 3))
        moved = Image.fromarray(np.clip(np.asarray(clean, int) + signs, 0, 255).astype(np.uint8))
        names = [f"pictures/{step:06d}-clean.png", f"pictures/{step:06d}-adversarial.png"]
        clean.save(folder / names[0])
        moved.save(folder / names[1])
        for i in range(8):
            adversarial = attacked and i >= 4
            tokens = ["<think>", "red", " 4", ",", " blue", " 7", ";", " 4", " +", " 7", " =", " 1", str(i), "</think>",
                      "\n", "\\boxed{", "1", str(i), "}", "<|im_end|>"]  # fmt: skip
            entropy = [round(abs(rng.gauss(0.2, 0.5)), 4) for _ in tokens]
            samples.write(json.dumps({
                "step": step, "prompt": 0, "row": 17 * step, "problem": "What is red + blue?", "answer": "11",
                "image": "adversarial" if adversarial else "clean", "response": "".join(tokens),
                "reward": 1.1 * (i % 3 == 0), "accuracy": float(i % 3 == 0), "format": 1.0, "advantage": 1.4 - 0.4 * i,
                "truncated": i == 5, "tokens": tokens, "entropy": entropy,
                "kept": None if adversarial else [0.1 < h < 0.6 for h in entropy],
                "clean_picture": names[0], "picture": names[adversarial]}) + "\n")  # fmt: skip
    metrics.close()
    samples.close()
    (folder / "eval").mkdir()
    for name in evals:
        up = 0.3 * (name == "after") * (1 if attacked else 0.4)
        splits = {}
        for i, split in enumerate(("plain/test", "shifted/test", "larger/test")):
            base = 0.5 - 0.15 * i
            splits[split] = {"n": 1000, "entropy": [0.31 - up / 2, 0.3 - up / 2, 0.32 - up / 2]}
            splits[split] |= {k: [base + up + d, base + up + d - 0.03, base + up + d + 0.03]
                              for k, d in (("greedy", 0.0), ("pass@1", 0.01), ("pass@8", 0.15))}  # fmt: skip
        result = {
            "model": "demo/synthetic",
            "seconds": 12.5,
            "n_samples": 8,
            "temperature": 1.0,
            "splits": splits,
        }
        (folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    return folder


def edit_samples(folder: Path, change) -> None:
    records = [json.loads(line) for line in open(folder / "samples.jsonl")]
    for record in records:
        change(record)
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def parse(path: Path) -> tuple[str, ElementTree.Element]:
    """The page's text and its tree; a page that escaping left unbalanced does not parse."""
    page = path.read_text(encoding="utf-8")
    return page, ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def words(tree: ElementTree.Element) -> str:
    return " ".join(" ".join(tree.itertext()).split())


def test_page_has_every_part(tmp_path):
    path = report.build_report([write_run(tmp_path / "demo")])
    assert path == tmp_path / "demo" / "report" / "index.html"
    page, tree = parse(path)
    said = words(tree)
    assert (
        "demo (SaEI): 40 steps, each of 16 prompts with 8 responses, of demo/synthetic on demo shifted/train"
        in said
    )
    assert "4 of the 8 responses come from an attacked image" in said and "by at most 4/255" in said
    assert "still going" not in said
    config = yaml.safe_load((tmp_path / "demo/config.yaml").read_text())
    (tmp_path / "demo/config.yaml").write_text(
        yaml.safe_dump(config | {"preset": "geometry3k", "split": None})
    )
    named = words(parse(report.build_report([tmp_path / "demo"]))[1])
    assert "of demo/synthetic on geometry3k . 4 of the 8" in named
    assert (
        "35.0% 32.0–38.0 65.0% 62.0–68.0 +30.0" in said
    )  # shifted/test, greedy: before, after, change
    assert "0.310 0.300–0.320 0.160 0.150–0.170 −0.150" in said  # entropy
    charts = [svg.get("aria-label") for svg in tree.iter("svg") if svg.get("role") == "img"]
    assert charts == [title for title, *_ in report.CHARTS] + ["Time per phase: demo"]
    assert "change × 16" in said and "L∞ 4/255 · PSNR 36" in said and "What is red + blue?" in said
    assert (
        said.count("From the clean image")
        == said.count("From the attacked image")
        == report.RESPONSE_STEPS
    )
    assert (
        "✗ wrong · reward 0.00 · advantage −0.60 · truncated" in said
        and "✓ right · reward 1.10" in said
    )
    assert (
        "↵<br/>" in page
        and ">·<wbr/>4</i>" in page
        and ' kept" title="0.' in page
        and "nats and more" in said
    )
    assert all(img.get("src").startswith("data:image/png;base64,") for img in tree.iter("img"))
    assert all(a.get("href").startswith("#") for a in tree.iter("a"))
    difference = next(
        img.get("src") for img in tree.iter("img") if img.get("alt").startswith("change")
    )
    shades = np.asarray(Image.open(io.BytesIO(base64.b64decode(difference.split(",")[1]))))
    assert {*np.unique(shades)} == {
        64,
        128,
        192,
    }  # -4, 0 (where 0 or 255 stops the change) and 4, times 16
    assert len(page) < 1_000_000


def test_runs_are_compared_side_by_side(tmp_path):
    folders = [
        write_run(tmp_path / "demo"),
        write_run(tmp_path / "demo-grpo", "none", steps=20, seed=1),
    ]
    page, tree = parse(report.build_report(folders))
    said = words(tree)
    assert "demo and demo-grpo" in said and "(SaEI)" in said and "(plain GRPO)" in said
    assert "+30.0" in said and "+12.0" in said
    assert "20 steps of 40 (still going, or stopped)" in said
    assert "demo-grpo : no image is changed." in said
    differing = [row[0].text for row in tree.iter("tr") if row.get("class") == "differs"]
    assert differing == ["intervention"]
    reward = next(svg for svg in tree.iter("svg") if svg.get("aria-label") == "Reward")
    assert [p.get("class") for p in reward if p.get("class", "").startswith("line")] == [
        "line r0",
        "line r1",
    ]
    accuracy = next(svg for svg in tree.iter("svg") if svg.get("aria-label") == "Accuracy")
    dashes = [p.get("stroke-dasharray") for p in accuracy if p.get("class", "").startswith("line")]
    assert dashes == [
        report.DASHES[0],
        report.DASHES[1],
        report.DASHES[0],
    ]  # the GRPO arm has no adversarial half
    assert report.build_report(folders, tmp_path / "both.html") == tmp_path / "both.html"


def test_hostile_text_is_escaped_and_the_page_stays_small(tmp_path):
    folder = write_run(tmp_path / "demo", steps=3)
    bad = (
        "<script>alert(1)</script><img src=x onerror=alert(1)> & \x00 \ud800 ]]> \u202e "
        + "A\n" * 50_000
    )

    def spoil(record):
        record |= {
            "problem": bad,
            "answer": bad,
            "response": bad,
            "tokens": list(bad),
            "entropy": [0.5] * len(bad),
        }
        record |= {"tokens": [bad], "entropy": [1.0]} if record["step"] == 0 else {}
        record |= {"entropy": []} if record["step"] == 2 else {}

    edit_samples(folder, spoil)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config | {"model": bad[:60] + "b" * 9999, "x": [bad[:60]] * 500})
    )
    page, tree = parse(report.build_report([folder, folder]))
    assert (
        not list(tree.iter("script")) and "<script" not in page and "onerror=alert(1)>" not in page
    )
    assert (
        "&lt;script&gt;alert(1)" in page
        and "script-src" not in page
        and "default-src 'none'" in page
    )
    assert f"{len(bad) - report.MAX_TOKENS:,} more tokens not shown" in page
    assert f"{len(bad) - report.MAX_TEXT:,} more characters not shown" in page
    assert len(page.encode()) < 3_000_000


def test_large_pictures_are_reduced(tmp_path):
    folder = write_run(tmp_path / "demo", steps=4)
    for path in (folder / "pictures").iterdir():
        noise = np.random.default_rng(len(path.name)).integers(
            0, 256, (600, 800, 3), dtype=np.uint8
        )
        Image.fromarray(noise).save(path, compress_level=0)
    page, tree = parse(report.build_report([folder]))
    assert (
        all(img.get("src").startswith("data:image/jpeg") for img in tree.iter("img"))
        and len(page) < 2_000_000
    )


def test_a_run_that_has_just_begun(tmp_path):
    folder = write_run(tmp_path / "demo", evals=())
    for name in ("samples.jsonl", "config.yaml"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text("")
    said = words(parse(report.build_report([folder]))[1])
    for phrase in (
        "No evaluation yet",
        "No step has finished yet",
        "No samples yet",
        "config.yaml is missing",
    ):
        assert phrase in said
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.0}\n')
    page, _ = parse(report.build_report([folder]))
    assert (
        ": 1 step" in page and 'class="line r0"' in page and 'text-anchor="end">-' not in page
    )  # an axis from 0 to 1


def test_broken_lines_are_skipped_with_a_note(tmp_path):
    folder = write_run(tmp_path / "demo", evals=("before",))
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"step": 41, "rewa')
    (folder / "eval" / "after.json").write_text('{"splits": {"plain')
    said = words(parse(report.build_report([folder]))[1])
    assert (
        "metrics.jsonl: 1 of 41 lines are not records" in said
        and "The last is half-written" in said
    )
    assert "eval/after.json cannot be read" in said
    assert ": 40 steps" in said and "50.0% 47.0–53.0 – –" in said  # no number after, no change

    (folder / "metrics.jsonl").write_text("garbage\n[1]\n" + whole.rstrip("\n"))
    said = words(parse(report.build_report([folder]))[1])
    assert (
        "2 of 42 lines are not records, the first is line 1: skipped." in said
        and "The last is" not in said
    )


def test_nan_and_missing_values_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "demo")
    records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    records[5] |= {"reward": math.nan, "loss": math.inf}
    del records[6]["seconds/attack"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    edit_samples(
        folder,
        lambda r: r.update(
            entropy=[math.nan] * len(r["tokens"]), advantage=math.nan, accuracy=None
        ),
    )
    page, tree = parse(report.build_report([folder]))
    assert "left out of the curves: loss, reward." in words(tree)
    reward = next(svg for svg in tree.iter("svg") if svg.get("aria-label") == "Reward")
    raw = next(p.get("d") for p in reward if p.get("class") == "raw r0")
    assert raw.count("M") == 2 and raw.count("L") == 37
    assert "nan" not in "".join(p.get("d") for p in tree.iter("path")) and ' title="– nats"' in page
    assert "accuracy – · reward 1.10 · advantage –" in words(tree)


def test_a_repeated_step_counts_once_and_samples_are_filtered(tmp_path):
    folder = write_run(tmp_path / "demo", steps=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "reward": 9.0}')  # whole, though the line has no end yet
    run = report.read_run(folder)
    assert (
        [r["step"] for r in run["metrics"]] == [0, 1, 2]
        and run["metrics"][2]["reward"] == 9.0
        and not run["notes"]
    )
    assert {s["step"] for s in report.read_jsonl(folder / "samples.jsonl", [], {2})} == {2}


def test_pictures_outside_the_folder_or_missing_are_left_out(tmp_path):
    folder = write_run(tmp_path / "demo")
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    outcomes = {0: "../outside.png", 39: "pictures/broken.png"}
    edit_samples(
        folder, lambda r: r.update(picture=outcomes.get(r["step"], "pictures/nowhere.png"))
    )
    page, tree = parse(report.build_report([folder]))
    said = words(tree)
    assert all(
        f"Picture {name} is left out" in said
        for name in (*outcomes.values(), "pictures/nowhere.png")
    )
    assert not [i for i in tree.iter("img")] and "no changed picture in its samples yet" in said


def test_a_token_is_escaped_shaded_and_underlined():
    assert (
        report.token(" a<b\n", 0.35, True, 1.0)
        == '<i class="e3 kept" title="0.35 nats">·<wbr/>a&lt;b↵<br/></i>'
    )
    assert report.token("x", 0.36, False, 0.7) == '<i class="e5" title="0.36 nats">x</i>'
    assert (
        report.token("x" * 99, 9.0, None, 1.0)
        == f'<i class="e9" title="9.00 nats">{"x" * report.MAX_TOKEN_CHARS}…</i>'
    )
    assert (
        report.token("\u202e\x1b", None, None, 1.0)
        == '<i class="e0" title="– nats">\ufffd\ufffd</i>'
    )


@pytest.mark.parametrize(
    "after, shown", [(0.55, "<td>+5.0</td>"), (0.57, "<td><b>+7.0</b></td>"), (0.4, "<b>−10.0</b>")]
)
def test_a_change_is_bold_where_the_intervals_do_not_overlap(after, shown):
    values = {"before": 0.5, "after": after}
    run = {
        "evals": {
            k: {"s": {"greedy": np.array([v, v - 0.03, v + 0.03])}} for k, v in values.items()
        }
    }
    assert shown in report.measure([run | {"css": "r0", "name": "demo"}], "s", "greedy")


def test_smooth_and_thin_against_a_loop():
    values = np.sin(np.arange(90) / 9.0)
    values[[3, 50]] = math.nan
    slow = [np.nanmean([v for j, v in enumerate(values) if abs(i - j) <= 3]) for i in range(90)]
    np.testing.assert_allclose(report.smooth(values), slow, rtol=1e-12)
    assert np.isnan(report.smooth(np.full(5, math.nan))).all()
    long = np.arange(10_000.0)
    assert len(report.thin(long)) == report.MAX_POINTS and report.thin(long)[[0, -1]].tolist() == [
        16.5,
        9983.0,
    ]
    assert np.isnan(report.thin([math.nan, 1.0])).tolist() == [True, False]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.31, 0.37), (-2.5, 7), (0, 12345), (38.1, 38.2), (1e-5, 2e-5)]
)
def test_ticks_enclose_the_data_with_round_steps(low, high):
    levels = report.ticks(low, high)
    assert levels[0] <= low + 1e-9 and levels[-1] >= high - 1e-9 and 3 <= len(levels) <= 7
    assert float(f"{levels[1] - levels[0]:.2g}") == pytest.approx(levels[1] - levels[0])


def test_wrong_folders_are_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        report.build_report([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no metrics\.jsonl"):
        report.build_report([tmp_path / "empty"])
    with pytest.raises(ValueError, match="at least one"):
        report.build_report([])
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"report\.py: .*no such folder"):
        report.main()
    monkeypatch.setattr("sys.argv", ["report.py", str(write_run(tmp_path / "demo"))])
    report.main()
    assert capsys.readouterr().out.strip().endswith("index.html")
