"""What every experiment's command line shares: which model, which mesh, where to, and any field of the run's config.

    def main(argv: list[str]) -> None:
        arguments = cli.parse(argv, name="train", doc=__doc__)
        cli.setup_jax()
        resuming = cli.prepare_out(arguments.out, arguments.config, arguments.resume)
        ...

    if __name__ == "__main__":
        sys.exit(cli.run(main))

Imports no jax: `--fake-devices` must be heard before jax starts.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from experiments.process import run, setup_jax, use_cpu
from experiments.run_dir import prepare_out
from moejax.config import load
from moejax.config.load import ConfigError
from moejax.config.run import RunConfig

__all__ = ["CONFIGS", "SMOKE", "Arguments", "Parser", "parse", "prepare_out", "run", "setup_jax", "use_cpu"]

CONFIGS: Final = Path(__file__).parent / "configs"

SMOKE_MODEL: Final = "mixtral_tiny"
SMOKE: Final[Mapping[str, Any]] = {
    "model.vocab": 512,
    "train.steps": 10,
    "train.global_batch": 8,
    "train.seq_len": 64,
    "train.log_every": 2,
    "train.eval_every": 5,
    "train.eval_batches": 2,
    "train.checkpoint_every": 5,
}
"""What `--smoke` sets unless an experiment says otherwise."""

FINE_TUNING_LR: Final = 2e-5
"""Of weights that were read; low-rank updates want ten times as much."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line said."""

    config: RunConfig
    """files, then --smoke, then dotted options"""
    out: Path
    """where the run writes; see prepare_out"""
    resume: bool
    """go on with the run in `out`"""
    smoke: bool
    """a minute on a CPU"""
    options: argparse.Namespace
    """the experiment's own options"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are ConfigErrors, one line each."""

    def __init__(self, name: str, doc: str | None, *, add_help: bool = True) -> None:
        super().__init__(
            prog=f"python -m experiments.{name}",
            usage="%(prog)s [options] [--table.key VALUE ...]",
            description=doc,
            add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of exiting."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse(
    argv: list[str],
    *,
    name: str,
    doc: str | None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
    smoke: Mapping[str, Any] = SMOKE,
    smoke_model: str = SMOKE_MODEL,
) -> Arguments:
    """Read the command line of experiment `name`; raise ConfigError at the first mistake, SystemExit after --help.

    `add_options` adds the experiment's own options to the parser; they come back as `Arguments.options`. `smoke` maps
    dotted keys to what --smoke makes of them.
    """
    parser = _shared_parser(name, doc)
    shared = {action.dest for action in parser._actions}
    if add_options:
        add_options(parser)
    dotted, rest = split_dotted(argv)
    if {"-h", "--help"} & set(rest):
        for action in parser._actions:
            action.required = False
    known, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_nearest_option(unknown[0], parser)}")
    if known.fake_devices is not None or known.smoke:
        use_cpu(known.fake_devices)
    config = _read_config(known, smoke_model)
    if known.smoke:
        fixed = {} if not config.train.init_from else {"model"}  # a model that was read keeps its sizes
        config = load.override(config, {k: v for k, v in smoke.items() if k.split(".")[0] not in fixed}, "--smoke")
    if dotted:
        config = load.override(config, dotted, "command line")
    if known.help:
        print(parser.format_help() + _dotted_help(config))
        raise SystemExit(0)
    out = known.out or Path(tempfile.mkdtemp(prefix=f"moejax_{name}_") if known.smoke else f"runs/{name}")
    options = argparse.Namespace(**{key: value for key, value in vars(known).items() if key not in shared})
    return Arguments(config, out, known.resume, known.smoke, options)


