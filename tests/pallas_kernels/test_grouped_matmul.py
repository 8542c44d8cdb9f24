"""Do the grouped matmul kernels give each row its own expert's product, and let nothing of other rows in?"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.group_tiles import tile_map
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_pair
from pallas_kernels.grouped_matmul_dw import grouped_matmul_dw
from pallas_kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_bwd
from pallas_kernels.grouped_tiles import Config, default_config, place_of
from pallas_kernels.target import Declined
from tests.pallas_kernels.conftest import assert_accurate

RAGGED = (0, 1, 73, 9, 0, 17)
"""Of 110 rows: none, one, more than a warpgroup's 64, unaligned, and ten after the last run."""
ROWS = 110


def normal(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, jnp.bfloat16)


def sizes_of(sizes):
    return jnp.array(sizes, jnp.int32)


def per_expert(x_RD, w_EDF, sizes, dtype):
    """The oracle: a loop over experts, products and sums in float64, `plain` in bfloat16."""
    runs, start = [], 0
    for expert, size in enumerate(sizes):
        end = min(start + size, len(x_RD))
        runs.append(jnp.dot(x_RD[start:end].astype(dtype), w_EDF[expert].astype(dtype)))
        start = end
    return jnp.concatenate([*runs, jnp.zeros((len(x_RD) - start, w_EDF.shape[2]), dtype)])


def per_expert_dw(x_RD, dy_RF, sizes, dtype):
    dw, start = [], 0
    for size in sizes:
        end = min(start + size, len(x_RD))
        dw.append(jnp.dot(x_RD[start:end].T.astype(dtype), dy_RF[start:end].astype(dtype)))
        start = end
    return jnp.stack(dw)


def both(function, *args):
    """(plain, exact): the oracle in bfloat16, and in float64."""
    with jax.enable_x64(True):
        return function(*args, jnp.bfloat16), function(*args, jnp.float64)


def transposed(w):
    return jnp.swapaxes(w, 1, 2)


# --- the map of tiles


@pytest.mark.parametrize("rows", [8, 128])
@pytest.mark.parametrize(
    "sizes", [RAGGED, (0, 0, 0), (500,), (3, 40, 400), tuple(np.random.default_rng(0).integers(0, 3, 256).tolist())]
)
def test_tiles_cover_every_row_once_with_its_expert(sizes, rows):
    tiles_T3, (count,) = tile_map(sizes_of(sizes), 300, rows)
    owner = np.full(300, -1)
    for expert, first, size in np.asarray(tiles_T3)[: int(count)]:
        assert 0 < size <= rows and (owner[first : first + size] == -1).all()
        owner[first : first + size] = expert
    ends = np.minimum(np.cumsum(sizes), 300)
    expected = np.searchsorted(ends, np.arange(300), side="right")
    assert (owner == expected).all()
    assert count <= len(tiles_T3)


def test_every_place_is_visited_once_in_bands():
    for num_rows, num_columns, band in ((1, 1, 8), (19, 5, 8), (16, 3, 4)):
        index = jnp.arange(num_rows * num_columns)
        row, column = jax.vmap(lambda i: place_of(i, num_rows, num_columns, band))(index)  # noqa: B023
        assert len({*zip(row.tolist(), column.tolist(), strict=True)}) == num_rows * num_columns
        assert row.max() == num_rows - 1 and column.max() == num_columns - 1
        assert (row[: band * num_columns] < band).all()


def test_default_cuts_fit_in_shared_memory():
    for num_rows in (2, 64, 4096, 262_144):
        for width, parts in ((64, 1), (768, 2), (768, 1), (1408, 1), (704, 2), (14_336, 2)):
            config = default_config(num_rows, 64, width, parts)
            assert config.columns % (64 * parts) == 0
            config.check(128 * config.stages * (max(config.rows, 64) + config.columns) + config.warpgroups * 16_384)


# --- the products


@pytest.mark.parametrize(
    ("sizes", "config", "transpose_w"),
    [
        (RAGGED, Config(rows=128, columns=64, stages=2, num_sms=2), False),
        (RAGGED, Config(rows=128, columns=128, stages=3, num_sms=2, cluster=2), True),
        ((0, 140, 30), Config(rows=64, columns=192, stages=2, num_sms=1, band=1), False),  # in one, and more than R
    ],
)
def test_product_matches_a_loop_over_experts(interpreter, sizes, config, transpose_w):
    x_RD, w_EDF = normal(0, ROWS, 128), normal(1, len(sizes), 128, 192, scale=0.1)
    x_RD = x_RD.at[sum(sizes) :].set(jnp.nan)  # rows after the last run
    y_RF = grouped_matmul(
        x_RD, transposed(w_EDF) if transpose_w else w_EDF, sizes_of(sizes), transpose_w=transpose_w, config=config
    )
    assert_accurate(y_RF, *both(per_expert, x_RD, w_EDF, sizes))


