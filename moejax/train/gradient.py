"""What is the gradient of a global batch? One microbatch after the other, or through a pipeline."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moejax.compat import vary
from moejax.layers.context import Context, Source
from moejax.models import Decoder, ModelParts
from moejax.models.decoder import Output
from moejax.ops.random import fold
from moejax.parallel import pipeline, zero
from moejax.train.loss import further_losses, in_layer_order, router_loss, sum_tokens, token_losses

Tree = Any
Batch = dict[str, Array]
"""inputs, targets, segments, positions, weights, bytes: [Y, B, T], microbatches first; of an encoder-decoder source and
source_segments [Y, B, S] too."""


def source_of(micro: Batch) -> Source | None:
    """Give what a microbatch holds for an encoder."""
    return Source(micro["source"], micro["source_segments"]) if "source" in micro else None


@dataclass(frozen=True)
class Gradient:
    """Loss and gradient of a global batch, inside the program."""

    parts: ModelParts
    seed: int

    def __call__(self, params: Tree, buffers: Tree, step: Array, batch: Batch) -> tuple[Tree, Tree, dict[str, Array]]:
        """Give the gradient, reduced and split as the optimizer state is; the moved buffers; the metrics."""
        plan, parts = self.parts.plan, self.parts
        num_tokens = jnp.maximum(plan.sum_over(batch["weights"].sum(), "batch", "seq"), 1.0)
        local = zero.localize(plan, params)
        job = _Job(self, buffers, step, batch, num_tokens)
        grads, totals = job.in_stages(local) if plan.size("pipeline") > 1 else job.in_turn(local)
        if plan.config.zero_stage != 2:
            grads = zero.reduce_gradients(plan, grads, parts.placements)
        moved = self._moved_buffers(params, buffers, totals["stats"])
        return grads, moved, job.metrics(totals)

    def _moved_buffers(self, params: Tree, buffers: Tree, stats: Tree) -> Tree:
        """Move the loss-free balancing biases by the whole batch's load."""
        if not jax.tree.leaves(buffers):
            return buffers
        model = self.parts.merge(params, buffers)
        model.update_router_bias(stats)
        return self.parts.split(model)[1]


