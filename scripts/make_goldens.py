"""Make tests/golden/huggingface: what transformers computes with tiny random models, for tests that have no torch.

    python -m scripts.make_goldens                     all cases of scripts/golden_cases.py (minutes on two cores)
    python -m scripts.make_goldens mixtral llama       these alone
    python -m scripts.make_goldens --check OUT llama   does OUT, a folder we exported, load in transformers and agree?

Needs the `parity` extra (torch, transformers, safetensors), not jax. A case's weights come from tests/interop/recipe.py
and are not kept; its npz holds what tests/interop/goldens.py's Golden says, and arrays, of float32 unless int32:

    input_ids, labels (2, 24)          labels are the ids with a few -100; loss: without the routers' part
    logits, loss                       of input_ids; the loss shifts the labels itself, but for Switch
    aux_loss, total_loss               of families that have one: total_loss is what grad_norms are of
    router_logits (layers, 2, 24, E)   of the layers that have experts, as transformers returns them
    greedy (2, 12)                     what follows input_ids[:, :8], with a cache
    leftpad_ids, leftpad_mask          row 0 as above, row 1 with pads for its first ids; leftpad_logits: 0 at pads

An encoder-decoder has input_ids (2, 20), attention_mask (pads after row 1), labels (2, 16), decoder_input_ids, greedy
from the start token, {encoder,decoder}_{z_loss,aux_loss,router_logits}, and no left padding.
"""

# pyright: reportMissingImports=false
import argparse
import copy
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from scripts import golden_tokens
from scripts.golden_cases import CASES, Case, legacy, with_field
from tests.interop import goldens, recipe
from tests.interop.goldens import Golden
from tests.interop.recipe import TensorSpec

CLOSE = 1e-3
"""What logits may differ by; rounding makes 2e-5."""
FELT = 1e-2
"""What a field that matters must move a logit by."""
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Buffers that MiniMax's file has, though they follow from the config: the only weights an npz keeps."""

FLOAT32 = ("weight_scale_inv", "e_score_correction_bias", *TABLES)
"""Tensors that a file in bfloat16 has in float32."""


def model_class(config: Any) -> Any:
    """Choose the class that computes logits."""
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def load_model(folder: Path) -> Any:
    """Load a folder in float32 with plain attention and experts, refusing one that lacks or adds a tensor."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, report = model_class(config).from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    prediction = (
        f"model.layers.{config.num_hidden_layers}."  # DeepSeek's layers for multi-token prediction are left out
    )
    report = {
        key: [name for name in map(str, names) if not name.startswith(prediction)] for key, names in report.items()
    }
    report["missing_keys"] = [
        name for name in report["missing_keys"] if not name.endswith(TABLES)
    ]  # computed if not there
    wrong = {key: names for key, names in report.items() if names}
    if wrong:
        raise ValueError(f"{folder}: transformers does not read it whole: {wrong}")
    return model.eval()


def describe(name: str, case: Case, seed: int) -> Golden:
    """Let transformers write the case's file once, and give a golden that says what stands in it, not what follows."""
    with tempfile.TemporaryDirectory() as temporary:
        config = transformers.AutoConfig.for_model(
            case.model_type, **copy.deepcopy(case.config)
        )  # it writes into rope_parameters
        model_class(config).from_config(config, dtype=torch.float32).save_pretrained(temporary)
        text = json.loads((Path(temporary) / "config.json").read_text())
        written = read_tensors(Path(temporary))
    kept = {f"kept/{key}": value for key, value in written.items() if key.endswith(TABLES)}
    specs = [TensorSpec(key, value.shape, "F32") for key, value in written.items()]
    if case.quantisation:
        text["quantization_config"] = case.quantisation
        block = case.quantisation.get("weight_block_size", [0])[0]
        specs = recipe.quantised_fp8(specs, block) if block else recipe.quantised_mxfp4(specs)
    if case.prediction_layers:
        specs += prediction_layer(text)
    if case.storage == "BF16":
        text["dtype"] = "bfloat16"
        specs = [
            spec._replace(dtype="BF16") if spec.dtype == "F32" and not spec.name.endswith(FLOAT32) else spec
            for spec in specs
        ]
    golden = Golden(name, text, legacy(text, case.legacy), specs, {}, {"seed": seed}, kept)
    golden.facts["sha256"] = recipe.sha256(golden.weights)
    return golden


