"""Bars of the GPU suite: tokens a second of each model and optimizer, plain and with everything on."""

from pathlib import Path
from typing import Any

from harness.figures import pyplot, save


def draw_rates(content: dict[str, Any], path: Path) -> str:
    """Draw the training steps of a suite's result, if it has any; says in a line what came of it."""
    parts = [part for part in content["parts"] if part["part"].startswith("train_step") and part["found"]]
    if not parts:
        return "no training steps: no figure of them"
    try:
        plt = pyplot()
    except ImportError as error:
        return f"no figures: {error}; install matplotlib and start this again"
    figure, axes = plt.subplots(1, len(parts), figsize=(1 + 4 * len(parts), 4), squeeze=False, layout="constrained")
    for axis, part in zip(axes[0], parts, strict=True):
        rates = part["found"]["rates"]
        for index, variant in enumerate(("plain", "all")):
            heights = [rate[variant] / 1e3 for rate in rates.values()]
            places = [place + 0.4 * index for place in range(len(rates))]
            bars = axis.bar(places, heights, width=0.38, label=f"compiled, {variant if index == 0 else 'all on'}")
            axis.bar_label(bars, fmt="%.4g", fontsize=8)
        axis.set_xticks([place + 0.2 for place in range(len(rates))], list(rates))
        axis.set_title(part["part"].removeprefix("train_step_"), fontsize=10)
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("thousand tokens/s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(content["device"], fontsize=9)
    save(figure, path)
    return f"-> {path}"