@dataclass(frozen=True)
class _Job:
    """One step's gradient; a `pipeline.Stage` where there are stages."""

    gradient: Gradient
    buffers: Tree
    step: Array
    batch: Batch
    num_tokens: Array

    @property
    def parts(self) -> ModelParts:
        return self.gradient.parts

    @property
    def count(self) -> int:
        return self.batch["inputs"].shape[0]

    # --- one microbatch after the other

    def in_turn(self, params: Tree) -> tuple[Tree, Tree]:
        """Give gradients (local ones, but under ZeRO-2, which reduces each microbatch's) and summed metrics."""
        parts, plan = self.parts, self.parts.plan
        every, wide = plan.config.zero_stage == 2, parts.config.precision.accumulate
        grad = jax.grad(self.whole, has_aux=True)

        def one(index: Array | int, micro: Batch) -> tuple[Tree, Tree]:
            grads, metrics = grad(params, index, micro)
            grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, wide)), grads)
            return zero.reduce_gradients(plan, grads, parts.placements) if every else grads, metrics

        def accumulate(total: Tree, numbered: tuple[Array, Batch]) -> tuple[Tree, Tree]:
            grads, metrics = one(*numbered)
            return jax.tree.map(jnp.add, total, grads), metrics

        if self.count == 1:
            return one(0, jax.tree.map(lambda x: x[0], self.batch))
        start = zero.gradient_buffers(plan, params, parts.placements, wide, every)
        grads, metrics = lax.scan(accumulate, start, (jnp.arange(self.count), self.batch))
        return grads, jax.tree.map(lambda x: x.sum(0), metrics)

    def whole(self, params: Tree, index: Array | int, micro: Batch) -> tuple[Array, Tree]:
        """Give one microbatch's part of the training loss, and its metrics."""
        model = self.parts.merge(params, self.buffers)
        context = self.context(index, micro)
        output = model(micro["inputs"], context)
        loss, aux = self.token_loss(model, output, micro), self.router_loss(output.stats)
        if self.parts.config.mtp is None:
            return loss + aux, self.seen(loss, aux, output.stats)
        nats_BT, routers = further_losses(model, output, micro, context)
        mtp = sum_tokens(self.parts.plan, nats_BT) / self.num_tokens
        aux = aux + self.router_loss([routers])
        total = loss + aux + self.parts.config.mtp.weight * mtp
        return total, self.seen(loss, aux, output.stats) | {"mtp": lax.stop_gradient(mtp)}

    def context(self, index: Array | int, micro: Batch) -> Context:
        """Number this device's rows in the global batch: they decide dropout and noise, whatever the mesh."""
        plan, rows = self.parts.plan, micro["inputs"].shape[0]
        first = index * (rows * plan.degree("batch")) + plan.index("batch") * rows
        key = fold(jax.random.key_data(jax.random.key(self.gradient.seed)), self.step)
        rows_B = (first + jnp.arange(rows)).astype(jnp.uint32)
        return Context.of(plan, micro["segments"], micro["positions"], rows_B, key, source_of(micro))

    def token_loss(self, model: Decoder, output: Output, micro: Batch) -> Array:
        """Sum the targets' losses over all devices, as a part of the whole batch's mean."""
        nats_BT = token_losses(model, output, micro["targets"]) * micro["weights"]
        return sum_tokens(self.parts.plan, nats_BT) / self.num_tokens

    def router_loss(self, stats: list[list[Any]]) -> Array:
        """Sum the layers' auxiliary losses: each is a mean over a microbatch's tokens; the step takes the mean."""
        return jnp.asarray(router_loss(stats, self.parts.config.moe) / self.count, self.num_tokens.dtype)

    def seen(self, loss: Array, aux: Array, stats: list[list[Any]]) -> Tree:
        """Give what is summed over microbatches."""
        return lax.stop_gradient({"loss": loss, "aux": aux.astype(loss.dtype), "stats": stats})

    def metrics(self, totals: Tree) -> dict[str, Any]:
        """Turn sums over microbatches (and stages) into the step's metrics."""
        plan = self.parts.plan
        loss, aux = (plan.sum_over(totals[key], "layers") for key in ("loss", "aux"))
        router = in_layer_order(jax.tree.map(self.parts.all_layers, totals["stats"]))
        if router is not None and self.count > 1:  # counts add up, means are averaged
            mean = jax.tree.map(lambda x: x / self.count, router)
            router = mean._replace(load_E=router.load_E, dropped=router.dropped, sent=router.sent)
        found = {"loss": loss, "aux": aux, "router": router, "tokens": self.num_tokens}
        return found | {key: totals[key] for key in ("mtp",) if key in totals}

    # --- through a pipeline: see parallel/pipeline.py

    def in_stages(self, params: Tree) -> tuple[Tree, Tree]:
        """Give local gradients, and metrics summed over this device's pieces of work."""
        plan, config = self.parts.plan, self.parts.config
        _, rows, length = self.batch["inputs"].shape
        empty = pipeline.empty_message(plan, rows, length, config.embed, config.precision.compute)
        grads = zero.gradient_buffers(plan, params, self.parts.placements, config.precision.accumulate, False)
        zeros = (empty, grads, self._no_metrics(params, empty))
        return pipeline.value_and_grad(plan, plan.schedule(self.count), self, params, zeros)

    def _no_metrics(self, params: Tree, empty: Array) -> Tree:
        plan = self.parts.plan
        none = pipeline.work_of(plan, jnp.int32(-1))
        shapes = jax.eval_shape(lambda: self.loss(self.part(params, none.chunk), empty, none)[1])
        wide = plan.config.chunks
        zeros = {key: jnp.zeros(shapes[key].shape, shapes[key].dtype) for key in ("loss", "aux")}
        zeros["stats"] = jax.tree.map(lambda s: jnp.zeros((wide * s.shape[0], *s.shape[1:]), s.dtype), shapes["stats"])
        return jax.tree.map(lambda x: vary(x, ("pipeline",)), zeros)

    def _micro(self, work: pipeline.Work) -> Batch:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, work.microbatch, keepdims=False), self.batch)

    def _layers(self, params: Tree, x: Array, work: pipeline.Work) -> tuple[Decoder, Batch, Array, Any]:
        micro = self._micro(work)
        buffers = self.parts.chunk(self.buffers, work.chunk)
        model = self.parts.merge(params, buffers)
        context = self.context(work.microbatch, micro)
        return model, micro, *model.stage(x, micro["inputs"], context, work.first, work.chunk)

    def forward(self, params: Tree, x: Array, work: pipeline.Work) -> Array:
        """Run a chunk's layers, after the embedding if it is the first."""
        return self._layers(params, x, work)[2]

    def loss(self, params: Tree, x: Array, work: pipeline.Work) -> tuple[tuple[Array, Array], Tree]:
        """Run a chunk's layers, and the head if it is the last."""
        model, micro, y, stats = self._layers(params, x, work)

        def head() -> Array:
            return self.token_loss(model, Output(model.finish(y), None, []), micro)

        loss = lax.cond(work.last, head, lambda: vary(jnp.zeros((), self.num_tokens.dtype), ("pipeline",)))
        aux = vary(self.router_loss(stats), ("pipeline",))
        return (y, loss + aux), self.seen(loss, aux, stats)

    def part(self, tree: Tree, chunk: Array) -> Tree:
        """Take the weights of one chunk, and those that all chunks share."""
        return self.parts.chunk(tree, chunk)

    def add(self, total: Tree, part: Tree, chunk: Array) -> Tree:
        """Add one chunk's gradients."""
        return self.parts.add_chunk(total, part, chunk)

    def record(self, total: Tree, metrics: Tree, chunk: Array) -> Tree:
        """Add one chunk's metrics: its layers' statistics to those of its layers."""
        sums = {key: total[key] + metrics[key] for key in ("loss", "aux")}
        return sums | {"stats": self.parts.add_chunk(total["stats"], metrics["stats"], chunk)}
