"""What a run's directory is: made once, never overwritten, resumed only under the config it began with."""

import dataclasses
import re
from pathlib import Path
from typing import Final

from moejax.config import load
from moejax.config.load import ConfigError
from moejax.config.run import RunConfig

MAY_CHANGE: Final = re.compile(
    r"mesh\..*|train\.(steps|log_every|eval_every|eval_batches|checkpoint_every|keep_last|max_bad_steps|tensorboard)"
    r"|data\.prefetch|model\.remat|model\.attention\.implementation"
)
"""Keys that a resumed run may change: they alter no number but the run's length."""


def prepare_out(out: Path, config: RunConfig, resume: bool) -> bool:
    """Make `out` and save config.toml in it; return whether it holds a run to go on with.

    Raise ConfigError rather than overwrite a run, mix into a directory that is none, or resume under another config.
    """
    saved = out / "config.toml"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose another --out")
    resuming = saved.is_file()
    if resuming and not resume:
        raise ConfigError(f"{out} already holds a run: add --resume to go on, or choose another --out")
    if not resuming and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no run (no config.toml): choose another --out")
    if resuming and (change := forbidden_change(load.read_run(saved), config)):
        raise ConfigError(f"cannot resume {out}: {change}")
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / "config.toml.part"
    scratch.write_text(load.dump_toml(config), encoding="utf-8")
    scratch.replace(saved)
    return resuming


def forbidden_change(saved: RunConfig, new: RunConfig) -> str | None:
    """Describe the first key that differs though a resumed run may not change it."""
    old_keys, new_keys = (load.flatten(dataclasses.asdict(config)) for config in (saved, new))
    for key in old_keys | new_keys:
        was, now = old_keys.get(key), new_keys.get(key)
        if was != now and not MAY_CHANGE.fullmatch(key):
            return f"{key} was {was!r} and is now {now!r}"
    return None
