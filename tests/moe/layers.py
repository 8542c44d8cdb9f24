"""What the tests of the sparse layer share: small float64 routers, contexts of whole sequences, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config.moe import MoEConfig, RouterConfig
from moejax.layers.context import Context
from moejax.moe.layer import MoELayer
from moejax.moe.router import Router, Routing
from moejax.moe.stats import RouterStats
from moejax.parallel.plan import MeshPlan
from tests.tiny_runs import FLOAT64

B, T, D, E = 2, 8, 6, 4


def moe_config(router: dict, **changes) -> MoEConfig:
    return MoEConfig(**({"num_experts": E, "expert_ffn": 5} | changes), router=RouterConfig(**router))


def make_router(config: MoEConfig, dim: int = D) -> Router:
    return Router(MeshPlan.single(), nnx.Rngs(0), dim, config, FLOAT64)


def make_layer(config: MoEConfig) -> MoELayer:
    return MoELayer(MeshPlan.single(), nnx.Rngs(0), D, config, FLOAT64)


def route(router: Router, x: jax.Array, where: Context) -> Routing:
    """Call a router as one compiled program."""
    return _call(*nnx.split(router), x, where)


def run_layer(layer: MoELayer, x: jax.Array, where: Context) -> tuple[jax.Array, RouterStats]:
    """Call a layer as one compiled program."""
    return _call(*nnx.split(layer), x, where)


@functools.partial(jax.jit, static_argnums=0)
def _call(graph, state, x, where):
    return nnx.merge(graph, state)(x, where)


def tokens(seed: int = 0, batch: int = B, length: int = T, dim: int = D) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, dim)))


def context(segments=None, seed: int | None = None, batch: int = B, length: int = T) -> Context:
    """Give the context of whole sequences; with a seed, of training."""
    segments = jnp.ones((batch, length), jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32)
    return Context.of(MeshPlan.single(), segments, key=None if seed is None else jnp.array([7, seed], jnp.uint32))


def padded() -> np.ndarray:
    """Segments of two sequences: one full, one that ends in three tokens of padding."""
    segments = np.ones((B, T), np.int32)
    segments[1, -3:] = 0
    return segments


def load_of(routing: Routing) -> np.ndarray:
    experts, chosen = np.asarray(routing.experts_BTA), np.asarray(routing.chosen_BTA)
    return np.bincount(experts[chosen], minlength=routing.probs_BTE.shape[-1])
