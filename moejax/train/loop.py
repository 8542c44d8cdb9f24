"""The training loop: batches in, state on, records out, checkpoints beside."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from moejax.accounting.chips import find_chip
from moejax.accounting.model_cost import model_cost
from moejax.config.run import RunConfig
from moejax.data import BatchSource, Data
from moejax.interop.weights import load
from moejax.models import ModelParts
from moejax.parallel.launch import AnyProcess, is_first, say, together
from moejax.parallel.plan import MeshPlan
from moejax.parallel.rules import check_batch
from moejax.train import optimizer as optimizers
from moejax.train.checkpoint import Checkpoints, check_same_model
from moejax.train.gradient import Batch
from moejax.train.metrics import MetricsWriter, Mute, device_memory, open_writer, step_record
from moejax.train.state import TrainState, abstract_state, init_state, state_specs
from moejax.train.step import local_rows, make_eval_step, make_train_step, place_batch

Stats = dict[str, float]

MAX_QUEUED: Final = 4
"""Steps handed to the devices ahead of the one that runs: enough to hide the host; each holds its batch's memory."""


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    step: int
    stopped_early: bool
    """by a signal: the run can go on"""
    validation: Stats
    """val_loss (nats per token) and val_bits_per_byte; empty if stopped early, or if there was nothing left to do"""


class Stop:
    """Turns SIGTERM and SIGINT into a flag, so that the step that is running ends and is saved.

    Many processes must end after the same step: each step carries the question to all of them whether one was told to
    stop, and the answer is read when that step is done, MAX_QUEUED steps later.
    """

    def __init__(self, plan: MeshPlan) -> None:
        self.asked = ""
        """the signal's name, once this process got one"""
        self._any = AnyProcess(plan) if jax.process_count() > 1 else None
        self._answer = False

    @property
    def agreed(self) -> bool:
        """Say whether to stop now: the same on all processes."""
        return bool(self.asked) if self._any is None else self._answer

    def ask(self) -> jax.Array | None:
        """Begin to ask the other processes; None where there are none."""
        return None if self._any is None else self._any(bool(self.asked))

    def hear(self, answer: jax.Array | None) -> None:
        """Take an answer that all processes got."""
        self._answer = answer is not None and bool(answer)

    def __enter__(self) -> "Stop":
        """Listen; a second signal of the same kind then acts as it always does."""
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.asked = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])


