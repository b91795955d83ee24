"""--profile: one step, the second, is traced; the parameters and the metrics stay what they were."""

import json

import torch
from test_train import comparable, metrics_of, short

import train_saei


def test_the_second_step_is_traced(tiny, tmp_path, capsys, monkeypatch):
    updates, update = [], train_saei.update

    def marked(*arguments):
        updates.append(arguments[-1])
        with torch.profiler.record_function(f"update of step {updates[-1]}"):
            return update(*arguments)

    monkeypatch.setattr(train_saei, "update", marked)
    train_saei.main(short(tiny, tmp_path / "plain", steps=3))
    assert not (tmp_path / "plain/trace.json").exists()
    train_saei.main(short(tiny, tmp_path / "traced", steps=3, profile=True))
    trace = json.loads((tmp_path / "traced/trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace if "name" in event}
    assert {name for name in names if name.startswith("update of step")} == {"update of step 1"}
    assert "aten::addmm" in names and any("Backward" in name for name in names)
    printed = capsys.readouterr().out
    assert "Self CPU" in printed and "aten::" in printed
    same = [list(map(comparable, metrics_of(tmp_path / name))) for name in ("plain", "traced")]
    assert updates == [0, 1, 2, 0, 1, 2] and same[0] == same[1]


def test_a_run_of_one_step_is_traced_too(tiny, tmp_path):
    train_saei.main(short(tiny, tmp_path, steps=1, profile=True))
    assert (tmp_path / "trace.json").exists()
