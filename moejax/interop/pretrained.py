"""A Hugging Face checkpoint folder as a model on a mesh, and a model as such a folder."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from moejax.config.model import ModelConfig, Precision
from moejax.interop import weights
from moejax.interop.config_json import ConfigJson, Json
from moejax.interop.model_types import read_config, write_config
from moejax.interop.writer import write_weights
from moejax.layers.context import Context, Source
from moejax.models import FAMILIES, ModelParts
from moejax.models.decoder import periods
from moejax.models.lora import merge_updates
from moejax.parallel.plan import MeshPlan

Tree = Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What travels with a model from folder to folder."""


@dataclass
class Pretrained:
    """A model with its weights: call it on tokens, train it on (`params`, `buffers`), or save it."""

    parts: ModelParts
    params: Tree
    buffers: Tree
    source: Json = field(default_factory=dict)
    """the config.json that it came from"""
    folder: Path | None = None
    """and its folder"""
    left_out: list[str] = field(default_factory=list)
    """tensors of its files that this architecture does not use"""
    buffer_dtypes: dict[str, Any] = field(default_factory=dict)
    """the dtypes in which its files held the buffers"""

    @property
    def config(self) -> ModelConfig:
        """Give the model's config."""
        return self.parts.config

    def __call__(
        self,
        input_ids_BT: ArrayLike,
        attention_mask_BT: ArrayLike | None = None,
        router_logits: bool = False,
        decoder_input_ids_BT: ArrayLike | None = None,
    ) -> Any:
        """Give logits [B, T, V]; with `router_logits` also those of each sparse layer, a list of [B, T, E].

        Where the mask is 0 nothing is attended to or routed; positions count what it leaves. B and T may be any: they
        are filled up to what the mesh divides. An encoder-decoder reads input_ids, and gives the logits of
        decoder_input_ids. Raises ValueError on a mesh with pipeline stages, or for ids beyond the vocabulary.
        """
        plan = self.parts.plan
        if plan.size("pipeline") > 1:
            raise ValueError(
                f"model(ids) has no stages, and pipeline is {plan.size('pipeline')}: load with pipeline = 1"
            )
        if (decoder_input_ids_BT is None) != (self.config.encoder is None):
            raise ValueError(
                f"{self.config.name} {'takes no' if self.config.encoder is None else 'needs'} decoder_input_ids: "
                "encoder-decoders alone have them"
            )
        *inputs, back = self._laid_out("input_ids", input_ids_BT, attention_mask_BT)
        rows, ways = len(np.asarray(input_ids_BT)), {"encoder": back, "decoder_only": back}
        if decoder_input_ids_BT is not None:
            source = inputs[:2]
            *inputs, back = self._laid_out("decoder_input_ids", decoder_input_ids_BT, None)
            inputs, ways = [*inputs, *source], ways | {"decoder": back}
        logits, seen = self._forward(router_logits)(self.params, self.buffers, *inputs)
        logits = logits[:rows, back]
        if not router_logits:
            return logits
        sparse = [layer for layer in FAMILIES[self.config.name].layers(self.config) if layer.ffn == "sparse"]
        return logits, [x[:rows, ways[layer.part]] for x, layer in zip(seen, sparse, strict=True)]

    def _laid_out(self, name: str, ids: ArrayLike, mask: ArrayLike | None) -> tuple[np.ndarray, ...]:
        """Check ids and fill them up; give ids, segments and positions in the mesh's order, and the way back."""
        plan, ids_BT = self.parts.plan, np.asarray(ids, np.int32)
        if ids_BT.ndim != 2 or ids_BT.size == 0:
            raise ValueError(f"{name} has shape {ids_BT.shape}, expected [batch, length], both at least 1")
        if ids_BT.min() < 0 or ids_BT.max() >= self.config.vocab:
            raise ValueError(f"{name} holds {ids_BT.min()} to {ids_BT.max()}, expected 0 to {self.config.vocab - 1}")
        mask_BT = np.ones_like(ids_BT) if mask is None else np.asarray(mask, np.int32)
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(f"attention_mask has shape {mask_BT.shape}, expected that of {name}, {ids_BT.shape}")
        rows, length = ids_BT.shape
        parts = plan.size("sequence") * (2 if plan.config.context == "ring" else 1)
        divides = parts * plan.size("tensor") if plan.config.sequence_parallel else parts
        fill = ((0, -rows % plan.degree("batch")), (0, -length % divides))
        ids_BT, mask_BT = np.pad(ids_BT, fill), np.pad(mask_BT, fill)
        order = plan.sequence_order(ids_BT.shape[1])
        positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
        inputs = (x[:, order].astype(np.int32) for x in (ids_BT, mask_BT, positions_BT))
        return (*inputs, np.argsort(order)[:length])

    def _forward(self, router_logits: bool) -> Any:
        return self._forwards.setdefault(router_logits, jax.jit(self._program(router_logits)))

    @cached_property
    def _forwards(self) -> dict[bool, Any]:
        return {}

    def _program(self, router_logits: bool) -> Any:
        parts, plan = self.parts, self.parts.plan

        def run(
            params: Tree, buffers: Tree, ids: Array, segments: Array, positions: Array, *source: Array
        ) -> tuple[Array, list[Array]]:
            model = parts.merge(params, buffers)
            context = Context.of(plan, segments, positions, source=Source(*source) if source else None)
            context = dataclasses.replace(context, keep_logits=router_logits)
            output = model(ids, context)
            stats = [layer.logits_BTE for stack in output.stats for layer in stack] if router_logits else []
            return model.logits(output), [plan.agree(x, "batch", "seq") for x in stats if x is not None]

        tokens = plan.spec("batch", "seq")
        ins = (parts.weight_specs(), parts.buffer_specs(), *[tokens] * (3 if parts.config.encoder is None else 5))
        # Stacked layers' logits have a dim of repeats in front.
        outs = (plan.spec("batch", "seq", "vocab"), plan.spec(None, "batch", "seq", None))
        program = plan.spmd(run, ins, outs)

        def forward(*args: Any) -> tuple[Array, list[Array]]:
            logits, stacks = program(*args)
            return logits, self._in_layer_order(stacks) if router_logits else []

        return forward

    def _in_layer_order(self, stacks: list[Array]) -> list[Array]:
        layers, rest = [], iter(stacks)
        for period, repeats in periods(FAMILIES[self.config.name].layers(self.config)):
            sparse = [next(rest) for layer in period if layer.ffn == "sparse"]
            layers += [stack[repeat] for repeat in range(repeats) for stack in sparse]
        return layers


