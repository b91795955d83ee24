"""--profile traces one step, the second. Parameters and metrics stay what they were."""

import json

import pytest
import torch
from test_train import comparable, metrics_of, short

import train_saei


@pytest.mark.parametrize("steps, traced", [(3, 1), (1, 0)])
def test_one_step_is_traced(tiny, tmp_path, capsys, monkeypatch, steps, traced):
    update = train_saei.update

    def marked(*arguments):  # the last argument is the step
        with torch.profiler.record_function(f"update of step {arguments[-1]}"):
            return update(*arguments)

    monkeypatch.setattr(train_saei, "update", marked)
    for name, profile in (("plain", False), ("traced", True)):
        train_saei.main(short(tiny, tmp_path / name, steps=steps, profile=profile))
    assert not (tmp_path / "plain/trace.json").exists()
    events = json.loads((tmp_path / "traced/trace.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    updates = {name for name in names if name.startswith("update of step")}
    assert updates == {f"update of step {traced}"}
    assert "aten::addmm" in names and any("Backward" in name for name in names)
    assert "Self CPU" in capsys.readouterr().out
    plain, profiled = (metrics_of(tmp_path / name) for name in ("plain", "traced"))
    assert list(map(comparable, plain)) == list(map(comparable, profiled))