def test_many_experts_with_few_rows_by_the_decode_cut(interpreter):
    sizes = [0] * 256
    for expert in (3, 77, 78, 255):
        sizes[expert] = 3
    x_RD, w_EDF = normal(0, 12, 64), normal(1, 256, 64, 64, scale=0.1)
    config = default_config(12, 256, 64)
    assert config.rows == 8
    x_RD = x_RD.at[4].set(jnp.nan)  # stays in its own row
    y_RF = grouped_matmul(x_RD, w_EDF, sizes_of(sizes), config=replace(config, num_sms=2))
    keep = np.arange(12) != 4
    plain, exact = both(per_expert, x_RD, w_EDF, sizes)
    assert_accurate(y_RF[keep], plain[keep], exact[keep])
    assert jnp.isnan(y_RF[4]).all()


def test_pair_sums_two_products(interpreter):
    a_RF, b_RF = normal(0, ROWS, 64), normal(1, ROWS, 64)
    wa_EDF, wb_EDF = normal(2, 6, 128, 64, scale=0.1), normal(3, 6, 128, 64, scale=0.1)

    def twice(dtype):
        return sum(per_expert(x, transposed(w), RAGGED, dtype) for x, w in ((a_RF, wa_EDF), (b_RF, wb_EDF)))

    config = Config(rows=128, columns=128, stages=3, num_sms=2)
    assert_accurate(grouped_matmul_pair(a_RF, b_RF, wa_EDF, wb_EDF, sizes_of(RAGGED), config=config), *both(twice))


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (RAGGED, Config(rows=128, columns=128, stages=2, num_sms=2)),
        ((90, 3, 30), Config(rows=64, columns=64, stages=3, num_sms=2, cluster=2)),  # more than R
    ],
)
def test_weight_gradient_matches_a_loop_over_experts(interpreter, sizes, config):
    x_RD, dy_RF = normal(0, ROWS, 64), normal(1, ROWS, 128)
    x_RD, dy_RF = x_RD.at[sum(sizes) :].set(jnp.nan), dy_RF.at[sum(sizes) :].set(jnp.inf)
    assert_accurate(
        grouped_matmul_dw(x_RD, dy_RF, sizes_of(sizes), config=config), *both(per_expert_dw, x_RD, dy_RF, sizes)
    )


def test_nan_of_one_expert_stays_out_of_the_others_weight_gradients(interpreter):
    sizes = (5, 20, 7, 0, 6)
    x_RD, dy_RF = normal(0, 38, 64), normal(1, 38, 64)
    x_RD, dy_RF = x_RD.at[5:25].set(jnp.nan), dy_RF.at[5:25].set(jnp.nan)
    config = Config(rows=64, columns=64, stages=2, num_sms=2)
    dw_EDF = grouped_matmul_dw(x_RD, dy_RF, sizes_of(sizes), config=config)
    others = np.array([0, 2, 3, 4])
    plain, exact = both(per_expert_dw, x_RD, dy_RF, sizes)
    assert_accurate(dw_EDF[others], plain[others], exact[others])
    assert jnp.isnan(dw_EDF[1]).all()


# --- the gated feed-forward


def swiglu_parts(x_RD, gate_EDF, up_EDF, sizes, dtype):
    gate_RF, up_RF = (per_expert(x_RD, w, sizes, dtype) for w in (gate_EDF, up_EDF))
    return jax.nn.silu(gate_RF) * up_RF, gate_RF, up_RF


@pytest.mark.parametrize("rows", [128, 16])
def test_gated_product_and_what_it_saves(interpreter, rows):
    x_RD = normal(0, ROWS, 64).at[sum(RAGGED) :].set(jnp.nan)
    gate_EDF, up_EDF = normal(1, 6, 64, 128, scale=0.2), normal(2, 6, 64, 128, scale=0.2)
    config = Config(rows=rows, columns=128, stages=2, num_sms=2)
    save = rows == 128
    outs = grouped_swiglu(x_RD, gate_EDF, up_EDF, sizes_of(RAGGED), save=save, config=config)
    plain, exact = both(swiglu_parts, x_RD, gate_EDF, up_EDF, RAGGED)
    for out, p, e in zip(outs if save else (outs,), plain, exact, strict=save):
        assert_accurate(out, p, e)


def swiglu_gradients(dy_RD, down_EFD, gate_RF, up_RF, sizes, dtype):
    dhidden_RF = per_expert(dy_RD, transposed(down_EFD), sizes, dtype)
    gate_RF, up_RF = gate_RF.astype(dtype), up_RF.astype(dtype)
    hidden_RF, vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_RF, up_RF)
    keep = jnp.arange(len(gate_RF))[:, None] < sum(sizes)
    return tuple(jnp.where(keep, out, 0) for out in (*vjp(dhidden_RF), hidden_RF))


