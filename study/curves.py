"""Draw the main arms' training curves: docs/study.svg, the setting shifted over steps, and
docs/paid.svg, the setting paid over CPU minutes.

    pip install -r requirements-dev.txt    # matplotlib
    python -m study.curves

A line is the mean over seeds; its band reaches from the lowest seed to the highest. All steps of a
run count as equally long.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study import tables

ROOT = Path(__file__).resolve().parent.parent
PANELS = {  # metric -> title
    "accuracy/clean": "Training accuracy, clean images",
    "entropy/clean": "Entropy of the responses, nats per token",
    "zero_variance": "Groups with equal accuracies, share",
}
COLOURS = ("#0b66b0", "#11805f", "#8a6d00", "#9a4c95", "#4a5560", "#cb4b16")


# Of paid: the arms that have SaEI's CPU time, and random signs.
PAID_ARMS = ("plain-time", "plain-rollouts", "random", "noise-time", "saei-was", "saei")


def draw(runs: tables.Runs, names: tuple[str, ...], over: str) -> Figure:
    """A panel per metric, a line per arm. over: "step" or "CPU minutes" """
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    arms = {arm: list(runs[arm].values()) for arm in names if arm in runs}
    for axes, (metric, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for (arm, results), colour in zip(arms.items(), COLOURS, strict=False):
            curves = []  # (seeds, points); plain GRPO has clean images alone
            for result in results:
                found = result["curves"]
                curves.append(found.get(metric, found.get(metric.removesuffix("/clean"))))
            x = np.array(results[0]["curves"]["step"])
            if over == "CPU minutes":
                x = np.mean(tables.minutes_of(runs[arm])) * x / results[0]["steps"]
            axes.plot(x, np.mean(curves, axis=0), color=colour, label=tables.ARMS[arm])
            low, high = np.min(curves, axis=0), np.max(curves, axis=0)
            axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(over)
        axes.grid(color="#e4e1da")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def main() -> None:
    # text as text, and the same file from the same results
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "saei", "font.size": 9}
    results = tables.load(ROOT / "study/results")
    shifted, paid = tables.good(results["shifted"]), tables.good(results["paid"])
    figures = {
        "study": draw(shifted, tables.MAIN, "step"),
        "paid": draw(paid, PAID_ARMS, "CPU minutes"),
    }
    for name, figure in figures.items():
        figure.savefig(ROOT / f"docs/{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
