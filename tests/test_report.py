"""runtime/report.py on synthetic runs: what the page says, what it leaves out, what it survives."""

import base64
import io
import json
import math
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import eval as evaluation
from runtime import report

TOKENS = ["<think>", "red", " 4", "</think>", "\n", "\\boxed{", "1", "}", "<|im_end|>"]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_run(folder: Path, intervention="egas", steps=40, evaluations=("before", "after")) -> Path:
    """A run in the formats of train_saei.py and eval.py, with invented numbers and pictures."""
    rng, attacked = random.Random(0), intervention != "none"
    for name in ("pictures", "eval"):
        (folder / name).mkdir(parents=True)
    config = {"model": "demo/synthetic", "dataset": "demo", "split": "shifted/train", "steps": 40}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"intervention": intervention}))
    metrics, samples = [], []
    for step in range(steps):
        record = {"step": step, "reward": 0.2 + step / 100, "accuracy": 0.3, "length": 20.0}
        record |= {"entropy/clean": 0.3, "entropy/selected": 0.4 - step / 200, "loss": -0.1}
        record |= {"zero_variance": 0.5 + rng.gauss(0, 0.05), "seconds/step": 2.4}
        if attacked:
            record |= {"accuracy/clean": 0.2, "accuracy/adversarial": 0.1, "attack/psnr": 38.2}
            record |= {"entropy/attacked": 0.47 - step / 200, "entropy/adversarial": 0.35}
        metrics.append(record)
        clean = np.full((96, 96, 3), (232, 236, 230), np.uint8)
        clean[20:60, 20:60] = (255, 0, 0)
        signs = np.random.default_rng(step).choice([-4, 4], clean.shape)
        names = [f"pictures/{step}-clean.png", f"pictures/{step}-adversarial.png"]
        Image.fromarray(clean).save(folder / names[0])
        moved = np.clip(clean + signs, 0, 255).astype(np.uint8)
        Image.fromarray(moved).save(folder / names[1])
        for i in range(8):
            adversarial = attacked and i >= 4
            sample = {"step": step, "prompt": 0, "problem": "What is red + blue?", "answer": "11"}
            sample |= {"image": "adversarial" if adversarial else "clean", "truncated": i == 5}
            sample |= {"reward": 1.1 * (i % 3 == 0), "accuracy": float(i % 3 == 0)}
            sample |= {"advantage": 1.4 - 0.4 * i, "tokens": TOKENS, "response": "".join(TOKENS)}
            sample |= {"entropy": [round(abs(rng.gauss(0.2, 0.5)), 4) for _ in TOKENS]}
            sample["kept"] = None if adversarial else [0.1 < h < 0.6 for h in sample["entropy"]]
            samples.append(sample | {"clean_picture": names[0], "picture": names[adversarial]})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    for name in evaluations:
        up = (0.3 if attacked else 0.12) * (name == "after")
        write_evaluation(folder, name, share=0.35 + up)
    return folder


def write_evaluation(
    folder: Path, name: str, share: float, n=100, record_changes=None, **changes
) -> None:
    """eval/NAME.json and .jsonl as eval.py writes them: the first `share` of problems are right."""
    records = []
    for split in ("shifted/test", "plain/test"):
        for row in range(n):
            right = float(row < round(share * n))
            record = {"problem": f"Problem {row}", "answer": "1", "row": row, "greedy_right": right}
            record |= {"right": [right, 0.0, 0.0, 0.0], "entropy": 0.5 - right / 5}
            records.append(record | {"truncated": 0.0, "split": split} | (record_changes or {}))
    cfg = evaluation.EvalArgs(samples=4, k=[1, 4])
    result = {"dataset": "demo", "temperature": 1.0, "n_samples": 4, "splits": {}} | changes
    for split in ("shifted/test", "plain/test"):
        found = [record for record in records if record["split"] == split]
        result["splits"][split] = evaluation.summarise(found, cfg)
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / f"eval/{name}.json").write_text(json.dumps(result))
    write_lines(folder / f"eval/{name}.jsonl", records)


def edit_samples(folder: Path, change) -> None:
    records = read_lines(folder / "samples.jsonl")
    for record in records:
        change(record)
    write_lines(folder / "samples.jsonl", records)


def build(*folders: Path) -> tuple[str, ElementTree.Element, str]:
    """The page, its tree (a page that escaping left unbalanced does not parse) and its words."""
    page = report.build_report(folders).read_text(encoding="utf-8")
    tree = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    return page, tree, " ".join(" ".join(tree.itertext()).split())


