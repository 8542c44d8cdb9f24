"""Golden losses: twenty training steps of every tiny model in float64, on a stream of batches that nothing can change.

After a change that is meant to change them (an initialiser, an optimizer, a model's layers), write them anew and say
why in the commit:

    python -m tests.golden.make

It prints how far each model moved. A change that is meant to change nothing must leave losses.json as it is.
"""

import json
from pathlib import Path

import jax
import numpy as np

from tests.conftest import mesh_config, tiny_models
from tests.tiny_runs import LENGTH, MICROBATCHES, ROWS, TinyRun, initial_state, proof_model

LOSSES = Path(__file__).with_name("losses.json")
STEPS, VOCAB = 20, 64


def golden_batch(step: int) -> dict[str, np.ndarray]:
    """Draw rows in which token x is followed by 5x + 3, except where a new document begins with any other token.

    From raw PCG64 bits: numpy promises that these stay, of its distributions it does not.
    """
    shape = (MICROBATCHES, ROWS // MICROBATCHES, LENGTH + 1)
    fresh, cut = np.random.PCG64(step).random_raw(2 * np.prod(shape)).reshape(2, *shape)
    index = np.broadcast_to(np.arange(LENGTH + 1), shape)
    starts = (index == 0) | (index == 1 + cut[..., :1] % (LENGTH - 1))
    ids = np.zeros(shape, np.int32)
    ids[..., 0] = fresh[..., 0] % VOCAB
    for t in range(1, LENGTH + 1):
        # Not the row's first token: two alike would tie in expert choice, and rounding would decide.
        other = (ids[..., 0] + 1 + (fresh[..., t] % (VOCAB - 1)).astype(np.int32)) % VOCAB
        ids[..., t] = np.where(starts[..., t], other, (5 * ids[..., t - 1] + 3) % VOCAB)
    segments = np.cumsum(starts, axis=-1)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "segments": segments[..., :-1].astype(np.int32),
        "positions": positions[..., :-1].astype(np.int32),
        "weights": np.where(starts[..., 1:], 0.0, 1.0),
        "bytes": np.ones(ids[..., 1:].shape, np.int32),
    }


def train_losses(name: str) -> list[float]:
    """Train a tiny model on one device and give its losses."""
    with jax.enable_x64(True):
        run = TinyRun.of(proof_model(name), mesh_config("single"), steps=STEPS)
        trained = run.train(initial_state(proof_model(name)), [golden_batch(step) for step in range(STEPS)])
        return [float(metrics["loss"]) for metrics in trained.metrics]


def read_losses() -> dict[str, list[float]]:
    """Read the committed losses by model."""
    return json.loads(LOSSES.read_text()) if LOSSES.exists() else {}


def main() -> None:
    """Write losses.json anew."""
    before, after = read_losses(), {}
    for name in tiny_models():
        after[name] = train_losses(name)
        moved = np.abs(np.subtract(after[name], before[name])).max() if name in before else np.nan
        print(f"{name:32} {after[name][0]:.6f} -> {after[name][-1]:.6f}   moved by {moved:.1e}")
    lines = ",\n".join(f'  "{name}": {json.dumps(losses)}' for name, losses in after.items())
    LOSSES.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
