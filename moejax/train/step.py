"""One optimizer step, and one evaluation, as one manual SPMD program each."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moejax.compat import vary
from moejax.config.run import RunConfig, TrainConfig
from moejax.layers.context import Context
from moejax.models import Decoder, ModelParts
from moejax.models.decoder import Output
from moejax.parallel import zero
from moejax.parallel.pipeline import Work, empty_message, forward_once
from moejax.parallel.plan import MeshPlan
from moejax.train import optimizer as optimizers
from moejax.train.gradient import Batch, Gradient, source_of
from moejax.train.loss import sum_tokens, token_losses
from moejax.train.state import TrainState, state_specs

Tree = Any

BATCH_KEYS = ("inputs", "targets", "segments", "positions", "weights", "bytes")


SOURCE_KEYS = ("source", "source_segments")
"""What an encoder-decoder's batches hold besides, [Y, B, S]."""


def batch_specs(plan: MeshPlan, with_source: bool = False) -> dict[str, PartitionSpec]:
    """Give the spec of every array of a batch [Y, B, T]: microbatch y is the same rows on every mesh."""
    return {key: plan.spec(None, "batch", "seq") for key in BATCH_KEYS + SOURCE_KEYS * with_source}


def abstract_batch(plan: MeshPlan, train: TrainConfig, with_source: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Give the shapes, dtypes and places of a step's batch: what it takes to compile a step."""
    rows = (train.microbatches, train.global_batch // train.microbatches)
    lengths: dict[str, int] = dict.fromkeys(SOURCE_KEYS, train.num_source())

    def array(key: str, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape, dtype = (*rows, lengths.get(key, train.seq_len)), jnp.float32 if key == "weights" else jnp.int32
        return jax.ShapeDtypeStruct(shape, dtype, sharding=plan.place(spec))

    return {key: array(key, spec) for key, spec in batch_specs(plan, with_source).items()}


def local_rows(plan: MeshPlan, rows: int) -> slice:
    """Give the part of a microbatch's `rows` that holds all that this process's devices need."""
    places = plan.sharding("batch").addressable_devices_indices_map((rows,)).values()
    bounds = [place[0].indices(rows) for place in places if place is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_batch(plan: MeshPlan, batch: dict[str, np.ndarray], rows: int | None = None, first: int = 0) -> Batch:
    """Put a batch [Y, B, T] on the devices, each sequence in the mesh's order.

    One of many processes may have only a part: of a microbatch's `rows` (default: those of the batch) those from
    `first` on, which must hold `local_rows`.
    """
    specs, order = batch_specs(plan, "source" in batch), plan.sequence_order(batch["inputs"].shape[-1])
    num_rows = batch["inputs"].shape[1] if rows is None else rows

    def place(value: np.ndarray, spec: PartitionSpec) -> Array:
        value = value[..., order] if plan.size("sequence") > 1 else value

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(num_rows)
            return value[index[0], start - first : stop - first, index[2]]

        shape = (value.shape[0], num_rows, value.shape[2])
        return jax.make_array_from_callback(shape, plan.place(spec), part)

    return {key: place(value, specs[key]) for key, value in batch.items()}


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
    batches = batch_specs(plan, parts.config.encoder is not None)
    program = plan.spmd(step, (specs, batches), (specs, PartitionSpec()))
    return jax.jit(program, donate_argnums=0)


def _choose(good: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def make_eval_step(parts: ModelParts) -> Any:
    """Give the jitted evaluation (params, buffers, batch [1, B, T]) -> summed nats, tokens, and the targets' bytes."""
    plan = parts.plan

    def nats(model: Decoder, output: Output, batch: Batch) -> Array:
        return plan.agree(sum_tokens(plan, token_losses(model, output, batch["targets"]) * batch["weights"]))

    def in_stages(params: Tree, buffers: Tree, batch: Batch, context: Context) -> Array:
        local = zero.localize(plan, params)
        config = parts.config
        rows, length = batch["inputs"].shape
        empty = empty_message(plan, rows, length, config.embed, config.precision.compute)
        wide = jnp.promote_types(config.precision.compute, config.precision.accumulate)
        none = vary(jnp.zeros((), wide), ("pipeline",))

        def run(x: Array, work: Work) -> tuple[Array, Array]:
            model = parts.merge(parts.chunk(local, work.chunk), parts.chunk(buffers, work.chunk))
            y, _ = model.stage(x, batch["inputs"], context, work.first, work.chunk)

            def head() -> Array:
                return nats(model, Output(model.finish(y), None, []), batch).astype(wide)

            return y, lax.cond(work.last, head, lambda: none)

        return plan.sum_over(forward_once(plan, run, empty, none), "layers")

    def step(params: Tree, buffers: Tree, batch: Batch) -> dict[str, Array]:
        batch = jax.tree.map(lambda x: x[0], batch)
        context = Context.of(plan, batch["segments"], batch["positions"], source=source_of(batch))
        if plan.size("pipeline") > 1:
            total = in_stages(params, buffers, batch, context)
        else:
            model = parts.merge(params, buffers)
            total = nats(model, model(batch["inputs"], context), batch)
        counts = {"tokens": batch["weights"], "bytes": batch["bytes"].astype(total.dtype)}
        return {"nats": total} | {key: plan.agree(sum_tokens(plan, value)) for key, value in counts.items()}

    ins = (parts.weight_specs(), parts.buffer_specs(), batch_specs(plan, parts.config.encoder is not None))
    return jax.jit(plan.spmd(step, ins, PartitionSpec()))
