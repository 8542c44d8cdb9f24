"""Where does a run's story go? metrics.jsonl always, a progress bar or greppable lines, TensorBoard on request."""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moejax.moe.stats import imbalance
from moejax.parallel import launch


class MetricsWriter:
    """Writes records to OUT/metrics.jsonl and shows them: a bar on a terminal, else one line each."""

    def __init__(self, out: Path, start: int, steps: int, tensorboard: bool = False) -> None:
        """Open the log to append from step `start`; records of later steps (of a run that died) are cut off."""
        self.path = out / "metrics.jsonl"
        self._board = _tensorboard(out, start) if tensorboard else None
        _cut(self.path, start)
        self._file = self.path.open("ab", buffering=0)  # a record is on disk, or raises here and not at closing
        self._bar = _bar(start, steps) if sys.stdout.isatty() and sys.stderr.isatty() else None

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; NaN and infinity are written as null, as JSON wants. Raise OSError if the disk is full."""
        line = (json.dumps(finite(record)) + "\n").encode()
        try:
            while line:  # on a disk that fills up, the first write may take a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, record["step"])
        shown = " ".join(f"{key}={show(value)}" for key, value in record.items() if not isinstance(value, list))
        if self._bar is None:
            print(shown, flush=True)
        elif "val_loss" in record:
            self._bar.write(shown)
        else:
            self._bar.set_postfix_str(_short(record))

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        print(text, flush=True) if self._bar is None else self._bar.write(text)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


class Mute:
    """Stands where process 0 has its MetricsWriter, and writes nothing."""

    def write(self, record: dict[str, Any]) -> None:
        """Drop a record."""

    def advance(self, step: int) -> None:
        """Have no bar to move."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Have nothing open."""


def open_writer(out: Path, start: int, steps: int, tensorboard: bool) -> MetricsWriter | Mute:
    """Give process 0 the run's writer, and others a mute one."""
    return MetricsWriter(out, start, steps, tensorboard) if launch.is_first() else Mute()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Read a run's records; a last line that was cut short by a crash or a full disk is left out."""
    path = out / "metrics.jsonl"
    return list(_records(path.read_text())) if path.exists() else []


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity by None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def _records(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _cut(path: Path, start: int) -> None:
    """Drop the records after step `start`, and lines cut short; the old file stays until the new one is written."""
    if not path.exists():
        return
    text = path.read_text()
    kept = "".join(json.dumps(record) + "\n" for record in _records(text) if record["step"] <= start)
    if kept != text:
        scratch = path.with_suffix(".part")
        scratch.write_text(kept)
        scratch.replace(path)


def _bar(start: int, steps: int) -> tqdm:
    layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=steps, initial=start, dynamic_ncols=True, bar_format=layout)
    bar.set_postfix_str("compiling the first step")
    return bar


def _tensorboard(out: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("train.tensorboard needs an extra package: pip install -e '.[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)


def show(value: Any) -> str:
    """Write a number short: four significant digits, counts whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(record: dict[str, Any]) -> str:
    """Choose what fits beside the bar, the most telling first: a narrow terminal cuts the rest off."""
    keys = {"loss": "loss", "tokens_per_s_per_device": "tokens/s", "lr": "lr", "grad_norm": "grad"}
    keys |= {"load_imbalance": "imbalance", "dropped_pct": "dropped%", "mfu": "mfu"}
    return " ".join(f"{name}={_tidy(record[key])}" for key, name in keys.items() if key in record)


def _tidy(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def step_record(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Turn a step's fetched metrics into a flat record; the load of every sparse layer as nested lists."""
    record: dict[str, Any] = {"step": step}
    record |= {key: float(metrics[key]) for key in ("loss", "aux", "mtp", "grad_norm", "lr") if key in metrics}
    router = metrics["router"]
    if router is not None:
        record |= {name: float(np.mean(value)) for name, value in router.losses.items()}
        load_LE = np.asarray(router.load_E)
        record["router_entropy"] = float(np.mean(router.entropy))
        record["dropped_pct"] = float(100 * np.sum(router.dropped) / max(load_LE.sum(), 1))
        record["load_imbalance"] = float(np.max(np.asarray(imbalance(jnp.asarray(load_LE)))))
    record["skipped"] = int(metrics["skipped"])
    return record


def device_memory() -> float:
    """Give the peak bytes on the first local device; on a CPU, the process's peak resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
