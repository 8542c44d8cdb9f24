"""Which token ids make a golden that does not hang on rounding? Those where every choice is made by a clear margin.

A router's k-th score and the next one, a group's and the next, a greedy step's best logit and the second: where two lie
closer together than MARGIN, another program may choose otherwise and be right. Random ids are drawn, and drawn again
from where a choice was too close.
"""

# pyright: reportMissingImports=false
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

MARGIN = 2e-3
ROWS, LENGTH, PROMPT, NEW, PADDING = 2, 24, 8, 12, 6
"""of a decoder: rows, their length, what is continued and by how much; pads before row 1, instead of its first ids"""
SOURCE, SOURCE_PADDING, TARGET = 20, 5, 16
"""of an encoder-decoder: ids of the source, pads after row 1's, labels"""
FIRST_ID = 3  # below are pad, bos and eos
VARIETY = 5
"""Tokens at least that differ in a continuation: one that repeats itself would hide errors."""


class Margins(TorchFunctionMode):
    """While entered, notes the margin of every choice that torch makes with topk or argmax, as (rows, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and look at its scores where it chooses."""
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and args[0].dim() == 2:  # 3: a sum over a group's best two
            self._note(args[0], args[1] if len(args) > 1 else kwargs["k"])
        elif func in (torch.argmax, torch.Tensor.argmax) and args[0].is_floating_point():
            self._note(args[0], 1)
        return func(*args, **kwargs)

    def _note(self, scores: torch.Tensor, k: int) -> None:
        if k < scores.shape[-1]:
            best = scores.detach().topk(k + 1).values
            self.seen.append((best[..., k - 1] - best[..., k]).reshape(ROWS, -1))

    def of_length(self, length: int) -> torch.Tensor:
        """Give the smallest margin of each of `length` positions, as (rows, length)."""
        return torch.stack(
            [torch.full((ROWS, length), torch.inf), *(m for m in self.seen if m.shape[1] == length)]
        ).amin(0)

    def of_rows(self) -> torch.Tensor:
        """Give the smallest margin of each row."""
        return torch.cat([torch.full((ROWS, 1), torch.inf), *self.seen], dim=1).amin(1)


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Continue `ids` by NEW tokens with transformers' cache, whatever tokens end a text; gives the new ones alone."""
    mask = torch.ones_like(ids) if mask is None else mask
    model.generation_config.eos_token_id = None
    both = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0)
    return both[:, -NEW:]


def left_padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give forward's arguments for row 1 without its first ids and with as many pads before it; row 0 stays whole."""
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def choose(model: Any, rng: np.random.Generator) -> tuple[dict[str, torch.Tensor], float] | None:
    """Draw forward's arguments until every choice has its margin; gives them and the smallest margin, or None."""
    source, target = (SOURCE, TARGET) if model.config.is_encoder_decoder else (LENGTH, 0)
    ids = torch.from_numpy(rng.integers(FIRST_ID, model.config.vocab_size, (ROWS, source + target)))
    weigh = _weigh_pair if target else _weigh_decoder
    for _ in range(1500):
        inputs, margins = weigh(model, ids)
        close = margins < MARGIN
        if not close.any():
            return inputs, float(margins.min())
        for row in close.any(1).nonzero().flatten().tolist():
            position = int(close[row].nonzero()[0])
            ids[row, position] = int(rng.integers(FIRST_ID, model.config.vocab_size))
            if position == 0:  # also stands for the continuation: any id of the prompt, or of the source, may do
                position = int(rng.integers(0, PROMPT if not target else SOURCE - SOURCE_PADDING))
                ids[row, position] = int(rng.integers(FIRST_ID, model.config.vocab_size))
    return None


@torch.no_grad()
def _weigh_decoder(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    labels = ids.clone()
    labels[0, 3] = labels[1, 10:12] = -100
    with Margins() as whole:
        model(input_ids=ids)
    padded = left_padded(ids)
    with Margins() as shifted:
        model(**padded)
    margins = whole.of_length(LENGTH).minimum(
        shifted.of_length(LENGTH).masked_fill(padded["attention_mask"] == 0, torch.inf)
    )
    if (margins >= MARGIN).all():
        margins[:, 0] = margins[:, 0].minimum(_weigh_continuation(model, ids[:, :PROMPT]))
    return {"input_ids": ids, "labels": labels}, margins


@torch.no_grad()
def _weigh_pair(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    source, labels = ids[:, :SOURCE].clone(), ids[:, SOURCE:].clone()
    mask = torch.ones_like(source)
    mask[1, -SOURCE_PADDING:] = 0
    labels[0, 3] = labels[1, 10:12] = -100
    inputs = {"input_ids": source * mask, "attention_mask": mask, "labels": labels}
    with Margins() as whole:
        model(**inputs)
    encoder, decoder = whole.of_length(SOURCE), whole.of_length(TARGET)
    # the decoder reads its labels one later; the first of its choices and those of pads hang on the whole source
    margins = torch.cat([encoder, decoder.roll(-1, 1)], dim=1)
    spread = torch.cat([encoder[:, -SOURCE_PADDING:], decoder[:, :1]], dim=1).amin(1)
    if (margins >= MARGIN).all():
        spread = spread.minimum(_weigh_continuation(model, inputs["input_ids"], mask))
    margins[:, 0] = margins[:, 0].minimum(spread)
    return inputs, margins


def _weigh_continuation(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with Margins() as continued:
        new = greedy(model, ids, mask)
    varied = torch.tensor([len(set(row)) >= VARIETY for row in new.tolist()])
    return continued.of_rows() * varied
