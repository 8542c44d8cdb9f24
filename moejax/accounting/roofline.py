"""How long does a training step take at best? FLOPs, bytes on each link and the bubble, over a chip's stated peaks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moejax.accounting.chips import Chip
from moejax.accounting.communication import Transfer, expected_transfers
from moejax.accounting.memory import MemoryEstimate
from moejax.accounting.model_cost import model_cost
from moejax.axes import MESH_AXES
from moejax.config.run import TrainConfig
from moejax.models import ModelParts
from moejax.parallel.plan import MeshPlan
from moejax.parallel.schedules import bubble_fraction

HIDDEN = ("weights", "gradients", "context parallelism")
"""Traffic that nothing waits for at once: the next layer's weights, this one's gradients, the ring's next keys."""


Sent = tuple[Transfer, float, float]
"""A transfer, and its bytes on NVLink and on the network."""


@dataclass(frozen=True)
class Assumptions:
    """What a real step reaches of the peaks; every field can be set on the command line."""

    matmul: float = 0.6
    """share of the chip's peak in a whole layer: an H200's largest matmuls reach 0.80 of it, grouped ones 0.67"""
    link: float = 0.8
    """share of a link's peak in large collectives"""
    overlap: float = 0.5
    """share of the computing time behind which traffic in HIDDEN disappears; all other traffic is waited for"""
    network: float | None = None
    """bytes/s of one device to other nodes, if not the chip's"""
    headroom: float = 0.9
    """share of the memory that may be planned with; the rest is for CUDA, NCCL and the estimate's error"""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest device, by what it does, and bytes that it sends by link."""

    compute: float
    exposed: float
    """waiting for links"""
    update: float
    """the optimizer: its state read and written once"""
    bubble: float
    """seconds in which a stage has nothing to do"""
    nvlink: float
    """bytes"""
    network: float
    """bytes"""
    mfu: float = 0.0
    """the model's own FLOPs over peak and time: nothing recomputed counts"""

    @property
    def total(self) -> float:
        """Add up."""
        return self.compute + self.exposed + self.update + self.bubble


def link_bytes(plan: MeshPlan, chip: Chip, transfer: Transfer) -> tuple[float, float]:
    """Split what a device sends into bytes on NVLink and on the network, devices lying in the mesh's order.

    Of a ring over nodes that each hold m of its ranks every m-th step crosses, and each rank has a network port: 1/m of
    the bytes. An all-to-all crosses to the ranks of other nodes; a permute's slowest step crosses whole.
    """
    inner, inside, extent, ranks = 1, 1, 1, 1
    for axis in reversed(MESH_AXES):
        size = plan.size(axis)
        if axis in transfer.axes:
            inside *= max(1, math.gcd(size, max(chip.node // inner, 1)))
            extent, ranks = inner * size, ranks * size
        inner *= size
    if extent <= chip.node:
        return transfer.bytes, 0.0
    if transfer.kind == "all-to-all":
        across = transfer.bytes * (ranks - inside) / (ranks - 1)
        return transfer.bytes - across, across
    if transfer.kind == "collective-permute":
        return 0.0, transfer.bytes
    return transfer.bytes * (inside > 1), transfer.bytes / inside


def recomputed_forwards(parts: ModelParts) -> float:
    """Count the forwards that a step runs besides its first, for remat and for a pipeline's backward."""
    config = parts.config
    again = {"none": 0.0, "dots": 0.0, "names": 1.0, "full": 1.0}[config.remat]
    if config.remat == "dots":  # attention's scores, and experts, which are no plain matmuls; the rest is saved
        again = 0.8 if config.moe is not None else 0.1
    return again + (1.0 if parts.plan.size("pipeline") > 1 else 0.0)


def compute_time(parts: ModelParts, train: TrainConfig, chip: Chip, assume: Assumptions) -> tuple[float, float]:
    """Give a device's seconds of arithmetic, and the bubble's; a microbatch at least reads its weights."""
    plan, precision = parts.plan, parts.config.precision
    cost, devices = model_cost(parts, train.seq_len, train.num_source()), plan.mesh.size
    tokens = train.global_batch * train.seq_len / devices
    flops = tokens * cost.forward_flops * (3 + recomputed_forwards(parts))
    seconds = flops / (chip.flops[precision.compute] * assume.matmul)
    stages, bubble = plan.size("pipeline"), 0.0
    if stages > 1:
        bubble = bubble_fraction(plan.schedule(train.microbatches))
    return seconds, seconds * bubble / (1 - bubble)


def step_time(
    parts: ModelParts, train: TrainConfig, memory: MemoryEstimate, chip: Chip, assume: Assumptions
) -> StepTime:
    """Predict a step."""
    plan = parts.plan
    compute, bubble = compute_time(parts, train, chip, assume)
    sent: list[Sent] = []
    for transfer in expected_transfers(parts, train):
        near, far = link_bytes(plan, chip, transfer)
        sent.append((transfer, near, far))
    hidden = _seconds([s for s in sent if s[0].why in HIDDEN], chip, assume)
    waited = _seconds([s for s in sent if s[0].why not in HIDDEN], chip, assume)
    exposed = waited + max(0.0, hidden - assume.overlap * compute)
    # A stage that waits for its links makes the others wait in the bubble too.
    bubble *= 1 + waited / compute
    update = 2 * (memory.params + memory.gradients + memory.optimizer) / chip.bandwidth
    nvlink, network = sum(near for _, near, _ in sent), sum(far for _, _, far in sent)
    time = StepTime(compute, exposed, update, bubble, nvlink, network)
    model_flops = model_cost(parts, train.seq_len, train.num_source()).train_flops * train.global_batch * train.seq_len
    peak = chip.flops[parts.config.precision.compute] * plan.mesh.size
    return StepTime(compute, exposed, update, bubble, nvlink, network, model_flops / peak / time.total)


def _seconds(sent: Sequence[Sent], chip: Chip, assume: Assumptions) -> float:
    """Give the time of transfers one after the other; each takes as long as its slower link."""
    network = assume.network or chip.network
    return sum(max(near / (chip.nvlink or network), far / network) / assume.link for _, near, far in sent)
