"""How does a conversation become tokens, and which of them are the assistant's answers?

A row is rendered by the model's chat template into one marked text. U+FDD0 stands inside whatever spells a special
token in the row: the template's specials are tokens, those that somebody wrote stay text. U+FDD1 and U+FDD2 stand
around each answer, its end-of-turn token included. None of them is a token; a token is of an answer if any character
of it is. Answers are the template's {% generation %} blocks. Where it has none, an answer is what a message
adds to those before it with add_generation_prompt: the text that the model is given when it is to answer.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moejax.config.run import DataConfig
from moejax.data.chat_template import BEGIN, END, ChatTemplate
from moejax.data.sources import RawDocument, SourceFile, jsonl_rows
from moejax.data.tokenizer import Tokenizer

TEXT = "\ufdd0"
_MARKS = TEXT + BEGIN + END
_ANSWER = re.compile(f"{BEGIN}(.*?){END}", re.DOTALL)
_HOW = "put {% generation %} … {% endgeneration %} around the answers in a copy of it, named by data.chat_template"


class ChatFormat:
    """How the rows of chat data are read: the key of their messages, and the template that renders them."""

    def __init__(self, template: ChatTemplate, field: str = "messages"):
        self.template = template
        self._field = field
        specials = sorted(template.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"\Z(?!\Z)")
        self._first_of_special = re.compile(f"(?=(?:{self._special.pattern}))(.)", re.DOTALL)
        # words are let be, because templates compare them (role == "user"); specials begin with a sign
        signs = [special for special in specials if not special[0].isalnum()]
        self._openings = {special[:n] for special in signs for n in range(1, len(special))}
        self._longest = max(map(len, self._openings), default=0)

    @classmethod
    def of(cls, config: DataConfig) -> "ChatFormat":
        """Find the template of a config."""
        return cls(ChatTemplate.find(config), config.messages_field)

    def hash(self) -> str:
        """Hash what decides the texts of given rows."""
        return f"{self._field} {self.template.hash()}"

    def read(self, file: SourceFile) -> Iterator[RawDocument]:
        """Read the conversations of a .jsonl file as marked texts, empty where no assistant speaks.

        Raises ValueError, naming file and line, for a row that is no conversation or that the template refuses.
        """
        if file.path.suffix.lower() != ".jsonl":
            raise ValueError(f'data.format = "chat" reads .jsonl files, not {file.path}: set data.source to such files')
        for number, row in jsonl_rows(file.path, self._field, "messages_field"):
            try:
                text = self.render(row)
            except ValueError as error:
                raise ValueError(f"{file.path}, line {number}: {error}") from None
            yield RawDocument(f"{file.name}:{number}", file.name, text)

    def render(self, row: dict[str, Any]) -> str:
        """Render a row's messages, with its tools and chat_template_kwargs, into a marked text; "" without answers."""
        messages = self._guarded(_messages(row[self._field], self._field))
        if not any(message["role"] == "assistant" for message in messages):
            return ""
        others = self._guarded({"tools": row.get("tools")} | _settings(row))
        text = self.template.render(messages, False, others)
        if not self.template.marks_answers:
            text = self._marked(text, messages, others)
        if not self.answers(text).strip():
            raise ValueError(f"the answers hold no text as the chat template ({self.template.place}) renders them")
        _check_utf8(text)
        return text

    def prompt(self, content: str) -> str:
        """Render a user's message, marked, up to where the assistant is to answer."""
        return self.template.render(self._guarded([{"role": "user", "content": content}]), True, {})

    def answers(self, text: str) -> str:
        """Take the answers' own text, which the loss counts, out of a marked text."""
        return self.words("".join(_ANSWER.findall(text)))

    def words(self, text: str) -> str:
        """Take specials and marks out of a marked text."""
        return _without(self._special.sub("", text), _MARKS)

    def _guarded(self, value: Any) -> Any:
        """Copy JSON with a mark inside whatever spells a special, and behind what a neighbour could make one of."""
        if isinstance(value, dict):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._guarded(item) for item in value]
        if not isinstance(value, str):
            return value
        if mark := next((mark for mark in _MARKS if mark in value), None):
            raise ValueError(f"the text holds U+{ord(mark):04X}, which marks answers here: remove it")
        value = self._first_of_special.sub(rf"\1{TEXT}", value)
        body = value.rstrip()
        if any(body[-n:] in self._openings for n in range(1, min(self._longest, len(body)) + 1)):
            return body + TEXT + value[len(body) :]
        return value

    def _marked(self, text: str, messages: Sequence[dict[str, Any]], others: dict[str, Any]) -> str:
        """Mark what each of the assistant's messages adds to the text."""
        parts, done = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.template.render(messages[:i], True, others)
            after = self.template.render(messages[: i + 1], False, others)
            where = f"{self._field}[{i}]: the chat template ({self.template.place})"
            if not after.startswith(before):
                raise ValueError(
                    f"{where} must render the messages before an answer, with add_generation_prompt, as the beginning "
                    f"of what it renders with the answer: {_HOW}"
                )
            if not text.startswith(after):
                raise ValueError(f"{where} must not render an answer otherwise because messages follow: {_HOW}")
            stop = self._end_of_turn(text, len(before), len(after))
            parts += [text[done : len(before)], BEGIN, text[len(before) : stop], END]
            done = stop
        return "".join([*parts, text[done:]])

    def _end_of_turn(self, text: str, start: int, stop: int) -> int:
        """Leave out the blanks behind a last special: the model stops there, and the template goes on."""
        last = max((match.end() for match in self._special.finditer(text[start:stop])), default=0)
        return start + last if last and not text[start + last : stop].strip() else stop


def encode_chats(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Encode marked texts: the ids of each, as the template has them, and which of them are of answers."""
    # without the marks around answers, because a special may take the blanks beside it, which a mark would part from it
    plain = [_without(text, BEGIN + END) for text in texts]
    ids, answers = [], []
    for text, (tokens, spans) in zip(texts, tokenizer.encode_with_specials(plain, TEXT), strict=True):
        chars = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        begins, ends = chars == ord(BEGIN), chars == ord(END)
        inside = (np.cumsum(begins) > np.cumsum(ends))[~(begins | ends)]
        counted = np.concatenate([[0], np.cumsum(inside)])
        ids.append(tokens)
        answers.append(counted[spans[:, 1]] > counted[spans[:, 0]])
    return ids, answers


def _without(text: str, marks: str) -> str:
    for mark in marks:
        text = text.replace(mark, "")  # many times as fast as str.translate
    return text


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    rule = 'must be a list of {"role": …, "content": …}'
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{field!r} is {found}, {rule}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{field}[{i}] is a {type(message).__name__}: {field!r} {rule}")
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            keys = ", ".join(map(repr, message)) or "none"
            raise ValueError(f"{field}[{i}] has the keys {keys}: {field!r} {rule}")
    # as transformers does: templates ask whether a key is there, not whether it is null
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    found = row.get("chat_template_kwargs") or {}
    if not isinstance(found, dict):
        raise ValueError(f"'chat_template_kwargs' is a {type(found).__name__}, must be an object: correct it")
    return found


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair; no UTF-8 says it
        raise ValueError(f"a lone surrogate, {json.dumps(text[error.start])}, in the messages: replace it") from None
