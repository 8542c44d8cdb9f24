"""On the chip: every row of every family of kernels, tiny and middling, by the accuracy rule, and twice the same.

scripts/gpu_check.sh runs it: MOEJAX_GPU_CHECK names the file in which each test writes how it ended (what passed is not
run again, what never came back is not tried again), MOEJAX_GPU_SECONDS says when to begin no further test, and
MOEJAX_GPU_DRY lets the tiny rows go through Mosaic's interpreter instead, to try the script without a GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kernels import runner, sweep
from experiments.kernels.case import Case
from experiments.kernels.machine import on_gpu
from pallas_kernels.target import Declined
from tests.pallas_kernels.conftest import assert_accurate

pytestmark = pytest.mark.gpu

DRY = bool(os.environ.get("MOEJAX_GPU_DRY"))
MOST_FLOPS, MOST_BYTES = 1e12, 1e9
"""of a middling row: its float32 reference takes memory and time too"""


def rows() -> Iterator[Any]:
    """Yield every row and way of ours; a family that is not there is no failure here."""
    for family in sweep.FAMILIES:
        for dry in (True, False)[: 1 if DRY else 2]:
            with contextlib.suppress(ValueError, ImportError):
                for case in sweep.cases_of(family, dry):
                    if dry or (case.flops <= MOST_FLOPS and case.bytes <= MOST_BYTES):
                        for way in (name for name in runner.OURS if name in case.ways):
                            size = "tiny" if dry else "real"
                            yield pytest.param(case, way, id=f"{family} {size} {case.name} {way}")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> sweep.Results:
    path = os.environ.get("MOEJAX_GPU_CHECK")
    return sweep.Results(Path(path) if path else tmp_path_factory.mktemp("gpu") / "numerics.jsonl")


@pytest.fixture(scope="session")
def deadline() -> sweep.Deadline:
    seconds = os.environ.get("MOEJAX_GPU_SECONDS")
    return sweep.Deadline(float(seconds) if seconds else None)


@pytest.mark.parametrize(("case", "way"), list(rows()))
def test_kernel_is_accurate_on_the_chip(
    case: Case, way: str, results: sweep.Results, deadline: sweep.Deadline, request: pytest.FixtureRequest
):
    if not (DRY or on_gpu()):
        pytest.skip("no NVIDIA GPU here")
    name = request.node.callspec.id
    if name in results.rows:
        pytest.skip("passed, or declined, in an earlier run")
    if name in results.dead:
        pytest.fail(str(results.dead[name]))
    if not deadline.allows_another():
        pytest.skip("no time left: run it again with what this run wrote")
    reference = next((case.ways[each] for each in runner.REFERENCES if each in case.ways), None)
    if reference is None:
        pytest.skip("the row has no reference of its own")
    with deadline.piece(), sweep.watched(results, name, way):
        try:
            error = check(case, way, reference)
        except Declined as reason:
            results.add(row={"name": name, "declined": str(reason)})
            pytest.skip(f"declined: {reason}")
        except Exception as error:
            if runner.is_fatal(error):  # whatever follows in this process would fail too
                results.add(died=[name, runner.in_a_line(error)])
                os._exit(sweep.AGAIN)
            results.add(failed=[name, runner.in_a_line(error)])  # it fails again in every run
            raise
    results.add(row={"name": name, "error": error})


def check(case: Case, way: str, reference: Any) -> float:
    """Hold a way to the accuracy rule, leaf by leaf, and its second call to its first, bit by bit.

    Gives the largest relative error of a leaf, in the norm.
    """
    inputs = jax.jit(case.make)(jax.random.key(17))
    with runner.interpreter() if DRY and way == "mosaic" else contextlib.nullcontext():
        kernel = jax.jit(case.ways[way])
        # One after the other: two kernels at once in the interpreter can wait for each other's threads for ever.
        out, again = (jax.block_until_ready(kernel(*inputs)) for _ in range(2))
    plain = jax.jit(reference)(*inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(reference)(*wide)
    narrow = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(inputs))
    for found, second, near, right in zip(*map(jax.tree.leaves, (out, again, plain, exact)), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(second), err_msg="two calls differ: a race")
        if not jnp.issubdtype(right.dtype, jnp.floating):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(right))
        elif narrow:  # float32 results of bfloat16 inputs are as good as bfloat16 allows
            assert_accurate(found.astype(jnp.bfloat16), near.astype(jnp.bfloat16), right)
        else:
            assert_accurate(found, near, right)
    leaves = zip(*map(jax.tree.leaves, (out, exact)), strict=True)
    return max(float(runner.relative_error(found, right)) for found, right in leaves)