def chart_of(tree: ElementTree.Element, title: str) -> list[ElementTree.Element]:
    """The bold lines of a chart."""
    svg = next(svg for svg in tree.iter("svg") if svg.get("aria-label") == title)
    return [path for path in svg if path.get("class", "").startswith("line")]


def test_page_has_every_part(tmp_path):
    page, tree, said = build(write_run(tmp_path / "demo"))
    assert (tmp_path / "demo/report/index.html").read_text() == page and len(page) < 500_000
    for phrase in (
        "demo (SaEI): 40 steps. Model demo/synthetic, data demo shifted/train.",
        "shifted/test 100 problems",
        "greedy, % pass@1, % pass@4, % entropy, nats per token truncated, %",
        "demo before 35.0 [26.4, 44.8] 8.8 [7.0, 13.6]",
        "demo after 65.0 [55.2, 73.6] 16.2 [14.4, 20.7]",
        "demo change +30.0 points [+20.4, +38.5] +7.5 points [+4.4, +10.3]",
        "−0.060 nats [−0.078, −0.042] +0.0 points [−1.9, +1.9]",
        "What is red + blue? Gold answer: 11",
        "attacked image: L∞ 4/255, PSNR 36.",
        "From the attacked image 3 of 4 responses",
        "✗ wrong · reward 0.00 · advantage −0.60 · truncated",
        "✓ right · reward 1.10",
    ):
        assert phrase.replace(" ", "") in said.replace(" ", ""), phrase
    titles = [svg.get("aria-label") for svg in tree.iter("svg")]
    assert titles == ["shifted/test", "plain/test", *(title for title, *_ in report.CHARTS)]
    assert said.count("From the clean image") == report.MAX_STEPS
    pictures = {img.get("alt").split(":")[0]: img.get("src") for img in tree.iter("img")}
    assert len(pictures) == 3
    assert all(source.startswith("data:image/png;base64,") for source in pictures.values())
    difference = base64.b64decode(pictures["change × 16, grey is none"].split(",")[1])
    # -4, 0 (where 0 or 255 stops the change) and 4, times 16
    assert {*np.unique(np.asarray(Image.open(io.BytesIO(difference))))} == {64, 128, 192}


def test_two_runs_on_one_page(tmp_path):
    folders = [write_run(tmp_path / "demo"), write_run(tmp_path / "demo-grpo", "none", steps=20)]
    _, tree, said = build(*folders)
    assert "demo and demo-grpo" in said and "(plain GRPO): 20 steps of 40 (still going" in said
    assert "demo change +30.0" in said and "demo-grpo change +12.0" in said
    assert "demo minus demo-grpo after +18.0 points [" in said
    differing = [row[0].text for row in tree.iter("tr") if row.get("class") == "differs"]
    assert differing == ["intervention"]
    assert [path.get("class") for path in chart_of(tree, "Reward")] == ["line r0", "line r1"]
    dashes = [path.get("stroke-dasharray") for path in chart_of(tree, "Accuracy")]
    assert dashes == ["", "5 4", ""]  # plain GRPO has no changed image
    assert report.build_report(folders, tmp_path / "both.html") == tmp_path / "both.html"