def prediction_layer(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Name tensors that only DeepSeek's multi-token prediction has."""
    prefix, width, vocab = f"model.layers.{config['num_hidden_layers']}", config["hidden_size"], config["vocab_size"]
    norms = [TensorSpec(f"{prefix}.{norm}.weight", (width,), "F32") for norm in ("enorm", "hnorm", "shared_head.norm")]
    return [*norms, TensorSpec(f"{prefix}.eh_proj.weight", (width, 2 * width), "F32"),
            TensorSpec(f"{prefix}.shared_head.head.weight", (vocab, width), "F32")]  # fmt: skip


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read a folder's one safetensors file."""
    return load_file(folder / "model.safetensors")


def measure(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run the model on chosen arguments; gives the arrays to keep, and the loss to differentiate."""
    plain = model(**inputs)
    found = {**inputs, "logits": plain.logits, "loss": plain.loss}
    loss = plain.loss
    if model.config.is_encoder_decoder or hasattr(model.config, "output_router_logits"):
        routed = model(**inputs, output_router_logits=True)
        if routed.loss.item() != plain.loss.item():
            found["total_loss"] = loss = routed.loss
        for key in ("aux_loss", *(f"{half}_{kind}_loss" for half in ("encoder", "decoder") for kind in ("z", "aux"))):
            if getattr(routed, key, None) is not None:
                found[key] = getattr(routed, key)
        for key in ("router_logits", "encoder_router_logits", "decoder_router_logits"):
            if getattr(routed, key, None):
                layers = torch.stack([layer for layer in getattr(routed, key) if layer is not None])
                found[key] = layers.reshape(layers.shape[0], golden_tokens.ROWS, -1, layers.shape[-1])
    return found, loss


def measure_decoder(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Continue and left-pad, and see that transformers agrees with itself."""
    new = golden_tokens.greedy(model, ids[:, : golden_tokens.PROMPT])
    whole = torch.cat([ids[:, : golden_tokens.PROMPT], new], dim=1)
    with torch.no_grad():
        again = model(input_ids=whole).logits.argmax(-1)[:, golden_tokens.PROMPT - 1 : -1]
        padded = golden_tokens.left_padded(ids)
        logits = model(**padded).logits * padded["attention_mask"][..., None]
        alone = model(input_ids=ids[1:, golden_tokens.PADDING :]).logits
    require(bool((again == new).all()), "greedy tokens with and without a cache differ")
    require(distance(logits[1:, golden_tokens.PADDING :], alone) < CLOSE, "left padding changes logits")
    return {
        "greedy": new,
        "leftpad_ids": padded["input_ids"],
        "leftpad_mask": padded["attention_mask"],
        "leftpad_logits": logits,
    }


def measure_pair(model: Any, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Decode greedily, and see that experts overflow."""
    for half in ("encoder", "decoder"):
        chosen = found[f"{half}_router_logits"].argmax(-1)
        load = torch.nn.functional.one_hot(chosen, model.config.num_experts).sum(-2)
        require(int(load.max()) > model.config.expert_capacity, f"no expert of the {half} overflows")
    return {
        "greedy": golden_tokens.greedy(model, found["input_ids"], found["attention_mask"]),
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(found["labels"]),
    }


def gradient_norms(model: Any, loss: torch.Tensor) -> dict[str, float]:
    """Give the gradient's L2 norm by the file's tensors; the model's weights are lost."""
    loss.backward()
    for parameter in model.parameters():  # transformers writes gradients as it writes weights: split and renamed
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for buffer in model.buffers():
        buffer.zero_()
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        gradients = read_tensors(Path(temporary))
    if "shared.weight" in gradients:  # an untied Switch reads copies of it: the gradient of the one table is their sum
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            gradients["shared.weight"] = gradients["shared.weight"] + gradients.pop(name, 0)
    return {
        name: float(np.linalg.norm(value.astype(np.float64)))
        for name, value in gradients.items()
        if not name.endswith(TABLES)
    }


def check_spellings(golden: Golden, case: Case, folder: Path) -> None:
    """See that the legacy config means the same, and that what should matter does."""
    inputs = forward_inputs(golden)
    want = torch.from_numpy(golden["logits"])
    variants = {key: with_field(golden.config, key, value) for key, value in case.matters.items()}
    for key, config in {"legacy": golden.config_legacy, **variants}.items():
        plain = {field: value for field, value in config.items() if field != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(plain))
        with torch.no_grad():
            moved = distance(load_model(folder)(**inputs).logits, want)
        if key == "legacy":
            require(moved < CLOSE, f"the legacy config moves logits by {moved:.1e}")
        else:
            require(moved > FELT, f"{key} = {case.matters[key]} moves no logit by more than {moved:.1e}")


def forward_inputs(golden: Golden) -> dict[str, torch.Tensor]:
    """Give what logits are computed of."""
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    return {name: torch.from_numpy(golden[name].astype(np.int64)) for name in names if name in golden}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Give the largest difference of two tensors."""
    return float((ours - theirs).abs().max())


def require(holds: bool, otherwise: str) -> None:
    """Refuse a golden that would test nothing, or nothing sure."""
    if not holds:
        raise ValueError(otherwise)


def make(name: str, case: Case) -> Golden:
    """Make a case's golden, with the first seed whose weights let tokens be found."""
    for seed in range(zlib.crc32(name.encode()), zlib.crc32(name.encode()) + 20):
        golden = describe(name, case, seed)
        with tempfile.TemporaryDirectory() as temporary:
            folder = golden.write(Path(temporary), quantised=False)
            model = load_model(folder)
            chosen = golden_tokens.choose(model, np.random.default_rng(seed))
            if chosen is None:
                continue
            found, loss = measure(model, chosen[0])
            if model.config.is_encoder_decoder:
                found |= measure_pair(model, found)
            else:
                found |= measure_decoder(model, found["input_ids"])
            arrays = {key: value.detach().numpy() for key, value in found.items()}
            arrays = {
                key: value.astype(np.int32 if value.dtype.kind == "i" else np.float32) for key, value in arrays.items()
            }
            golden.arrays.update(arrays)
            golden.grad_norms.update(gradient_norms(model, loss))
            golden.facts.update(margin=chosen[1], transformers=transformers.__version__, torch=torch.__version__)
            check_spellings(golden, case, folder)
        return golden
    raise ValueError(f"{name}: no seed gives tokens whose choices are all clear by {golden_tokens.MARGIN}")


def check(folder: Path, golden: Golden) -> bool:
    """Say whether a folder's logits in transformers are the golden ones."""
    with torch.no_grad():
        moved = distance(load_model(folder)(**forward_inputs(golden)).logits, torch.from_numpy(golden["logits"]))
    print(f"{golden.name}: {folder} is {'right' if moved < CLOSE else 'WRONG'}: logits differ by at most {moved:.1e}")
    return moved < CLOSE


def main() -> None:
    """Make goldens, or check a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; without: all")
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER", help="compare a Hugging Face folder with one CASE's golden"
    )
    parser.add_argument("--out", type=Path, default=goldens.FOLDER, help="where npz files go [%(default)s]")
    arguments = parser.parse_args()
    for name in arguments.cases:
        if name not in CASES:
            parser.error(f"{name} is no case; there are: {', '.join(CASES)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.check:
        if len(arguments.cases) != 1:
            parser.error("--check FOLDER needs the one CASE to compare with")
        sys.exit(not check(arguments.check, Golden.load(arguments.cases[0], arguments.out)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        start = time.perf_counter()
        golden = make(name, CASES[name])
        path = golden.save(arguments.out)
        seconds = time.perf_counter() - start
        print(
            f"{path}: {path.stat().st_size / 1e3:.0f} kB, margin {golden.facts['margin']:.1e}, {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