def load_pretrained(
    path: str | Path, *, dtype: str | None = None, plan: MeshPlan | None = None, **changes: Any
) -> Pretrained:
    """Load a Hugging Face folder (config.json, safetensors) onto a mesh, each device reading its own part.

    `dtype` is what weights are kept and multiplied in (default: the files'); `plan` the mesh (default: one device);
    `changes` replace fields of the ModelConfig (remat, unroll, ...). Raises ValueError naming file, tensor, what was
    expected and what found.
    """
    folder = Path(path).expanduser()
    plan = MeshPlan.single() if plan is None else plan
    config = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, precision=precision(dtype))
    config = dataclasses.replace(config, **changes)
    parts = ModelParts.of(config, plan)
    loaded = weights.load(parts, folder)
    return Pretrained(
        parts,
        loaded.params,
        loaded.buffers,
        ConfigJson.read(folder).values,
        folder,
        loaded.left_out,
        loaded.buffer_dtypes,
    )


def precision(dtype: str) -> Precision:
    """Give the precisions of a model that is kept and multiplied in one dtype, and sums in float32 or wider."""
    wide: Any = "float64" if dtype == "float64" else "float32"
    return Precision(params=dtype, compute=dtype, accumulate=wide, router=wide)  # type: ignore[arg-type]


def save_pretrained(model: Pretrained, path: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that transformers loads: config.json, safetensors, and what else the model's folder held.

    Weights are written in the dtype that they are kept in, bit for bit. Raises ValueError for a folder that has weights
    already, and for a model that Hugging Face has no form for.
    """
    folder = Path(path).expanduser()
    written = write_config(model.config, model.source)
    parts, params, buffers = model.parts, model.params, model.buffers
    if model.config.lora is not None:
        parts, params, buffers = merge_updates(parts, params, buffers)
    tensors = weights.tensors(parts, params, buffers, model.buffer_dtypes)
    write_weights(folder, tensors, max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in _companions(model.folder):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _companions(folder: Path | None) -> Iterator[Path]:
    return (folder / name for name in TOKENIZER_FILES if (folder / name).is_file()) if folder else iter(())
