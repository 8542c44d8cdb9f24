"""Where does a run's story go? metrics.jsonl always, a progress bar or greppable lines, TensorBoard on request."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moejax.moe.stats import imbalance


class MetricsWriter:
    """Writes records to OUT/metrics.jsonl and shows them: a bar on a terminal, else one line each."""

    def __init__(self, out: Path, start: int, steps: int, tensorboard: bool = False) -> None:
        """Open the log to append from step `start`; records of later steps (of a run that died) are cut off."""
        self.path = out / "metrics.jsonl"
        _cut(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._board = _tensorboard(out) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; NaN and infinity are written as null, as JSON wants."""
        clean = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, record["step"])
        line = " ".join(f"{key}={show(value)}" for key, value in record.items() if not isinstance(value, list))
        if self._bar is None:
            print(line, flush=True)
        elif "val_loss" in record:
            self._bar.write(line)
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


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Read a run's records."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _cut(path: Path, start: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))


def _tensorboard(out: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("train.tensorboard needs an extra package: pip install -e '.[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(value: Any) -> str:
    """Write a number short: four significant digits, counts whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(record: dict[str, Any]) -> str:
    keys = ("loss", "aux", "grad_norm", "lr", "tokens_per_s_per_device", "mfu", "dropped_pct", "load_imbalance")
    return " ".join(f"{key}={show(record[key])}" for key in keys if key in record)


def step_record(step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Turn a step's fetched metrics into a flat record; the load of every sparse layer as nested lists."""
    record: dict[str, Any] = {"step": step}
    record |= {key: float(metrics[key]) for key in ("loss", "aux", "grad_norm", "lr")}
    router = metrics["router"]
    if router is not None:
        record |= {name: float(np.mean(value)) for name, value in router.losses.items()}
        load_LE = np.asarray(router.load_E)
        record["router_entropy"] = float(np.mean(router.entropy))
        record["dropped_pct"] = float(100 * np.sum(router.dropped) / max(load_LE.sum(), 1))
        record["load_imbalance"] = float(np.max(np.asarray(imbalance(load_LE))))
    record["skipped"] = int(metrics["skipped"])
    return record


def device_memory() -> float:
    """Give the peak bytes on the first local device; on a CPU, the process's peak resident memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