def test_hostile_text_is_escaped_and_the_page_stays_small(tmp_path):
    folder = write_run(tmp_path / "demo", steps=3)
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)> & \x00 \ud800 ]]> \u202e "
    bad += "A\n" * 50_000

    def spoil(record):
        record |= {"problem": bad, "answer": bad, "response": bad}
        tokens, entropy = {0: ([bad], [1.0]), 2: (list(bad), [])}.get(
            record["step"], (list(bad), [0.5] * len(bad))
        )
        record |= {"tokens": tokens, "entropy": entropy}

    edit_samples(folder, spoil)
    for path in (folder / "pictures").iterdir():
        noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=0)
    config = {"model": bad[:60] + "b" * 9999, "x": [bad[:60]] * 500, "steps": bad[:60]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page, tree, _ = build(folder, folder)
    assert not list(tree.iter("script")) and "onerror=alert(1)>" not in page
    assert "&lt;script&gt;alert(1)" in page and "default-src 'none'" in page
    assert f"{len(bad) - report.MAX_TOKENS:,} more tokens not shown" in page
    assert f"{len(bad) - report.MAX_TEXT:,} more characters not shown" in page
    assert all(img.get("src").startswith("data:image/jpeg") for img in tree.iter("img"))
    assert len(page.encode()) < 3_000_000


def test_a_run_that_has_just_begun(tmp_path):
    folder = write_run(tmp_path / "demo", evaluations=())
    for name in ("samples.jsonl", "config.yaml"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.0}\n')
    page, tree, said = build(folder)
    assert ": 1 step" in said and len(chart_of(tree, "Reward")) == 1
    for phrase in ("No evaluation yet", "No samples yet", "config.yaml is missing"):
        assert phrase in said
    assert 'text-anchor="end">-' not in page  # an axis from 0 to 1


def test_broken_files_are_skipped_with_a_note(tmp_path):
    folder = write_run(tmp_path / "demo", evaluations=("before",))
    whole = (folder / "metrics.jsonl").read_text()
    # the first line broken, a step twice, the last line incomplete
    repeated = '{"step": 2, "reward": 9.0}\n'
    (folder / "metrics.jsonl").write_text("[1]\n" + whole + repeated + '{"step": 41, "rewa')
    (folder / "eval/after.json").write_text('{"splits": {"plain')
    said = build(folder)[2]
    assert "metrics.jsonl: skipped 2 of 43 lines" in said and "the first is line 1." in said
    assert "The last line is incomplete" in said and "eval/after.json cannot be read" in said
    assert ": 40 steps" in said and "demo before 35.0" in said
    assert "demo after" not in said and "change +" not in said and "points" not in said
    assert report.read_run(folder)["metrics"][2]["reward"] == 9.0


def test_values_and_pictures_that_cannot_be_used_are_left_out(tmp_path):
    folder = write_run(tmp_path / "demo")
    records = read_lines(folder / "metrics.jsonl")
    records[5] |= {"reward": math.nan, "loss": math.inf}
    write_lines(folder / "metrics.jsonl", records)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "pictures/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    names = {0: "../outside.png", 39: "pictures/broken.png"}

    def spoil(record):
        name = names.get(record["step"], "pictures/nowhere.png")
        record |= {"picture": name, "clean_picture": name, "advantage": math.nan, "accuracy": None}
        record |= {"entropy": [math.nan] * len(TOKENS)}

    edit_samples(folder, spoil)
    page, tree, said = build(folder)
    assert "left out of the curves: loss, reward." in said
    assert chart_of(tree, "Reward")[0].get("d").count("L") == 39
    assert "nan" not in "".join(path.get("d") for path in tree.iter("path"))
    assert ' title="– nats"' in page and "accuracy – · reward 1.10 · advantage –" in said
    for name in (*names.values(), "pictures/nowhere.png"):
        assert f"Picture {name} is left out" in said
    assert not list(tree.iter("img"))


@pytest.mark.parametrize(
    "value, entropy, kept, scale, shown",
    [
        (" a<b\n", 0.35, True, 1.0, ("e3 kept", "0.35", "·<wbr/>a&lt;b↵<br/>")),
        ("x", 0.36, False, 0.7, ("e5", "0.36", "x")),
        ("x" * 99, 9.0, None, 1.0, ("e9", "9.00", "x" * report.MAX_TOKEN_CHARS + "…")),
        ("\u202e\x1b", None, None, 1.0, ("e0", "–", "\ufffd\ufffd")),
    ],
)
def test_a_token_is_escaped_shaded_and_framed(value, entropy, kept, scale, shown):
    css, nats, body = shown
    found = report.token(value, entropy, kept, scale)
    assert found == f'<i class="{css}" title="{nats} nats">{body}</i>'


def test_smooth_and_thin_against_a_loop():
    values = np.sin(np.arange(90) / 9.0)
    values[[3, 50]] = math.nan
    slow = [np.nanmean([v for j, v in enumerate(values) if abs(i - j) <= 3]) for i in range(90)]
    np.testing.assert_allclose(report.smooth(values), slow, rtol=1e-12)
    long = report.thin(np.arange(10_000.0))
    assert len(long) == report.MAX_POINTS and long[[0, -1]].tolist() == [16.5, 9983.0]
    assert np.isnan(report.thin([math.nan, 1.0])).tolist() == [True, False]


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.37), (-2.5, 7), (0, 12345), (1e-5, 2e-5)])
def test_ticks_enclose_the_data_with_round_steps(low, high):
    levels = report.ticks(low, high)
    assert levels[0] <= low + 1e-9 and levels[-1] >= high - 1e-9 and 3 <= len(levels) <= 7
    assert float(f"{levels[1] - levels[0]:.2g}") == pytest.approx(levels[1] - levels[0])