@pytest.mark.parametrize(
    "config",
    [
        Config(rows=128, columns=192, stages=2, num_sms=2),
        Config(rows=64, columns=128, stages=3, num_sms=2, cluster=2),
    ],
)
def test_gated_gradients_and_the_recomputed_hidden(interpreter, config):
    dy_RD, down_EFD = normal(0, ROWS, 64), normal(1, 6, 192, 64, scale=0.2)
    gate_RF, up_RF = normal(2, ROWS, 192), normal(3, ROWS, 192)
    dy_RD, gate_RF, up_RF = (a.at[sum(RAGGED) :].set(jnp.nan) for a in (dy_RD, gate_RF, up_RF))
    outs = grouped_swiglu_bwd(dy_RD, down_EFD, gate_RF, up_RF, sizes_of(RAGGED), config=config)
    plain, exact = both(swiglu_gradients, dy_RD, down_EFD, gate_RF, up_RF, RAGGED)
    for out, p, e in zip(outs, plain, exact, strict=True):
        assert_accurate(out, p, e)


def test_oracles_compose_to_the_layers_gradient():
    """What the backward kernels are held to is the gradient of the forward's: by finite differences and by autodiff."""
    sizes = (2, 0, 3)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, gate, up, down, dy = (
            jnp.asarray(rng.standard_normal(s)) for s in ((6, 4), (3, 4, 2), (3, 4, 2), (3, 2, 4), (6, 4))
        )

        def layer(x, gate, up, down):
            return per_expert(swiglu_parts(x, gate, up, sizes, x.dtype)[0], down, sizes, x.dtype)

        check_grads(layer, (x, gate, up, down), order=1, modes=("rev",))
        _, gate_RF, up_RF = swiglu_parts(x, gate, up, sizes, x.dtype)
        dgate, dup, hidden = swiglu_gradients(dy, down, gate_RF, up_RF, sizes, x.dtype)
        dx = sum(per_expert(d, transposed(w), sizes, x.dtype) for d, w in ((dgate, gate), (dup, up)))
        dws = (per_expert_dw(*pair, sizes, x.dtype) for pair in ((x, dgate), (x, dup), (hidden, dy)))
        for ours, theirs in zip((dx, *dws), jax.vjp(layer, x, gate, up, down)[1](dy), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


# --- refusals


def test_what_the_kernels_cannot_take_is_declined_with_the_reason():
    x, w, sizes = normal(0, 8, 64), normal(1, 2, 64, 64), sizes_of((4, 4))
    with pytest.raises(Declined, match=r'float32.*must be bfloat16.*use implementation="xla"'):
        grouped_matmul(x.astype(jnp.float32), w.astype(jnp.float32), sizes)
    with pytest.raises(Declined, match=r'multiples of 64.*use implementation="xla"'):
        grouped_matmul(normal(0, 8, 32), normal(1, 2, 32, 64), sizes)
    with pytest.raises(Declined, match=r"contract x's 64 columns"):
        grouped_matmul(x, normal(1, 2, 128, 64), sizes)
    with pytest.raises(Declined, match=r"group_sizes.*must be int32, one of 2"):
        grouped_matmul(x, w, sizes.astype(jnp.uint8))
    with pytest.raises(Declined, match=r"rows \(0\)"):
        grouped_matmul(x[:0], w, sizes)
    with pytest.raises(Declined, match=r"bytes of shared memory.*fewer stages"):
        grouped_matmul(x, w, sizes, config=Config(stages=6))
    with pytest.raises(Declined, match=r"Config.columns \(64\) must be a multiple of 128 for 2 weights"):
        grouped_swiglu(x, w, w, sizes, config=Config(columns=64))
    with pytest.raises(Declined, match=r"x .* and dy .* equal rows"):
        grouped_matmul_dw(x, x[:4], sizes)
    with pytest.raises(Declined, match=r"gate .* must be"):
        grouped_swiglu_bwd(x, w, x[:4], x, sizes)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("num_rows", [1, 300, 70000])
def test_what_the_forward_takes_the_backward_takes(num_rows):
    """A backward pass that declines would come too late for another way."""
    for experts, dim, width in itertools.product((1, 8, 256), (64, 320, 2048), (64, 448, 14336)):
        x, dy = (jax.ShapeDtypeStruct((num_rows, dim), jnp.bfloat16) for _ in range(2))
        gate, down = (jax.ShapeDtypeStruct((experts, *d), jnp.bfloat16) for d in ((dim, width), (width, dim)))
        sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
        hidden, *saved = jax.eval_shape(functools.partial(grouped_swiglu, save=True), x, gate, gate, sizes)
        assert jax.eval_shape(grouped_matmul, hidden, down, sizes) == dy
        dgate, dup, _ = jax.eval_shape(grouped_swiglu_bwd, dy, down, *saved, sizes)
        assert jax.eval_shape(grouped_matmul_pair, dgate, dup, gate, gate, sizes) == x
        assert jax.eval_shape(functools.partial(grouped_matmul, transpose_w=True), dgate, gate, sizes) == x
        assert jax.eval_shape(grouped_matmul_dw, x, dgate, sizes) == gate
        assert jax.eval_shape(grouped_matmul_dw, hidden, dy, sizes) == down