def split_dotted(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `--table.key value`, `--table.key=value`, `--table.flag` and `--table.no-flag` out of the arguments."""
    hints = load.option_hints(RunConfig)
    dotted: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not (flag.startswith("--") and "." in flag):
            rest.append(word)
            continue
        key = flag[2:].replace("-", "_")
        negated = re.sub(r"\.no_(\w+)$", r".\1", key)
        if key not in hints and hints.get(negated) is bool and not equals:
            dotted[negated] = False
        elif key not in hints:
            raise ConfigError(f"unknown option {flag}{_nearest_key(key, hints)}")
        elif equals:
            dotted[key] = load.parse_value(value, hints[key])
        elif hints[key] is bool and (not words or words[0].lower() not in load.TRUE_WORDS + load.FALSE_WORDS):
            dotted[key] = True
        elif not words or words[0].startswith("--"):
            raise ConfigError(f"{flag} needs a value")
        else:
            dotted[key] = load.parse_value(words.pop(0), hints[key])
    return dotted, rest


def _shared_parser(name: str, doc: str | None) -> Parser:
    parser = Parser(name, doc, add_help=False)  # its help waits for the model file, whose values it shows
    parser.add_argument("-h", "--help", action="store_true", help="show this, with the chosen model's defaults")
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        help="model file, or a Hugging Face folder (default: demo, or the resumed run's)",
    )
    parser.add_argument("--mesh", metavar="NAME|PATH", help="mesh file (default: single, or the resumed run's)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where the run writes (default: runs/{name})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--smoke", action="store_true", help=f"try it: {SMOKE_MODEL} on the CPU, under a minute")
    parser.add_argument("--fake-devices", type=int, metavar="N", help="cut the CPU into N devices")
    parser.epilog = _epilog(parser.prog)
    return parser


def _epilog(prog: str) -> str:
    lists = "\n\n".join(
        f"{kind} files (or give a path):\n"
        + "\n".join(f"  {name:28} {_first_comment(CONFIGS / kind / f'{name}.toml')}" for name in names)
        for kind in ("model", "mesh")
        if (names := load.config_names(kind, CONFIGS))
    )
    return (
        f"examples:\n"
        f"  {prog} --smoke\n"
        f"  {prog} --model mixtral_tiny --mesh tensor4_data2 --fake-devices 8 --train.steps 100\n"
        f"  {prog} --out runs/mine --resume --train.steps 600\n\n{lists}\n\n"
        "any field of the config, named with dots, beats the files:\n"
    )


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""


def _read_config(known: argparse.Namespace, smoke_model: str) -> RunConfig:
    """Read the files that were named; a resumed run's own config stands in for those that were not."""
    saved = known.out / "config.toml" if known.resume and known.out else None
    stand_in = str(saved) if saved and saved.is_file() else None
    model = known.model or stand_in or (smoke_model if known.smoke else "demo")
    mesh = load.find_config("mesh", known.mesh or stand_in or "single", CONFIGS)
    folder = Path(model).expanduser()
    if folder.is_dir() and ("/" in model or (folder / "config.json").is_file()):  # else a name that a folder has too
        return read_open_weights(folder, mesh)
    return load.read_files(load.find_config("model", model, CONFIGS), mesh)


def read_open_weights(folder: Path, mesh: Path) -> RunConfig:
    """Make a run's config from a Hugging Face folder: its model, its tokenizer, its weights to start from.

    Raises ValueError naming file and key where config.json is none of ours.
    """
    from moejax.interop.model_types import read_config  # not for every --help

    table = load.load_toml(mesh)
    run = load.build(RunConfig, {"mesh": table["mesh"]} if "mesh" in table else {}, str(mesh))
    run = dataclasses.replace(run, model=read_config(folder))
    values: dict[str, Any] = {"train.init_from": str(folder), "optimizer.lr": FINE_TUNING_LR}
    if (folder / "tokenizer.json").is_file():
        values["data.tokenizer"] = str(folder / "tokenizer.json")
    return load.override(run, values, str(folder))


def _dotted_help(config: RunConfig) -> str:
    """Let tyro draw every field with its type, its docstring and this config's value."""
    import tyro

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(RunConfig, default=config, args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    lines = text.getvalue().splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if "model options" in line), 0)  # after tyro's own usage line
    return "".join(lines[first:])


def _nearest_key(key: str, hints: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, hints, n=1)
    return f": did you mean --{near[0].replace('_', '-')}?" if near else ""


def _nearest_option(word: str, parser: argparse.ArgumentParser) -> str:
    """Name the nearest option, with or without a dot."""
    options = {option: option for option in parser._option_string_actions}
    options |= {f"--{key.rpartition('.')[2]}": f"--{key}" for key in load.option_hints(RunConfig)}
    near = difflib.get_close_matches(word.replace("-", "_").replace("__", "--", 1), options, n=1)
    return f": did you mean {options[near[0]].replace('_', '-')}?" if near else ""