def test_a_difference_is_over_the_problems_of_both(tmp_path):
    """40 problems, 14 of them right, then the first 8, all right: no "+65"."""
    folder = write_run(tmp_path / "demo", evaluations=())
    write_evaluation(folder, "before", 0.35, n=40)
    write_evaluation(folder, "after", 1.0, n=8)
    page, _, said = build(folder)
    assert "before: 40 problems, after: 8 problems" in said and "+65" not in said
    assert "demo after 100.0 [62.2, 100.0]" in said
    label = "demo change on the 8 problems of both"
    assert f"{label} +0.0 points [−19.6, +19.6] +0.0 points" in said
    assert "<b>+" not in page


NONE = "the evaluations share no problem"


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda eval: (eval / "after.jsonl").unlink(), "the .jsonl file beside eval/*.json"),
        (lambda eval: write_evaluation(eval.parent, "after", 0.6, dataset="x"), NONE),
        (lambda eval: write_evaluation(eval.parent, "after", 0.6, temperature=0.5), NONE),
        (
            lambda eval: write_evaluation(
                eval.parent, "after", 0.6, record_changes={"problem": "Another"}
            ),
            NONE,
        ),
    ],
)
def test_without_shared_problems_there_is_no_difference(tmp_path, spoil, reason):
    runs = [write_run(tmp_path / "demo", steps=2), write_run(tmp_path / "demo-grpo", "none", 2)]
    spoil(runs[0] / "eval")
    page, tree, said = build(*runs)
    assert f"No demo change: {reason}" in said
    assert f"No demo minus demo-grpo after: {reason}" in said
    changes = [row for row in tree.iter("tr") if row.get("class") == "change"]
    assert len(changes) == 2 and all("demo-grpo" in row[0][0].text for row in changes)


def test_paired_differences_against_a_loop():
    rng = np.random.default_rng(0)
    new, old = (
        {f"{i}": {"greedy": float(x), "entropy": float(x)} for i, x in enumerate(rng.random(n))}
        for n in (30, 50)
    )
    expected = np.mean([new[f"{i}"]["greedy"] - old[f"{i}"]["greedy"] for i in range(30)])
    for key in ("greedy", "entropy"):
        middle, low, high = report.paired(key, new, old)
        assert middle == pytest.approx(expected) and low < middle < high
    assert np.isnan(report.paired("greedy", {"1": new["1"]}, old)[1:]).all()  # one problem


@pytest.mark.parametrize(
    "key, numbers, shown",
    [
        ("greedy", (0.07, 0.01, 0.13), "<b>+7.0\u00a0points</b><br/><small>[+1.0, +13.0]</small>"),
        ("greedy", (-0.1, -0.2, -0.1), "<b>−10.0\u00a0points</b>"),
        ("greedy", (0.05, -0.01, 0.11), "<td>+5.0\u00a0points<br/>"),
        ("entropy", (-0.02, -0.03, -0.01), "<b>−0.020\u00a0nats</b>"),
        ("entropy", (-0.02, math.nan, math.nan), "<td>−0.020\u00a0nats</td>"),
    ],
)
def test_a_change_is_bold_where_its_interval_excludes_0(key, numbers, shown):
    assert shown in report.value_cell(key, numbers, change=True)


def test_an_interval_of_length_0_is_computed_anew(tmp_path):
    folder = write_run(tmp_path / "demo", steps=2, evaluations=())
    (folder / "eval/after.json").write_text(
        json.dumps({"splits": {"test": {"n": 8, "greedy": [1.0, 1.0, 1.0]}}})
    )
    assert "demo after 100.0 [62.2, 100.0]" in build(folder)[2]


def test_the_dot_plot_has_a_scale_and_the_shares_on_it(tmp_path):
    folder = write_run(tmp_path / "demo", steps=2)
    _, tree, _ = build(folder)
    svg = next(svg for svg in tree.iter("svg") if svg.get("aria-label") == "plain/test")
    labels = {mark.text: mark for mark in svg.iter("text")}
    assert [k for k in labels if k.endswith("%")] == ["0%", "25%", "50%", "75%", "100%"]
    left, right = (float(labels[k].get("x")) for k in ("0%", "100%"))
    greedy = [100 * (float(c.get("cx")) - left) / (right - left) for c in svg.iter("circle")][:2]
    assert greedy == pytest.approx([35, 65], abs=0.1)
    assert [c.get("class") for c in svg.iter("circle")] == ["ring", "dot"] * 3


