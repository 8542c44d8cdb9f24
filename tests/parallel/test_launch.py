"""Who says that there are many processes, what is jax told, and what does a mistake sound like? Starts no process."""

import time

import jax
import numpy as np
import pytest
from jax._src.clusters import SlurmCluster
from jax._src.clusters.ompi_cluster import OmpiCluster

from experiments import cli
from moejax.parallel import launch
from moejax.parallel.plan import MeshPlan
from tests.conftest import mesh_config

OURS = {"MOEJAX_COORDINATOR": "node1:1234", "MOEJAX_NUM_PROCESSES": "2", "MOEJAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI_4 = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MOEJAX_HEARTBEAT_SECONDS": "20"},
        {"MOEJAX_NUM_PROCESSES": "1"},
        dict.fromkeys(OURS, ""),
        SLURM | {"MOEJAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process_is_left_alone(environment):
    assert launch.detect(environment) is None


@pytest.mark.parametrize(
    ("environment", "by", "method"),
    [
        (OURS, "MOEJAX_COORDINATOR", "deactivate"),
        (OURS | SLURM, "MOEJAX_COORDINATOR", "deactivate"),
        (SLURM, "Slurm", None),
        (SLURM | OPEN_MPI_4, "Open MPI", None),
        (OPEN_MPI, "Open MPI", "mpi4py"),
        (KUBERNETES, "Kubernetes", None),
    ],
)
def test_who_started_the_processes(environment, by, method):
    found = launch.detect(environment)
    assert found is not None
    assert (found.by, found.arguments.get("cluster_detection_method")) == (by, method)
    assert found.heartbeat_seconds == 60


def test_jax_is_told_what_the_environment_says():
    found = launch.detect(OURS | {"MOEJAX_HEARTBEAT_SECONDS": "7"})
    assert found is not None
    assert found.arguments == {
        "coordinator_address": "node1:1234",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }
    assert found.heartbeat_seconds == 7


def test_jax_finds_the_rest_itself_where_we_say_so(monkeypatch: pytest.MonkeyPatch):
    for name, value in (SLURM | OPEN_MPI_4).items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present() and OmpiCluster.is_env_present()
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (16, 9)
    assert SlurmCluster.get_coordinator_address(None, None).startswith("node01:")
    assert SlurmCluster.get_local_process_id() == 1, "one process for each GPU: scripts/slurm.sbatch starts it so"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MOEJAX_PROCESS_ID": ""}, "MOEJAX_PROCESS_ID must be set beside MOEJAX_COORDINATOR (node1:1234), MOEJAX_NUM"),
        ({"MOEJAX_PROCESS_ID": "2"}, "MOEJAX_PROCESS_ID (2) must be less than MOEJAX_NUM_PROCESSES (2): count from 0"),
        ({"MOEJAX_PROCESS_ID": "-1"}, "MOEJAX_PROCESS_ID (-1) must be a whole number, at least 0"),
        ({"MOEJAX_NUM_PROCESSES": "two"}, "MOEJAX_NUM_PROCESSES (two) must be a whole number, at least 1"),
        ({"MOEJAX_COORDINATOR": "node1"}, "MOEJAX_COORDINATOR (node1) must be HOST:PORT"),
        ({"MOEJAX_HEARTBEAT_SECONDS": "0"}, "MOEJAX_HEARTBEAT_SECONDS (0) must be a whole number, at least 1"),
    ],
)
def test_a_contradiction_names_variable_value_and_rule(change, message):
    with pytest.raises(ValueError) as error:
        launch.detect(OURS | change)
    assert message in str(error.value)


def test_nothing_is_started_for_a_single_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    launch.start()


@pytest.mark.parametrize(
    ("environment", "hint"),
    [(OURS, "set MOEJAX_"), (OPEN_MPI, "install mpi4py"), (KUBERNETES, "install jax[k8s]")],
)
def test_peers_that_are_not_found_are_one_line(environment, hint, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(**arguments):
        assert (arguments["heartbeat_timeout_seconds"], arguments["initialization_timeout"]) == (60, 300)
        raise RuntimeError("DEADLINE_EXCEEDED: nobody\nis there")

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    before = jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
    try:
        assert cli.run(lambda argv: launch.start(), []) == 2
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: cannot join the other processes, as ")
    assert "DEADLINE_EXCEEDED: nobody is there" in error and hint in error


def test_a_long_wait_says_for_whom(monkeypatch: pytest.MonkeyPatch, capsys):
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: time.sleep(0.2))
    before = jax.config.jax_enable_preemption_service  # type: ignore[attr-defined]
    try:
        launch.start()
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    assert capsys.readouterr().err == (
        "waiting for node1:1234 and the other processes (known from MOEJAX_COORDINATOR in the environment); "
        "after 300 s jax ends this one\n"
    )


def test_alone_the_first_process_decides_and_speaks(capsys):
    assert launch.is_first()
    assert launch.from_first("test", lambda: [1, "a"]) == [1, "a"]
    assert launch.from_first("test", lambda: None) is None, "no name is taken where there is nobody to tell"
    launch.say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_any_process_is_heard_on_all_devices():
    ask = launch.AnyProcess(MeshPlan.from_config(mesh_config("tensor4_data2")))
    for flag in (False, True):
        answer = ask(flag)
        assert answer.sharding.is_fully_replicated
        np.testing.assert_array_equal(answer, flag)
