"""Does the program keep to its bounds? Bytes on the wire against what the layout needs, FLOPs against the model's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moejax.accounting.activations import width
from moejax.accounting.communication import RECOMPUTED, by_axes, expected_transfers
from moejax.accounting.compiled import Collective, collectives
from moejax.accounting.mixers import mixer_size
from moejax.accounting.model_cost import model_cost, scores_of
from moejax.accounting.traced import matmul_flops
from moejax.config.attention import LightningConfig
from moejax.config.run import TrainConfig
from moejax.models import FAMILIES, ModelParts
from moejax.ops.cross_entropy import logits_block
from moejax.parallel.plan import MeshPlan

BYTES_LIMIT, FLOPS_LIMIT = 1.05, 1.1
"""What is sent may exceed the bound by so much, and so may the arithmetic, before the contract is broken."""
FEW = 128
"""Bytes: a collective on less is a norm, a count or a loss, and needs no line of its own."""


@dataclass(frozen=True)
class Line:
    """One line of a contract: what was promised, what was found."""

    what: str
    bound: float
    found: float
    limit: float
    why: str

    @property
    def ratio(self) -> float:
        """Give found / bound; infinite for what nobody declared."""
        return self.found / self.bound if self.bound else float("inf")

    @property
    def kept(self) -> bool:
        """Say whether the line holds."""
        return self.found <= self.limit * self.bound


def pipeline_turns(plan: MeshPlan, train: TrainConfig) -> tuple[int, int]:
    """Give the turns of the pipeline's loop and how many of them do something; zeros without stages."""
    if plan.size("pipeline") == 1:
        return 0, 0
    schedule = plan.schedule(train.microbatches)
    return schedule.ticks, schedule.work


def communication_contract(hlo: str, parts: ModelParts, train: TrainConfig) -> list[Line]:
    """Compare a compiled training step's bytes, by mesh axes and kind, with the bounds of `communication.py`."""
    turns = pipeline_turns(parts.plan, train)
    found: dict[tuple[tuple[str, ...], str], list[Collective]] = {}
    for collective in collectives(hlo, dict(parts.plan.mesh.shape), *turns):
        if not collective.dynamic and collective.payload > FEW:
            found.setdefault((collective.axes, collective.kind), []).append(collective)
    transfers = expected_transfers(parts, train)
    bounds = by_axes(transfers)
    lines = []
    for key in sorted({*found, *bounds}):
        axes, kind = key
        sent = sum(c.sent * c.times for c in found.get(key, ()))
        why = ", ".join(dict.fromkeys(t.why for t in transfers if (t.axes, t.kind) == key))
        why = why or "nobody declared it: " + ", ".join(sorted({c.scope[-60:] for c in found[key]}))
        lines.append(Line(f"{' x '.join(axes)} {kind}", bounds.get(key, 0.0), sent, BYTES_LIMIT, why))
    return lines


def exchange_line(lines: Sequence[Line], parts: ModelParts, train: TrainConfig, rows_sent: float) -> Line | None:
    """Show what the rows really sent in a step would cost alone, beside what the compiled exchange sends for them.

    `rows_sent` is counted at run time over all devices and layers; the padded way's factor is declared, not a breach.
    """
    config, plan = parts.config, parts.plan
    compiled = next((line.found for line in lines if line.what == "expert all-to-all"), 0.0)
    if config.moe is None or not compiled or not rows_sent:
        return None
    devices = plan.degree("batch", "seq") * plan.size("pipeline")
    passes = 2 * (2 + ("experts" in RECOMPUTED[config.remat]) + (plan.size("pipeline") > 1))
    alone = passes * rows_sent / devices * config.embed * width(config.precision.compute)
    return Line("expert rows really sent", alone, compiled, float("inf"), "declared: equal parts, padded with zeros")