def test_a_page_explains_and_draws_only_what_the_run_has(tmp_path):
    """Plain GRPO: no TsEC, no dashed lines, no frames, no smoothing of a few steps."""
    folder = write_run(tmp_path / "demo-grpo", "none", steps=5)
    edit_samples(folder, lambda record: record.update(tokens=["a", "b"], entropy=[0.1, 0.2]))
    page, tree, said = build(folder)
    titles = [svg.get("aria-label") for svg in tree.iter("svg")]
    assert "Reward" in titles and not any("TsEC" in t or "PSNR" in t for t in titles)
    for phrase in ("dashed", "Framed", "Bold:", "Faint", "↵", "· is a space", "start at 0"):
        assert phrase not in said, phrase
    assert ' kept"' not in page and "Shade: entropy" in said
    folder = write_run(tmp_path / "demo", steps=40)
    page, tree, said = build(folder)
    for phrase in ("Framed : kept by TsEC", "Bold:", "↵ is a newline", "· is a space"):
        assert phrase in said, phrase
    assert said.count("solid: clean image, dashed: attacked image") == 3
    assert said.count("The vertical axis does not start at 0") == 1  # PSNR


@pytest.mark.parametrize("count, wide", [(1, 1), (4, 4), (5, 2), (6, 0), (7, 4), (8, 2)])
def test_every_row_of_charts_is_full(count, wide, monkeypatch):
    monkeypatch.setattr(report, "CHARTS", report.CHARTS[:1] * count)
    run = {"metrics": [{"step": 0, "reward": 1.0}], "css": "r0", "label": "a", "attacks": True}
    drawn = report.curves([run])
    assert drawn.count('class="card half"') == wide and drawn.count("<figure") == count
    assert (count - wide) % 3 == 0 and wide % 2 == 0 or count == 1


@pytest.mark.parametrize(
    "answer, shown",
    [
        ("<2>", "Gold answer: <b>&lt;2&gt;</b>"),
        (["2", "two"], "Gold answer: <b>2</b> or <b>two</b>"),
        (["x"] * 11, " or <b>x</b> or 3 more"),
        (None, "Gold answer: <b>None</b>"),
    ],
)
def test_the_gold_answer_is_labelled(answer, shown):
    assert report.gold(answer).endswith(shown)


FAULTS = {  # files of the folder -> what is said
    "nowhere": (None, "no such folder"),
    "empty": ({}, "the folder is empty"),
    "other": ({"a.txt": ""}, "no run is in this folder"),
    "begun": ({"config.yaml": "steps: 3"}, "a run was begun here, but no step has finished yet"),
    "no-step": ({"metrics.jsonl": ""}, "no step has finished yet"),
    "cut": ({"metrics.jsonl": '{"step": 0, "rewa'}, "skipped 1 of 1 lines"),
    "older": ({"metrics.jsonl": '{"step": 0, "mean_reward": 1}\n'}, "found: mean_reward"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_drawn_is_one_line(name, tmp_path, monkeypatch, capsys):
    files, said = FAULTS[name]
    if files is not None:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and said in line
    assert not (tmp_path / name / "report").exists()


def test_a_folder_inside_a_run_names_the_run(tmp_path):
    folder = write_run(tmp_path / "demo", steps=2)
    with pytest.raises(ValueError, match=rf"pictures: .*is {folder}"):
        report.build_report([folder / "pictures"])
    with pytest.raises(ValueError, match=f"holds runs. Give one: {folder}"):
        report.build_report([tmp_path])
    with pytest.raises(ValueError, match="config.yaml is a file"):
        report.build_report([folder / "config.yaml"])
    with pytest.raises(ValueError, match="at least one"):
        report.build_report([])


def test_metrics_that_are_missing_are_named(tmp_path):
    folder = write_run(tmp_path / "demo", steps=3)
    records = [
        {"step": r["step"], "reward": r["reward"]} for r in read_lines(folder / "metrics.jsonl")
    ]
    write_lines(folder / "metrics.jsonl", records)
    assert "metrics.jsonl has no accuracy, entropy/clean, zero_variance" in build(folder)[2]


def test_evaluations_alone_have_a_page(tmp_path):
    write_evaluation(tmp_path / "demo", "before", 0.5)
    said = build(tmp_path / "demo")[2]
    assert "demo before 50.0" in said and "No step has finished yet" in said


def test_the_command_needs_neither_study_nor_matplotlib(tmp_path):
    folder = write_run(tmp_path / "demo", steps=2)
    code = "import sys; sys.modules['matplotlib'] = None; sys.modules['study'] = None\n"
    code += "sys.argv = ['report', sys.argv[1]]; from runtime import report; report.main()"
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(report.__file__).resolve().parent.parent
    printed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(folder / "report/index.html")
