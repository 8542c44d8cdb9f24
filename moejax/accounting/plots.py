"""What is in a device's memory? memory.png: one stacked bar for each layout, the chip's capacity as a line."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moejax.accounting.memory import MemoryEstimate

COLORS = {
    "params": "tab:blue",
    "gradients": "tab:orange",
    "optimizer": "tab:green",
    "activations": "tab:red",
    "workspace": "tab:purple",
}
NAMES = {
    "params": "weights",
    "optimizer": "optimizer state",
    "activations": "kept activations",
    "workspace": "work space",
}


def plot_memory(bars: Sequence[tuple[str, MemoryEstimate]], capacity: float, title: str, path: Path) -> None:
    """Draw the bars from the first, at the top, down."""
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.45 * len(bars)), layout="constrained")
    place, left = np.arange(len(bars)), np.zeros(len(bars))
    for kind, color in COLORS.items():
        size = np.array([getattr(memory, kind) for _, memory in bars]) / 1e9
        axes.barh(place, size, left=left, color=color, label=NAMES.get(kind, kind))
        left += size
    for y, total in zip(place, left, strict=True):
        axes.text(total, float(y), f" {total:.3g}", va="center", fontsize=8)
    axes.axvline(capacity / 1e9, color="black", linestyle="--", label="capacity")
    axes.set(
        xlabel="GB on one device at the peak of a step", title=title, xlim=(0, 1.1 * max(capacity / 1e9, left.max()))
    )
    axes.set_yticks(place, [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