def flop_contract(jaxpr: Any, parts: ModelParts, train: TrainConfig) -> list[Line]:
    """Compare a traced training step's matmuls on one device with the model's own, once what is listed is added."""
    moe = parts.config.moe
    rows = 0
    if moe is not None:
        rows = train.global_batch // train.microbatches // parts.plan.degree("batch")
        rows *= train.seq_len // parts.plan.degree("seq") * moe.router.num_active
    found = matmul_flops(getattr(jaxpr, "jaxpr", jaxpr), *pipeline_turns(parts.plan, train), rows)
    terms = expected_flops(parts, train)
    why = ", ".join(f"{name} {flops / terms['model']:.2f}" for name, flops in terms.items() if flops)
    return [Line("matmul FLOPs", sum(terms.values()), found, FLOPS_LIMIT, why)]


def expected_flops(parts: ModelParts, train: TrainConfig) -> dict[str, float]:
    """List one device's FLOPs in a step: the model's own share, and each kind that the layout adds to it."""
    plan, config = parts.plan, parts.config
    tokens, devices = train.global_batch * train.seq_len, plan.mesh.size
    source = train.num_source()
    cost, moe = model_cost(parts, train.seq_len, source), config.moe
    layers_list = FAMILIES[config.name].layers(config)
    heads = moe.num_experts if moe is not None and moe.competitive else 1
    head = 2.0 * config.vocab * config.embed * heads
    repeated = sum(scores_of(layer, train.seq_len, source)[1] for layer in layers_list)
    layers, local = cost.forward_flops - head, tokens / devices
    terms = {"model": 3 * cost.forward_flops * local, "scores again": 2.0 * repeated * local}
    again = (config.remat != "none") + (plan.size("pipeline") > 1)
    terms["recompute"] = again * layers * local + (heads > 1) * head * local
    rows = tokens // train.microbatches // plan.degree("batch", "seq")
    vocab = config.vocab // plan.size("tensor")
    if logits_block(rows, vocab, max(width(config.precision.compute), 4)) < vocab:
        terms["logits again"] = head * local
    terms["head on its stage"] = 3 * head * local * (plan.size("pipeline") - 1)
    whole = (plan.size("tensor") - 1) * (3 + again) * local
    products = sum(mixer_size(config, layer.mixer, plan).whole_products for layer in layers_list)
    terms["whole keys"] = 2.0 * products * whole
    terms["states of other ranks"] = _states(parts) * (3 + again) * local
    if moe is not None:
        lengths = [layer.length(train.seq_len, source) for layer in layers_list if layer.ffn == "sparse"]
        sparse = sum(lengths) / train.seq_len
        routers = 2 if moe.router.noise == "gaussian" else 1
        terms["whole routers"] = routers * 2.0 * config.embed * moe.num_experts * sparse * whole
        expert = 2.0 * (2 if moe.activation == "relu" else 3) * config.embed * moe.expert_ffn * (3 + again) * local
        more = sum((_padding(parts, length) - 1) * length / train.seq_len for length in lengths)
        terms["padded places"] = expert * more * moe.router.num_active
    return terms


def _states(parts: ModelParts) -> float:
    """Count the FLOPs of a token that reads what other devices' runs left behind: linear attention over positions."""
    if parts.plan.size("sequence") == 1:
        return 0.0
    layers = FAMILIES[parts.config.name].layers(parts.config)
    sizes = [layer.mixer for layer in layers if isinstance(layer.mixer, LightningConfig)]
    return sum(2.0 * mixer.num_heads * mixer.head_dim**2 for mixer in sizes)


def _padding(parts: ModelParts, length: int) -> float:
    """Give the rows that experts run, as a multiple of the routed ones: fixed places hold zeros, or drop."""
    moe = parts.config.moe
    assert moe is not None
    way = moe.way(training=True)
    if way == "sorted" or moe.router.kind == "soft":
        return 1.0
    if way == "dense":
        return moe.num_experts / moe.router.num_active
    slots = moe.num_slots(length)
    ranks = parts.plan.degree("seq")
    return ranks * min(slots, length // ranks) * moe.num_experts / (length * moe.router.num_active)


def breaches(lines: Sequence[Line]) -> list[Line]:
    """Give the lines that do not hold."""
    return [line for line in lines if not line.kept]
