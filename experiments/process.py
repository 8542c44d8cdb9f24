"""How does an experiment's process start, and how does it end? Its devices, its peers, its errors, its exit code."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from pydantic import ValidationError

from moejax.config import load
from moejax.config.load import ConfigError

OUR_CODE: Final = tuple(str(Path(__file__).parents[1] / package) for package in ("moejax", "experiments"))
PEER_WORDS: Final = ("Gloo", "NCCL", "coordination", "UNAVAILABLE", "heartbeat", "preempted")
"""What jax's errors say when a collective lost its other side."""

DRIVER: Final = Path("/proc/driver/nvidia/version")
"""There where an NVIDIA GPU can be used."""

LOST_PEER: Final = 3
"""Exit code of a process that is blameless: starting again may help."""

SECONDS_FOR_LAST_WORDS: Final = 2
"""How long process 0 outlives its own failure."""


def use_cpu(num_devices: int | None = None) -> None:
    """Make jax run on the CPU, cut into `num_devices` if given; call before jax first touches a device."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if num_devices is not None:
        if num_devices < 1:
            raise ConfigError(f"--fake-devices ({num_devices}) must be at least 1")
        count = "--xla_force_host_platform_device_count"
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"{count}={num_devices}"])
    if (jax := sys.modules.get("jax")) is not None:  # imported already: it read the environment then
        jax.config.update("jax_platforms", "cpu")


def keep_freed_memory() -> None:
    """Let malloc keep what is freed instead of giving it back to the system.

    XLA:CPU takes every large buffer from malloc; fresh pages each step made memory-bound loops 4 to 6 times slower.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no mallopt
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        for parameter in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


def cuts_the_cpu() -> bool:
    """Say whether jax will see the CPU as several devices."""
    found = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return found is not None and int(found[1]) > 1


def setup_jax(keep_programs: bool | None = None) -> None:
    """Set the process up: its peers, malloc, and compiled programs kept in $MOEJAX_CACHE or ~/.cache/moejax/xla.

    By default programs are not kept where the CPU is cut into devices: one that XLA:CPU reads back (jaxlib 0.10.2,
    0.11.2) may start its collectives in another order on each device, which then wait for one another for ever.
    """
    import jax

    from moejax.parallel import launch, overlap

    if not DRIVER.exists():  # jax's CUDA plugin may be here to compile for other machines: let it not miss CUDA
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if DRIVER.exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
        os.environ["XLA_FLAGS"] = overlap.flags(os.environ.get("XLA_FLAGS", ""))  # heard when jax looks for devices
    launch.start()
    keep_freed_memory()
    if keep_programs is None:
        keep_programs = not cuts_the_cpu()
    if not keep_programs:
        return
    cache = Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax" / "xla")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a read-only home costs time, not correctness
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Call an experiment's main and give its exit code: what a user did wrong is one line, and 2.

    Mistakes of programmers keep their traceback; MOEJAX_DEBUG=1 shows every traceback. One of many processes that
    fails does not come back from here: a usual exit waits for the others, who may be waiting for it.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        message = None if os.environ.get("MOEJAX_DEBUG") == "1" else user_message(error)
        if message is None and not _has_peers():
            raise
        if message is None:
            traceback.print_exc()
        else:
            print(f"error: {message}", file=sys.stderr)
        code = 1 if message is None else LOST_PEER if _is_lost_peer(error) else 2
    if _has_peers():
        _leave(code)
    return code


def _is_lost_peer(error: Exception) -> bool:
    """Say whether a collective failed because another process is gone; most often jax ends this one before."""
    return _has_peers() and type(error).__name__ == "JaxRuntimeError" and any(word in str(error) for word in PEER_WORDS)


def _leave(code: int) -> NoReturn:
    """End now, and let the others end too."""
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:  # jax aborts those that lose it, before they can say anything themselves
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that saw the others end would cut it short
        time.sleep(SECONDS_FOR_LAST_WORDS)
    os._exit(code)


def _has_peers() -> bool:
    """Say whether this is one of many processes; ask nothing of a jax that has not been started."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def user_message(error: Exception) -> str | None:
    """Give the line that a user should read, or None for what a programmer broke.

    A ValueError is the user's if our own code raised it on purpose, and a programmer's if it came out of a library.
    """
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"out of device memory; lower train.global_batch, or raise train.microbatches: {_first_line(error)}"
    if _is_lost_peer(error):
        return f"lost another process of this run; start all of them again with --resume: {_first_line(error)}"
    if isinstance(error, (OSError, FloatingPointError)):
        return str(error)
    if isinstance(error, ValidationError):
        return load.explain(error)
    if isinstance(error, ValueError):
        *_, innermost = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ConfigError) or innermost.filename.startswith(OUR_CODE):
            return str(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
