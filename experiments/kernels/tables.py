"""What do the rows say? A line for each row and way, the summary that comes last, and the roofline picture."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.kernels.runner import Row, fastest, floor_seconds, own_ways, seconds_of

Ceilings = Mapping[str, Any]
COLORS = {"attention": "tab:blue", "decode": "tab:orange", "moe": "tab:green", "fused": "tab:red"}


def show_row(row: Row, ceilings: Ceilings) -> Iterator[str]:
    """Yield a row's lines: its name, then a line for each way."""
    against = f"; compared with {row['against']}" if row.get("against") else "; compared with nobody"
    yield f"{row['family']}: {row['name']}{against}" + (f"; target {row['target']}" if row["target"] else "")
    if "failed" in row:
        yield f"  !! {row['failed']}"
    for name, found in row["ways"].items():
        yield f"  {name:24} {_way(row, name, found, ceilings)}"


def _way(row: Row, name: str, found: Mapping[str, Any], ceilings: Ceilings) -> str:
    if "wrong" in found:
        return f"WRONG  {found['wrong']}"
    if "skipped" in found:
        return f"--  {found['skipped']}"
    error = "" if found.get("error") is None else f"error {found['error']:.1e}"
    if seconds_of(row, name) is None:
        return f"not measured  {error}"
    spread = f"({found['p20'] * 1e6:.1f} to {found['p80'] * 1e6:.1f})"
    counted = f"{found['kernels']} kernels" if found.get("kernels") else found["clock"]
    return f"{found['median'] * 1e6:10.1f} us {spread:22} {_rates(row, name, ceilings)}  {counted}  {error}"


def _rates(row: Row, name: str, ceilings: Ceilings) -> str:
    seconds = seconds_of(row, name) or float("nan")
    floor = floor_seconds(row, ceilings)
    share = f"{100 * floor / seconds:4.0f} %" if floor else "   -  "
    return f"{row['flops'] / seconds / 1e12:7.1f} TFLOP/s {row['bytes'] / seconds / 1e12:6.2f} TB/s {share}"


def summary(rows: Iterable[Row], ceilings: Ceilings) -> Iterator[str]:
    """Yield one line for each row: our fastest way, its rates, and how it stands to the best peer."""
    yield f"{'row':64} {'ours':8} {'us':>10}  {'rates, share of the measured ceiling':36} {'x best peer':20} target"
    for row in rows:
        ours, peer = fastest(row, ours=True), fastest(row, ours=False)
        title = f"{row['family']}: {row['name']}"[:64]
        if ours is None:
            yield f"{title:64} {_why_none(row)}"
            continue
        name, seconds = ours
        ratio = f"{peer[1] / seconds:5.2f} {peer[0]}" if peer else "  -   no peer ran"
        yield (
            f"{title:64} {name:8} {seconds * 1e6:10.1f}  {_rates(row, name, ceilings):36} {ratio:20} {row['target']}"
        )


def _why_none(row: Row) -> str:
    if "failed" in row:
        return f"FAILED {row['failed']}"
    ours = {name: row["ways"][name] for name in own_ways(row)}
    said = [f"{name} WRONG {found['wrong']}" for name, found in ours.items() if "wrong" in found]
    said += [f"{name} -- {found['skipped']}" for name, found in ours.items() if "skipped" in found]
    said += [f"{name} right, not measured" for name, found in ours.items() if not {"wrong", "skipped"} & set(found)]
    return "; ".join(said) or "no way of ours"


def plot_roofline(rows: Sequence[Row], ceilings: Ceilings, device: str, path: Path) -> None:
    """Draw what each row's fastest way of ours and best peer achieve over the arithmetic intensity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(10, 6.5), layout="constrained")
    drawn = False
    for row in rows:
        if not row["flops"] or not row["bytes"]:
            continue
        for ours, marker in ((True, "o"), (False, "x")):
            if (best := fastest(row, ours)) is not None:
                color = COLORS.get(row["family"], "tab:purple")
                axes.plot(row["flops"] / row["bytes"], row["flops"] / best[1] / 1e12, marker, color=color, alpha=0.8)
                drawn = True
    if ceilings.get("matmul_flops"):
        intensity = np.geomspace(0.1, 1e5, 200)
        for kind, style in (("copy", "-"), ("read", "--")):
            limit = np.minimum(ceilings["matmul_flops"], intensity * ceilings[f"{kind}_bandwidth"]) / 1e12
            rate = ceilings[f"{kind}_bandwidth"] / 1e12
            axes.plot(intensity, limit, style, color="black", label=f"{kind} {rate:.2f} TB/s, measured")
    for family, color in {**COLORS, "other": "tab:purple"}.items():
        axes.plot([], [], "s", color=color, label=family if family != "other" else "lightning and others")
    axes.plot([], [], "o", color="gray", label="ours")
    axes.plot([], [], "x", color="gray", label="best peer")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.set(xlim=(0.1, 1e5), ylim=(0.1, 2e3))
    axes.set_title(f"Kernels under the measured ceilings, {device}" if drawn else f"Nothing was measured ({device})")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
