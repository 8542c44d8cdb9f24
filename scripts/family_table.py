"""Measure every Hugging Face family that we have, and print README's table of them.

    python -m scripts.family_table [NAME ...]      names of golden files; default: all

For each golden file of tests/golden/huggingface (made by scripts/make_goldens.py with transformers) the largest errors:
logits of the whole forward and of one token after the other through the cache, both absolute against transformers, in
float32; the gradient of the family's tiny model on 8 devices against one, relative, in float64; and whether what was
read is written back bit for bit. An encoder-decoder's capacity never binds token by token: there greedy tokens count.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.cli import run, setup_jax, use_cpu
from tests.interop.goldens import Golden, cases

MESH = "data2_expert2_tensor2_sp"
DENSE_MESH = "data2_sequence2_tensor2_sp"


def main(argv: list[str]) -> int:
    """Print the table."""
    use_cpu(8)
    setup_jax()
    families: dict[str, list[Golden]] = {}
    for name in argv or cases():
        golden = Golden.load(name)
        families.setdefault(str(golden.config["model_type"]), []).append(golden)
    print("| model type | golden files | logits | with cache | training on a mesh | export |")
    print("|---|---|---|---|---|---|")
    for model_type, goldens in families.items():
        found = [measure(golden) for golden in goldens]
        whole = max(errors[0] for errors in found)
        cached = ", ".join(dict.fromkeys(errors[1] for errors in sorted(found, key=lambda errors: errors[1])[-1:]))
        same = "bit for bit" if all(errors[2] for errors in found) else "DIFFERS"
        mesh, error = training_error(found[0][3])
        row = (f"`{model_type}`", str(len(goldens)), f"{whole:.0e}", cached, f"{error:.0e}, `{mesh}`", same)
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


def measure(golden: Golden) -> tuple[float, str, bool, str]:
    """Give the error of the whole forward, that of the cached one, whether export is import, and the family's name."""
    import numpy as np

    import moejax
    from moejax.interop.files import WeightFiles

    with tempfile.TemporaryDirectory() as scratch:
        folder = golden.write(Path(scratch) / "in", quantised="quantization_config" in golden.config)
        model = moejax.load_pretrained(folder, dtype="float32", dropout=0.0)
        plain = golden.write(Path(scratch) / "plain", quantised=False)
        moejax.save_pretrained(moejax.load_pretrained(plain), Path(scratch) / "out")
        before, after = WeightFiles.open(plain), WeightFiles.open(Path(scratch) / "out")
        whole = {name: (slice(None),) * len(info.shape) for name, info in after.tensors.items()}
        same = all(
            before.read(name, all_).tobytes() == after.read(name, all_).tobytes() for name, all_ in whole.items()
        )
    expected = golden["logits"]
    inputs = inputs_of(golden)
    error = float(np.abs(np.asarray(model(**inputs)) - expected).max())
    if "decoder_input_ids" in golden:
        return error, greedy(model, golden), same, model.config.name
    return error, f"{np.abs(cached_logits(model, golden) - expected).max():.0e}", same, model.config.name


def inputs_of(golden: Golden) -> dict[str, Any]:
    """Give a model's arguments for the golden's logits."""
    inputs = {"input_ids_BT": golden["input_ids"]}
    if "decoder_input_ids" not in golden:
        return inputs
    others = {"attention_mask_BT": "attention_mask", "decoder_input_ids_BT": "decoder_input_ids"}
    return inputs | {name: golden[key] for name, key in others.items()}


def greedy(model: Any, golden: Golden) -> str:
    """Say whether an encoder-decoder goes on as transformers does."""
    from moejax.serve.generate import Generator, generate
    from moejax.serve.sampling import Sampling

    rows = zip(golden["input_ids"], golden["attention_mask"].sum(1), strict=True)
    generator = Generator(model.parts, golden["greedy"].shape[1], Sampling(temperature=0.0))
    written = generate(generator, model.params, model.buffers, [row[:length].tolist() for row, length in rows])
    return "equal tokens" if written == golden["greedy"].tolist() else "OTHER TOKENS"


def cached_logits(model: Any, golden: Golden) -> Any:
    """Feed one token after the other through the cache; give all logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moejax.layers.context import Context

    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    parts, (batch, length) = model.parts, ids.shape
    decoder = parts.merge(model.params, model.buffers)
    blocks = decoder.unstacked()

    @jax.jit
    def step(caches: Any, token_B1: Any, at: Any) -> Any:
        index = jnp.full((batch, 1), at, jnp.int32)
        rows = jnp.arange(batch, dtype=jnp.uint32)
        context = Context(index, index, jnp.ones_like(index), rows, length)
        output, caches = decoder.cached(blocks, token_B1, context, caches)
        return caches, decoder.logits(output)

    caches, found = decoder.empty_caches(batch, length), []
    for at in range(length):
        caches, logits = step(caches, ids[:, at : at + 1], at)
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


def training_error(family: str) -> tuple[str, float]:
    """Train the family's tiny model on a mesh and on one device; give the largest error of a gradient's leaf."""
    import jax

    from experiments.cli import CONFIGS
    from moejax.config import load
    from moejax.config.run import RunConfig, TrainConfig
    from moejax.train.proof import Trial, in_float64, proof_batch, relative_errors, to_numpy

    model_file = CONFIGS / "model" / f"{family}_tiny.toml"
    model = load.read_files(model_file, CONFIGS / "mesh" / "single.toml").model
    name = DENSE_MESH if model.moe is None else MESH
    train = TrainConfig(steps=2, global_batch=8, seq_len=16, microbatches=2)
    gradients, start = [], None
    with jax.enable_x64(True):
        for mesh in ("single", name):
            sized = load.read_files(model_file, CONFIGS / "mesh" / f"{mesh}.toml").mesh
            config = RunConfig(model=in_float64(model), mesh=sized, train=train)
            trial = Trial.of(config, jax.devices()[: 1 if mesh == "single" else 8])
            start = to_numpy(trial.init()) if start is None else start
            batches = [proof_batch(seed, model.vocab, 8, 16, 2) for seed in range(2)]
            gradients.append(trial.train(start, batches).gradient)
    return name, max(relative_errors(gradients[1], gradients[0]).values())


if __name__ == "__main__":
    sys.exit(run(main))