class Trainer:
    """One run: its programs, its data and its checkpoints."""

    def __init__(self, config: RunConfig, plan: MeshPlan, parts: ModelParts, data: Data, out: Path) -> None:
        train = config.train
        source_len = None if config.model.encoder is None else train.num_source()
        check_batch(plan.rules, plan.config, train.global_batch, train.microbatches, train.seq_len, source_len)
        if (config.data.objective == "span_corruption") != (config.model.encoder is not None):
            raise ValueError(
                f'data.objective = "{config.data.objective}" does not suit name = "{config.model.name}": '
                'encoder-decoders learn by "span_corruption", decoders by "next_token"'
            )
        self.config, self.plan, self.parts, self.data, self.out = config, plan, parts, data, out
        self.optimizer = optimizers.build(config.optimizer, train.steps, parts.placements)
        self.train_step = together("train step", make_train_step(parts, self.optimizer, config))
        self.eval_step = together("eval step", make_eval_step(parts))
        self.source = BatchSource(data.train, train.global_batch, train.microbatches)
        self.chip = find_chip(jax.devices()[0].device_kind)
        self.flops = model_cost(parts, train.seq_len, train.num_source()).train_flops

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Open the run's checkpoints, when first asked: a trainer that is made and not started writes nothing."""
        return Checkpoints(self.out / "checkpoints", self.config.train.keep_last)

    def start(self) -> TrainState:
        """Restore the newest checkpoint, or make the state of step 0; raise ValueError if it is not of this run."""
        step = self.checkpoints.latest()
        if step is None:
            return init_state(self.parts, self.optimizer, self.config.train.seed, self._loaded())
        meta = self.checkpoints.meta(step)
        check_same_model(meta["model"], dataclasses.asdict(self.config.model), self.checkpoints.directory)
        if meta["data"] != self.data.fingerprint:
            raise ValueError(
                f"the corpus {self.config.data.source} has changed since this run began (sha256 {meta['data'][:12]} "
                f"then, {self.data.fingerprint[:12]} now; a standard library differs between Python releases): "
                "give the old corpus back, or start another --out"
            )
        if meta["tokenizer"] != self.data.tokenizer.hash():
            raise ValueError(
                f"the tokenizer {self.config.data.tokenizer} is another than when this run began (another version of "
                f"the tokenizers library learns other merges): install that version, or start another --out"
            )
        state = self.checkpoints.restore(step, abstract_state(self.parts, self.optimizer))
        return self._reordered(state, self.parts.stored)

    def _loaded(self) -> tuple[Any, Any] | None:
        """Read the weights to start from; None where they are drawn."""
        if not (folder := self.config.train.init_from):
            return None
        loaded = load(self.parts, Path(folder).expanduser(), self.config.train.seed)
        if loaded.left_out:
            say(f"{folder}: {len(loaded.left_out)} tensors are not of this model: {', '.join(loaded.left_out)}")
        return loaded.params, loaded.buffers

    def fit(self) -> Result:
        """Train to the configured step, or until a signal; save at the end either way."""
        train, began = self.config.train, time.perf_counter()
        validation: Stats = {}
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            state = self.start()
            step = first = int(state.step)
            if first >= train.steps:
                return Result(first, False, validation)
            writer = stack.enter_context(contextlib.closing(self._begin(first)))
            batches = stack.enter_context(contextlib.closing(self._batches(first)))
            stop, clock, queued = stack.enter_context(Stop(self.plan)), Clock(first), deque()
            while step < train.steps and not stop.agreed:
                state, metrics = self.train_step(state, next(batches))
                step += 1
                queued.append((metrics["loss"], stop.ask()))
                if step == first + 1 or len(queued) > MAX_QUEUED:
                    loss, answer = queued.popleft()
                    jax.block_until_ready(loss)
                    stop.hear(answer)
                if step == first + 1:
                    writer.say(f"first step done {time.perf_counter() - began:.1f} s after start, compilation included")
                    clock = Clock(step)
                if step == first + 1 or _due(step, train.log_every, train.steps):
                    self._log(writer, step, metrics, clock)
                writer.advance(step)
                due = _due(step, train.eval_every, train.steps)
                if due:
                    with clock.paused(state):
                        validation = self._validate(writer, step, state)
                if _due(step, train.checkpoint_every, train.steps):
                    with clock.paused(state):
                        self._save(step, state, validation if due else {})
            if step < train.steps:
                signaled = stop.asked or "a signal to another process"
                writer.say(f"{signaled}: saving step {step} (once more: stop at once)")
                if step != self.checkpoints.latest():
                    self._save(step, state, {})
            self.checkpoints.wait()
        return Result(step, step < train.steps, validation)

    def _begin(self, first: int) -> MetricsWriter | Mute:
        """Write what a run has from its first step on, and open its log."""
        if is_first():
            self.data.tokenizer.save(self.out / "tokenizer.json")
            if self.data.chat_template:
                (self.out / "chat_template.jinja").write_text(self.data.chat_template, encoding="utf-8")
        writer = open_writer(self.out, first, self.config.train.steps, self.config.train.tensorboard)
        if first:
            writer.say(f"resumed from step {first}")
        return writer

    def _batches(self, first: int) -> Generator[Batch, None, None]:
        """Give the batches from step `first` on, on the devices; each process builds the rows of its own."""
        rows = self.config.train.global_batch // self.config.train.microbatches
        part = local_rows(self.plan, rows)
        with contextlib.closing(self.source.batches(first, self.config.data.prefetch, part)) as batches:
            for batch in batches:
                yield place_batch(self.plan, batch, rows, part.start)

    def evaluate(self, state: TrainState) -> Stats:
        """Give loss and bits per byte on the held-out text; inference rules: no dropout, no capacity."""
        rows = max(self.plan.degree("batch"), self.config.train.global_batch // self.config.train.microbatches)
        source, part = BatchSource(self.data.val, rows), local_rows(self.plan, rows)
        sums: list[dict[str, jax.Array]] = [
            self.eval_step(state.params, state.buffers, place_batch(self.plan, batch, rows, part.start))
            for batch in source.eval_batches(self.config.train.eval_batches, part)
        ]
        total = jax.tree.map(lambda *values: float(np.sum(values)), *jax.device_get(sums))
        nats = total["nats"]
        return {
            "val_loss": nats / max(total["tokens"], 1),
            "val_bits_per_byte": nats / math.log(2) / max(total["bytes"], 1),
        }

    def _validate(self, writer: MetricsWriter | Mute, step: int, state: TrainState) -> Stats:
        stats = self.evaluate(state)
        writer.write({"step": step} | stats)
        return stats

    def _log(self, writer: MetricsWriter | Mute, step: int, metrics: dict[str, Any], clock: "Clock") -> None:
        """Fetch one step's metrics (the loop's only wait for the device) and write them."""
        fetched = jax.device_get(metrics)
        self.checkpoints.check()
        record = step_record(step, fetched)
        seconds, steps = clock.lap(step)
        if steps:
            train = self.config.train
            rate = steps * train.global_batch * train.seq_len / seconds / self.plan.mesh.size
            record |= {"tokens_per_s_per_device": rate, "tflops": rate * self.flops / 1e12}
            if self.chip is not None:
                peak = self.chip.flops.get(self.config.model.precision.compute)
                record |= {"mfu": rate * self.flops / peak} if peak else {}
        record["memory_gb"] = device_memory() / 1e9
        if fetched["router"] is not None:
            record["load"] = np.asarray(fetched["router"].load_E).astype(int).tolist()
        writer.write(record)
        in_a_row, limit = int(fetched["skipped_in_a_row"]), self.config.train.max_bad_steps
        if in_a_row >= limit:
            raise FloatingPointError(
                f"step {step}: the gradient was not finite for {in_a_row} steps in a row (train.max_bad_steps = "
                f"{limit}); lower optimizer.lr ({self.config.optimizer.lr:g}) in another --out, or remove the newest "
                f"checkpoints in {self.checkpoints.directory} and --resume"
            )

    def describe_state(self) -> dict[str, Any]:
        """Give what is saved beside the arrays: what a resumed run must agree with, and what may explain it later."""
        return {
            "model": dataclasses.asdict(self.config.model),
            "mesh": dataclasses.asdict(self.plan.config),
            "seed": self.config.train.seed,
            "data": self.data.fingerprint,
            "tokenizer": self.data.tokenizer.hash(),
            "versions": {"jax": jax.__version__, "numpy": np.__version__},
        }

    def _save(self, step: int, state: TrainState, validation: Stats) -> None:
        state = self._reordered(state, self.parts.canonical)
        self.checkpoints.save(step, state, self.describe_state(), validation.get("val_loss"))

    def _reordered(self, state: TrainState, order: Callable[[TrainState], TrainState]) -> TrainState:
        """Bring stacked layers into another order, where an interleaved pipeline has one of its own."""
        if self.plan.config.chunks == 1:
            return state
        places = jax.tree.map(self.plan.place, state_specs(self.parts, self.optimizer))
        return jax.jit(order, out_shardings=places)(state)


class Clock:
    """Times steps, with evaluation and saving left out."""

    def __init__(self, step: int) -> None:
        self._step, self._since, self._out = step, time.perf_counter(), 0.0

    def lap(self, step: int) -> tuple[float, int]:
        """Give seconds and steps since the last lap."""
        now = time.perf_counter()
        seconds, steps = now - self._since - self._out, step - self._step
        self._step, self._since, self._out = step, now, 0.0
        return seconds, steps

    @contextlib.contextmanager
    def paused(self, state: TrainState) -> Generator[None, None, None]:
        """Leave a block's time out, but not that of the steps which still run when it begins."""
        jax.block_until_ready(state)
        began = time.perf_counter()
        yield
        self._out += time.perf_counter() - began


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
