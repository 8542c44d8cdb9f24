"""One optimizer step, and one evaluation, as one manual SPMD program each."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.config.run import RunConfig
from moejax.layers.context import Context
from moejax.models import ModelParts
from moejax.ops.random import fold
from moejax.parallel import zero
from moejax.parallel.plan import MeshPlan
from moejax.train import optimizer as optimizers
from moejax.train.loss import in_layer_order, router_loss, sum_tokens, token_losses
from moejax.train.state import TrainState, state_specs

Tree = Any
Batch = dict[str, Array]
"""inputs, targets, segments, positions, weights, bytes: [Y, B, T], microbatches first."""

BATCH_KEYS = ("inputs", "targets", "segments", "positions", "weights", "bytes")


def batch_specs(plan: MeshPlan) -> dict[str, PartitionSpec]:
    """Give the spec of every array of a batch [Y, B, T]: microbatch y is the same rows on every mesh."""
    return {key: plan.spec(None, "batch", "seq") for key in BATCH_KEYS}


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of a global batch, inside the program: what the step and the proofs share."""

    parts: ModelParts
    seed: int

    def __call__(self, params: Tree, buffers: Tree, step: Array, batch: Batch) -> tuple[Tree, Tree, dict[str, Array]]:
        """Give the gradient, reduced and split as the optimizer state is; the moved buffers; the metrics."""
        plan, parts = self.parts.plan, self.parts
        num_tokens = jnp.maximum(plan.sum_over(batch["weights"].sum(), "batch", "seq"), 1.0)
        local = zero.localize(plan, params)
        grad = jax.value_and_grad(self._microbatch_loss, has_aux=True)
        every = plan.config.zero_stage == 2
        count = batch["inputs"].shape[0]

        def one(index: Array | int, micro: Batch) -> tuple[Tree, Tree]:
            (_, metrics), grads = grad(local, buffers, step, index, count, micro, num_tokens)
            wide = parts.config.precision.accumulate
            grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, wide)), grads)
            return zero.reduce_gradients(plan, grads, parts.placements) if every else grads, metrics

        def accumulate(total: Tree, numbered: tuple[Array, Batch]) -> tuple[Tree, Tree]:
            grads, metrics = one(*numbered)
            return jax.tree.map(jnp.add, total, grads), metrics

        if count == 1:
            grads, metrics = one(0, jax.tree.map(lambda x: x[0], batch))
        else:
            start = zero.gradient_buffers(plan, local, parts.placements, parts.config.precision.accumulate, every)
            grads, metrics = lax.scan(accumulate, start, (jnp.arange(count), batch))
            metrics = {key: _over_microbatches(key, value) for key, value in metrics.items()}
        if not every:
            grads = zero.reduce_gradients(plan, grads, parts.placements)
        moved = self._moved_buffers(params, buffers, metrics)
        return grads, moved, metrics | {"tokens": num_tokens}

    def _microbatch_loss(
        self, params: Tree, buffers: Tree, step: Array, index: Array | int, count: int, micro: Batch, num_tokens: Array
    ) -> tuple[Array, dict[str, Any]]:
        plan = self.parts.plan
        model = self.parts.merge(params, buffers)
        rows = micro["inputs"].shape[0]
        first = index * (rows * plan.degree("batch")) + plan.index("batch") * rows
        key = fold(jax.random.key_data(jax.random.key(self.seed)), step)
        context = Context.of(micro["segments"], micro["positions"], (first + jnp.arange(rows)).astype(jnp.uint32), key)
        output = model(micro["inputs"], context)
        nats_BT = token_losses(model, output, micro["targets"]) * micro["weights"]
        loss = sum_tokens(plan, nats_BT) / num_tokens
        # An auxiliary loss is a mean over a microbatch's tokens: the step takes the mean over microbatches.
        aux = router_loss(output.stats) / count
        metrics = {"loss": loss, "aux": jnp.asarray(aux, loss.dtype), "router": in_layer_order(output.stats)}
        return loss + aux, jax.lax.stop_gradient(metrics) | {"stats": jax.lax.stop_gradient(output.stats)}

    def _moved_buffers(self, params: Tree, buffers: Tree, metrics: dict[str, Any]) -> Tree:
        """Move the loss-free balancing biases by the whole batch's load; the metrics lose what only this needs."""
        stats = metrics.pop("stats")
        if not jax.tree.leaves(buffers):
            return buffers
        model = self.parts.merge(params, buffers)
        model.update_router_bias(stats)
        return self.parts.split(model)[1]


def _over_microbatches(key: str, value: Any) -> Any:
    """Add losses and counts; average the routers' means."""
    if value is None:
        return None
    if key in ("loss", "aux"):
        return value.sum(0)
    if key == "stats":
        return jax.tree.map(lambda x: x.sum(0), value)
    total = jax.tree.map(lambda x: x.mean(0), value)
    return total._replace(load_E=value.load_E.sum(0), dropped=value.dropped.sum(0))


def make_train_step(parts: ModelParts, optimizer: optax.GradientTransformation, config: RunConfig) -> Any:
    """Give the jitted step (state, batch) -> (state, metrics); the state is donated, results stay on the devices."""
    plan, placements = parts.plan, parts.placements
    gradient = Gradient(parts, config.train.seed)
    schedule = optimizers.make_schedule(config.optimizer, config.train.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        grads, buffers, metrics = gradient(state.params, state.buffers, state.step, batch)
        norm = zero.global_norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        scale = optimizers.clip_scale(norm, config.optimizer.clip_norm)
        opt_states = []

        def update(slices: Tree) -> Tree:
            scaled = jax.tree.map(lambda g, w: (g * scale).astype(w.dtype), grads, slices)
            deltas, opt_state = optimizer.update(scaled, state.opt_state, slices)
            opt_states.append(_choose(good, opt_state, state.opt_state))
            return _choose(good, optax.apply_updates(slices, deltas), slices)

        params = zero.update_slices(plan, update, state.params, placements)
        skipped = (~good).astype(jnp.int32)
        new = TrainState(
            state.step + 1,
            params,
            _choose(good, buffers, state.buffers),
            opt_states[0],
            state.skipped + skipped,
            (state.skipped_in_a_row + 1) * skipped,
        )
        metrics |= {"grad_norm": norm, "lr": schedule(state.step), "skipped": new.skipped}
        return new, metrics | {"skipped_in_a_row": new.skipped_in_a_row}

    specs = state_specs(parts, optimizer)
    program = plan.spmd(step, (specs, batch_specs(plan)), (specs, PartitionSpec()))
    return jax.jit(program, donate_argnums=0)


def _choose(good: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def make_eval_step(parts: ModelParts) -> Any:
    """Give the jitted evaluation (params, buffers, batch [1, B, T]) -> summed nats, tokens, and the targets' bytes."""
    plan = parts.plan

    def step(params: Tree, buffers: Tree, batch: Batch) -> dict[str, Array]:
        batch = jax.tree.map(lambda x: x[0], batch)
        model = parts.merge(params, buffers)
        output = model(batch["inputs"], Context.of(batch["segments"], batch["positions"]))
        nats_BT = token_losses(model, output, batch["targets"]) * batch["weights"]
        sums = {"nats": nats_BT, "tokens": batch["weights"], "bytes": batch["bytes"].astype(nats_BT.dtype)}
        return {key: plan.agree(sum_tokens(plan, value)) for key, value in sums.items()}

    ins = (parts.weight_specs(), parts.buffer_specs(), batch_specs(plan))
    return jax.jit(plan.spmd(step, ins, PartitionSpec()))
