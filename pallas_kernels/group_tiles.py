"""Which rows of which expert is a tile? XLA cuts sorted runs of rows into tiles that begin where the runs begin."""

import jax
import jax.numpy as jnp

Array = jax.Array


def group_ends(group_sizes_E: Array, num_rows: int) -> Array:
    """Give the row after each expert's last, none beyond `num_rows`; a reduction, where a cumsum is several kernels."""
    expert_E = jnp.arange(group_sizes_E.shape[0])
    up_to_EE = jnp.where(expert_E[:, None] >= expert_E, group_sizes_E, 0)
    return jnp.minimum(up_to_EE.sum(1, dtype=jnp.int32), num_rows)


def num_tiles(num_experts: int, num_rows: int, rows: int) -> int:
    """Bound the tiles: every group may end in one that is not full, and no tile is empty."""
    return min(num_rows, num_rows // rows + num_experts + 1)


def tile_map(group_sizes_E: Array, num_rows: int, rows: int) -> tuple[Array, Array]:
    """Cut every expert's run into tiles of `rows` rows: int32 (expert, first row, rows) of each, and their number.

    The rows after the last run belong to expert E; a tile too many has no rows.
    """
    num_experts = group_sizes_E.shape[0]
    end_G = jnp.concatenate([group_ends(group_sizes_E, num_rows), jnp.full((1,), num_rows, jnp.int32)])
    start_G = jnp.concatenate([jnp.zeros((1,), jnp.int32), end_G[:-1]])
    count_G = -(-(end_G - start_G) // rows)
    group_G = jnp.arange(num_experts + 1)
    tile_end_G = jnp.where(group_G[:, None] >= group_G, count_G, 0).sum(1, dtype=jnp.int32)
    tile_T = jnp.arange(num_tiles(num_experts, num_rows, rows), dtype=jnp.int32)
    group_T = (tile_T[:, None] >= tile_end_G).sum(1, dtype=jnp.int32)
    take = jnp.minimum(group_T, num_experts)
    first_T = start_G[take] + (tile_T - tile_end_G[take] + count_G[take]) * rows
    size_T = jnp.clip(end_G[take] - first_T, 0, rows)
    return jnp.stack([take, first_T, size_T], axis=1), tile_end_G[-1:]
