"""Which chat template does a run use, and what text does it make of messages?

The environment is that of `transformers`, with two differences. `{% generation %}` blocks leave marks in the text, so
that no offsets are carried beside it. And `strftime_now` gives one fixed date: rows depend on their files alone.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moejax.config.run import DataConfig
from moejax.data.tokenizer import BOS, EOS, Tokenizer

BEGIN, END = "\ufdd1", "\ufdd2"  # Unicode sets U+FDD0 to U+FDEF apart for use inside programs: no text has them

# our own tokenizers have no other specials: begin opens a turn, end closes it, as a text's begin and end do
BUILT_IN = (
    "{% for message in messages %}{{ bos_token + message.role + '\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)

_TODAY = datetime(2024, 7, 26)  # what Llama 3.1's template says where it knows no date


class ChatTemplate:
    """A compiled template with the names of special tokens that it may use."""

    def __init__(self, source: str, names: Mapping[str, str], specials: Sequence[str], place: str = "built-in"):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template ({place}), line {error.lineno}: no jinja template ({error.message}): correct it"
            ) from None
        self.source = source
        self.names = dict(names)
        self.specials = tuple(specials)
        self.place = place
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    @classmethod
    def find(cls, config: DataConfig) -> "ChatTemplate":
        """Find the template of data.chat_template, beside the tokenizer, or the built-in one of our own tokenizers.

        Raises ValueError where there is none or a file is not readable, FileNotFoundError where a named one is missing.
        """
        specials = (BOS, EOS)
        if config.tokenizer not in ("bytes", "bpe"):
            tokenizer = Tokenizer.load(config.tokenizer)
            specials = tuple(tokenizer.specials)
        folder = Path(config.tokenizer).expanduser().parent
        ours = set(specials) == {BOS, EOS}
        names = {"bos_token": BOS, "eos_token": EOS} if ours else _token_names(folder)
        if config.chat_template:
            path = Path(config.chat_template).expanduser()
            if not path.is_file():
                raise FileNotFoundError(
                    f"data.chat_template ({path}) is no file: give a .jinja file, or leave it empty"
                )
            return cls(_read(path), names, specials, str(path))
        beside = None if config.tokenizer in ("bytes", "bpe") else _beside(folder)
        if beside is None and not ours:
            raise ValueError(
                f"no chat template: {folder / 'chat_template.jinja'} is missing, {folder / 'tokenizer_config.json'} "
                "has no (default) chat_template: set data.chat_template to a .jinja file"
            )
        source, place = beside or (BUILT_IN, "built-in")
        return cls(source, names, specials, place)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, others: dict[str, Any]) -> str:
        """Render messages; raise ValueError with the template's own words where it refuses them."""
        values = {"tools": None, "documents": None} | self.names | others
        try:
            return self._template.render(
                **values | {"messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ValueError(f"the chat template ({self.place}) refuses it: {' '.join(str(error).split())}") from None

    def hash(self) -> str:
        """Hash what decides the rendered text."""
        parts = (self.source, sorted(self.names.items()), sorted(self.specials), str(_TODAY))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Generation(Extension):
    """The block {% generation %} … {% endgeneration %}: what the model is to write."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(lineno)

    def _mark(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _TODAY.strftime}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own writes < and > as escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _beside(folder: Path) -> tuple[str, str] | None:
    """Find a template's source and its place in the folder of a tokenizer.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path), str(path)
    path = folder / "tokenizer_config.json"
    found = _json(path).get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    return (found, str(path)) if isinstance(found, str) else None


def _token_names(folder: Path) -> dict[str, str]:
    """Read bos_token, eos_token and the like; tokenizer_config.json goes before special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}): save it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}, must be an object: save it again")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {error.start}: convert the file to UTF-8") from None
