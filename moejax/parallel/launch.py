"""How do many processes become one run, and what do they tell each other outside the program?

| environment | started by | the rest is known to |
|---|---|---|
| MOEJAX_COORDINATOR, MOEJAX_NUM_PROCESSES, MOEJAX_PROCESS_ID | scripts/launch_local.sh, or by hand | these three |
| OMPI_COMM_WORLD_SIZE > 1 | mpirun of Open MPI | jax; from version 5 on through mpi4py |
| SLURM_STEP_NODELIST and others, with more than one task | srun | jax: one process for each GPU |
| KUBERNETES_SERVICE_HOST and JOB_COMPLETION_INDEX | an Indexed Job or JobSet | jax, through the `kubernetes` package |

The first that is there counts; where none is, there is one process. MOEJAX_NUM_PROCESSES=1 makes it one anywhere.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moejax.parallel.plan import MeshPlan

T = TypeVar("T")

COORDINATOR: Final = "MOEJAX_COORDINATOR"
NUM_PROCESSES: Final = "MOEJAX_NUM_PROCESSES"
PROCESS_ID: Final = "MOEJAX_PROCESS_ID"
HEARTBEAT: Final = "MOEJAX_HEARTBEAT_SECONDS"

HEARTBEAT_SECONDS: Final = 60
"""A process that is silent for so long is dead: jax then ends the others, at once and without an exception."""

JOIN_SECONDS: Final = 300
"""How long a process looks for the others at the start."""

PATIENCE_SECONDS: Final = 15
"""When it says so."""

SLURM: Final = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What jax's own detection wants to see; a batch script outside of srun has not all of them."""

_A_WEEK: Final = 7 * 24 * 3600 * 1000  # in ms: longer than any corpus takes; a death ends the wait by the heartbeat


@dataclass(frozen=True)
class Launch:
    """Who started this process among others, and what jax.distributed.initialize has to be told of it."""

    by: str
    arguments: Mapping[str, Any]
    heartbeat_seconds: int = HEARTBEAT_SECONDS


def detect(environment: Mapping[str, str]) -> Launch | None:
    """Read the environment: None for a single process; raise ValueError where it contradicts itself."""
    heartbeat = _count(environment, HEARTBEAT, 1) if environment.get(HEARTBEAT) else HEARTBEAT_SECONDS
    if environment.get(NUM_PROCESSES) == "1":
        return None
    if any(environment.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)):
        return Launch(COORDINATOR, _explicit(environment), heartbeat)
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        # Up to version 4 the launcher leaves its address in the environment; from 5 on only MPI itself knows it.
        method = None if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
        return Launch("Open MPI", {"cluster_detection_method": method}, heartbeat)
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1))
    if all(name in environment for name in SLURM) and int(tasks) > 1:
        return Launch("Slurm", {}, heartbeat)
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Launch("Kubernetes", {}, heartbeat)
    return None


def start() -> None:
    """Join the other processes that the environment names, before jax touches a device; alone, do nothing.

    Raise ValueError where they are not found.
    """
    launch = detect(os.environ)
    if launch is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loop
    waiting = threading.Timer(PATIENCE_SECONDS, _tell_of_waiting, (launch,))  # where jax gives up, it aborts
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **launch.arguments,
            heartbeat_timeout_seconds=launch.heartbeat_seconds,
            initialization_timeout=JOIN_SECONDS,
        )
    except (RuntimeError, ValueError, TypeError, ImportError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"cannot join the other processes, as {launch.by} in the environment says ({type(error).__name__}: "
            f"{reason}): {_HINTS.get(launch.by, '')}set {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}, or "
            f"{NUM_PROCESSES}=1 for a single process"
        ) from error
    finally:
        waiting.cancel()


