"""What did the run look like? loss.png and router_load.png."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def plot_loss(records: list[dict[str, Any]], path: Path, baselines: dict[str, float]) -> None:
    """Draw training loss (nats per token) and validation bits per byte by step, beside the text's own baselines."""
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    val = [(r["step"], r["val_bits_per_byte"]) for r in records if r.get("val_bits_per_byte") is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if train:
        left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats per token)", title="Training")
    if val:
        right.plot(*zip(*val, strict=True), color="tab:orange", marker="o", label="model")
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=False):
        right.axhline(value, color="gray", linestyle=style, label=f"{name} {value:.2f}")
    right.set(xlabel="step", ylabel="bits per byte", title="Held-out text", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_router_load(records: list[dict[str, Any]], path: Path) -> None:
    """Draw every sparse layer's share of slots by expert at the last step, and its max/mean over the run."""
    loads = [(r["step"], np.asarray(r["load"], float)) for r in records if r.get("load")]
    if not loads:
        return
    share_LE = loads[-1][1] / np.maximum(loads[-1][1].sum(-1, keepdims=True), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    even = 1 / share_LE.shape[1]
    image = left.imshow(share_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2 * even, interpolation="nearest")
    left.set(xlabel="expert", ylabel="sparse layer", title=f"Share of slots at step {loads[-1][0]} (white: even)")
    left.set_yticks(range(len(share_LE)))
    if share_LE.shape[1] <= 16:
        left.set_xticks(range(share_LE.shape[1]))
        for (layer, expert), value in np.ndenumerate(share_LE):
            left.text(expert, layer, f"{100 * value:.0f}%", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=left)
    steps = [step for step, _ in loads]
    ratio_SL = np.stack([load.max(-1) / np.maximum(load.mean(-1), 1e-9) for _, load in loads])
    for layer in range(ratio_SL.shape[1]):
        right.plot(steps, ratio_SL[:, layer], label=f"layer {layer}", linewidth=1)
    right.axhline(1.0, color="gray", linestyle="--")
    right.set(xlabel="step", ylabel="max / mean load", title="Imbalance (1: even)", ylim=(0, None))
    right.grid(alpha=0.3)
    if ratio_SL.shape[1] <= 12:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
