"""What do our kernels cost on an H200 that is not here? The catalogue's `compiled` rows, compiled for one.

No spills, no more shared memory than a block may have, wgmma where there are products, registers handed over as asked
(no C7504), and memory beside inputs and outputs as the algorithm implies. Rows of much the same code are slow tests.
"""

import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import jax
import pytest

from experiments.kernels import compiled, runner, sweep
from experiments.kernels.case import Case
from moejax.accounting.kernels import h200_mesh
from moejax.accounting.target import missing_plugins

pytestmark = pytest.mark.skipif(missing_plugins() is not None, reason=str(missing_plugins()))

QUICK = {
    "attention: forward and backward causal S=4096 D=128 heads 64/8 [mosaic]",
    "attention: forward causal window=1024 6 documents S=4096 D=128 heads 64/8 [mosaic]",
    "decode: paged B=32 T=4 S=4096 heads 32/8 D=128 pages of 64 [mosaic]",
    "decode: latent B=32 T=1 S=4096 heads 128/1 D=576 pages of 64 [mosaic]",
    "fused: RMSNorm backward 8192x8192 [mosaic]",
    "fused: linear cross-entropy forward 8192x4096x131072 [mosaic]",
    "lightning: backward 1x65536 heads 32 D=128 [mosaic]",
    "moe: whole decode layer d=2048 n=768 E=128 k=8 T=32 uniform [mosaic]",
}
MEBIBYTE = 2**20


def rows() -> Iterator[Any]:
    cases = [case for family in sweep.FAMILIES for case in sweep.cases_of(family, dry=False) if case.compiled]
    named = {f"{c.family}: {c.name} [{way}]": (c, way) for c in cases for way in runner.OURS if way in c.ways}
    assert named.keys() >= QUICK, f"no such rows: {QUICK - named.keys()}"
    for name, (case, way) in named.items():
        yield pytest.param(case, way, id=name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.fixture(scope="module")
def apart() -> Iterator[Executor]:
    """A process that has compiled nothing: a kernel compiled before is not reported again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("case", "way"), list(rows()))
def test_kernels_compile_well(case: Case, way: str, apart: Executor):
    lines = apart.submit(compiled.compile_row, case.family, case.name, way).result()
    assert not [rule for line in lines for rule in line.breaches], lines
    assert all(line.report or line.note == compiled.KNOWN for line in lines), lines
    used, most = max(line.temporaries for line in lines), most_temporaries(case)
    assert used <= most, f"{used / MEBIBYTE:,.1f} MiB of temporaries, not {most / MEBIBYTE:,.1f}"


@pytest.mark.parametrize("family", sweep.FAMILIES)
def test_what_kernels_are_compared_with_holds_none(family: str):
    """A reference that takes "auto" would be the kernel itself, on the very chip where they are compared."""
    with jax.sharding.use_abstract_mesh(h200_mesh().abstract_mesh):
        for case in sweep.cases_of(family, dry=False):
            if case.compiled:
                inputs = jax.eval_shape(case.make, jax.random.key(0))
                for way in set(runner.REFERENCES) & set(case.ways):
                    text = str(jax.make_jaxpr(case.ways[way])(*inputs))
                    assert "custom_vmap_call" not in text and "mpmd_map" not in text, f"{case.name}: {way}"


def most_temporaries(case: Case) -> float:
    """Bytes that the row's algorithm may keep beside inputs and outputs, and 2 MiB for maps of tiles and the like."""
    inputs = jax.eval_shape(case.make, jax.random.key(0))
    return {"attention": attention, "decode": decode, "fused": fused, "lightning": lightning, "moe": moe}[case.family](
        case.name, inputs
    ) + 2 * MEBIBYTE


def attention(name: str, inputs: Any) -> float:
    """A float32 a row, the log-sum-exp; backward another one, the product of output and gradient.

    Where the length is not whole tiles of 8, padded copies of q, k, v and o, backward of do and a gradient too.
    """
    q, backward = inputs[0], "backward" in name
    copies = (6 if backward else 4) * 1.01 * 2 * q.size if q.shape[1] % 8 else 0
    return 4 * math.prod(q.shape[:3]) * (2 if backward else 1) + copies


def decode(name: str, inputs: Any) -> float:
    """The splits' results in float32, of 128 keys each or of 1024 latents, and the log-sum-exps' lines."""
    q, length = inputs[0], int(re.search(r"S=(\d+)", name)[1])
    values, split = (512, 1024) if "latent" in name else (q.shape[-1], 128)
    return 4 * math.prod(q.shape[:3]) * (values + 8) * length / split


def fused(name: str, inputs: Any) -> float:
    """A fiftieth of the logits; of a norm, two blocks' parts of the scale's gradient for each multiprocessor."""
    (rows, dim), second = inputs[0].shape, inputs[1].shape
    return 4 * rows * second[-1] / 50 if "entropy" in name else 4 * 2 * 132 * dim


def lightning(name: str, inputs: Any) -> float:
    """A state for every sequence and every 4096 tokens."""
    batch, length, heads, dim = inputs[0].shape
    return 4 * heads * dim**2 * (batch + batch * length / 4096)


def moe(name: str, inputs: Any) -> float:
    """Rows as the experts see them, [d] once and [n] three times; half as much more for what a whole layer moves.

    Moves alone keep indices; E times the rows is what nothing may hold.
    """
    d, n, k, tokens = (int(re.search(rf"\b{letter}=(\d+)", name)[1]) for letter in "dnkT")
    if name.startswith(("gather", "combine")):
        return 16 * tokens * k
    return (1.5 if "whole" in name else 1) * 2 * tokens * k * (d + 3 * n)