def _tell_of_waiting(launch: Launch) -> None:
    where = launch.arguments.get("coordinator_address", "process 0")
    print(
        f"waiting for {where} and the other processes (known from {launch.by} in the environment); "
        f"after {JOIN_SECONDS} s jax ends this one",
        file=sys.stderr,
        flush=True,
    )


_HINTS: Final = {
    "Open MPI": "install mpi4py, or ",
    "Kubernetes": "install jax[k8s] and make it an Indexed Job with a headless service, or ",
}


def is_first() -> bool:
    """Say whether this is process 0, which alone prints and writes."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print on process 0."""
    if is_first():
        print(text, flush=True)


def from_first(name: str, make: Callable[[], T]) -> T:
    """Call `make` on process 0 alone and give what it gave, which must be JSON, on all; they go on together.

    Where it raises, all raise: process 0 the error itself, the others ValueError with its words. A name is used once.
    """
    if jax.process_count() == 1:
        return make()
    client, key = _coordination(), f"moejax/{name}"
    if is_first():
        try:
            value = make()
        except BaseException as error:
            client.key_value_set(key, json.dumps({"error": f"{error}" or type(error).__name__}))
            raise
        client.key_value_set(key, json.dumps({"value": value}))
        meet(name)
        return value
    told = json.loads(client.blocking_key_value_get(key, _A_WEEK))
    if "error" in told:
        raise ValueError(f"process 0 stopped: {told['error']}")
    meet(name)
    return told["value"]


def meet(name: str) -> None:
    """Wait until all processes are here; a name is used once."""
    if jax.process_count() > 1:
        _coordination().wait_at_barrier(f"moejax/{name}", _A_WEEK)


def together(name: str, program: Any) -> Callable[..., Any]:
    """Give a jitted program whose first call waits until all processes have compiled it; alone, give it back.

    Where one has the program in its cache, it would wait for the others in its first collective, and gloo gives up
    after 30 s (jax issue 40831).
    """
    if jax.process_count() == 1:
        return program

    ready: list[bool] = []

    def call(*arguments: Any) -> Any:
        if not ready:
            program.lower(*arguments).compile()
            meet(name)
            ready.append(True)
        return program(*arguments)

    return call


class AnyProcess:
    """Tells all processes whether one of them has something to say; every process must ask equally often."""

    def __init__(self, plan: MeshPlan) -> None:
        self._each = plan.place(PartitionSpec(plan.mesh.axis_names))
        self._size = plan.mesh.size
        self._any = jax.jit(jnp.any, out_shardings=plan.place(PartitionSpec()))

    def __call__(self, flag: bool) -> jax.Array:
        """Start to ask; the answer is the same everywhere, and comes after what was given to the devices before."""
        return self._any(jax.make_array_from_callback((self._size,), self._each, lambda _: np.full(1, flag)))


def _coordination() -> Any:
    """Give the service that the processes found each other by; jax has no public way to pass words through it."""
    from jax._src import distributed

    return distributed.global_state.client


def _explicit(environment: Mapping[str, str]) -> dict[str, Any]:
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    if missing := [name for name in names if not environment.get(name)]:
        there = ", ".join(f"{name} ({environment[name]})" for name in names if name not in missing)
        raise ValueError(f"{' and '.join(missing)} must be set beside {there}: set all three, or none")
    coordinator = environment[COORDINATOR]
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(f"{COORDINATOR} ({coordinator}) must be HOST:PORT, where process 0 is to listen")
    total, index = _count(environment, NUM_PROCESSES, 1), _count(environment, PROCESS_ID, 0)
    if index >= total:
        raise ValueError(f"{PROCESS_ID} ({index}) must be less than {NUM_PROCESSES} ({total}): count from 0")
    return {
        "coordinator_address": coordinator,
        "num_processes": total,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _count(environment: Mapping[str, str], name: str, least: int) -> int:
    value = environment[name]
    if not value.isdigit() or int(value) < least:
        raise ValueError(f"{name} ({value}) must be a whole number, at least {least}")
    return int(value)
