"""What did the run look like? loss.png and router_load.png."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE = (11, 4)
DPI = 120


def plot_loss(records: list[dict[str, Any]], path: Path, baselines: dict[str, float]) -> None:
    """Draw training loss (nats per token) and validation bits per byte by step, beside the text's own baselines."""
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_bits_per_byte"]) for r in records if r.get("val_bits_per_byte") is not None]
    last = max((r["step"] for r in records), default=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    left.plot(*_columns(train), color="tab:blue", linewidth=1, marker="o" if len(train) < 3 else None)
    left.set(ylabel="training loss (nats per token)", title="Training")
    right.plot(*_columns(val), color="tab:orange", marker="o", markersize=4, label="model")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="gray", linestyle=style, label=f"{name} ({value:.2f})")
    right.set(ylabel="bits per byte", title="Held-out text", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        _steps_below(axes, last)
    _save(figure, path)


def plot_router_load(records: list[dict[str, Any]], path: Path) -> None:
    """Draw every sparse layer's share of slots by expert at the last step, and its max/mean over the run."""
    loads = [(r["step"], np.asarray(r["load"], float)) for r in records if r.get("load")]
    if not loads:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    _draw_shares(left, loads[-1][1])
    left.set_title(f"Share of slots at step {loads[-1][0]} (white: even)")
    ratio_SL = np.stack([load.max(-1) / np.maximum(load.mean(-1), 1e-9) for _, load in loads])
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, ratio_SL.shape[1]))
    for layer, color in enumerate(colors):
        named = len(colors) <= 12 or layer in (0, len(colors) - 1)
        label = f"layer {layer}" if named else None
        right.plot([step for step, _ in loads], ratio_SL[:, layer], label=label, linewidth=1, color=color)
    right.axhline(1.0, color="gray", linestyle="--")
    right.set(ylabel="max / mean load", title="Imbalance by sparse layer (1: even)", ylim=(0, None))
    _steps_below(right, loads[-1][0])
    right.legend(fontsize=8)
    _save(figure, path)


def _draw_shares(axes: Axes, load_LE: np.ndarray) -> None:
    """Draw a map of shares around the even one; with few experts, the numbers too."""
    share_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1)
    even = 1 / share_LE.shape[1]
    image = axes.imshow(share_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 * even, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="sparse layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
    if max(share_LE.shape) <= 16:
        for (layer, expert), value in np.ndenumerate(share_LE):
            dark = abs(value - even) > 0.7 * even
            text = f"{100 * value:.0f}%"
            axes.text(expert, layer, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    beyond = "max" if share_LE.max() > 2 * even else "neither"
    axes.figure.colorbar(image, ax=axes, format=lambda share, _: f"{100 * share:.3g}%", extend=beyond)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _steps_below(axes: Axes, last: int) -> None:
    """Give the panels of a picture the same axis of steps, from 0 to the last one."""
    axes.set(xlabel="step", xlim=(0, 1.02 * last))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    """Write a picture; the one of before stays until the new one is complete."""
    scratch = path.with_suffix(f".part{path.suffix}")
    figure.savefig(scratch, dpi=DPI)
    plt.close(figure)
    scratch.replace(path)
