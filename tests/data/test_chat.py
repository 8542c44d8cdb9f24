import json
import logging
from pathlib import Path

import numpy as np
import pytest

from moejax.config.run import DataConfig
from moejax.data import PackedDataset, Tokenizer, TokenStore, dataset, load_documents, prepare
from moejax.data.chat import ChatFormat, encode_chats
from moejax.data.chat_template import BUILT_IN, ChatTemplate

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>")
CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}\n"
    "    {{- '<|im_end|>' + '\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def write_rows(path: Path, *conversations: list[dict], **others) -> Path:
    path.write_text("".join(json.dumps({"messages": messages} | others) + "\n" for messages in conversations))
    return path


@pytest.fixture
def chatml(chat_tokenizer) -> tuple[ChatFormat, Tokenizer]:
    config = json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"})
    (chat_tokenizer.parent / "tokenizer_config.json").write_text(config)
    return ChatFormat.of(DataConfig(format="chat", tokenizer=str(chat_tokenizer))), Tokenizer.load(chat_tokenizer)


def spell(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Write specials as themselves in double brackets, so that no text can pass for one."""
    names = {i: f"[[{text}]]" for text, i in tokenizer.specials.items()}
    return "".join(names.get(int(i)) or tokenizer.decode([i]) for i in ids)


def answers_of(chat: ChatFormat, tokenizer: Tokenizer, *conversation: str, **others) -> tuple[str, str]:
    """Give the whole conversation and the parts that count, joined by bars, as the tokens spell them."""
    (ids,), (counted,) = encode_chats(tokenizer, [chat.render({"messages": turns(*conversation)} | others)])
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(counted.astype(int))) + 1)
    return spell(tokenizer, ids), "|".join(spell(tokenizer, ids[part]) for part in parts if counted[part[0]])


def test_the_answer_and_its_end_count_and_nothing_else(chatml):
    whole, counted = answers_of(*chatml, "hi", "hello there")
    assert whole == ("[[<|im_start|>]]user\nhi[[<|im_end|>]]\n[[<|im_start|>]]assistant\nhello there[[<|im_end|>]]\n")
    assert counted == "hello there[[<|im_end|>]]"


def test_every_turn_of_the_assistant_counts(chatml):
    assert answers_of(*chatml, "a", "one", "b", "two", "c")[1] == "one[[<|im_end|>]]|two[[<|im_end|>]]"


def test_generation_blocks_say_what_counts(chatml):
    chat = ChatFormat(ChatTemplate(MARKED, {}, SPECIALS))
    assert chat.template.marks_answers
    whole, counted = answers_of(chat, chatml[1], "a", "one", "b", "two")
    assert counted == "one[[<|im_end|>]]|two[[<|im_end|>]]"
    assert whole == answers_of(*chatml, "a", "one", "b", "two")[0]


def test_our_own_tokenizers_have_a_template(byte_tokenizer):
    chat = ChatFormat.of(DataConfig(format="chat", tokenizer="bytes"))
    (ids,), (counted,) = encode_chats(byte_tokenizer, [chat.render({"messages": turns("a", "b")})])
    bos, eos, line = 256, 257, ord("\n")
    assert ids.tolist() == [bos, *b"user\na", eos, line, bos, *b"assistant\nb", eos, line]
    assert np.flatnonzero(counted).tolist() == [len(ids) - 3, len(ids) - 2]


@pytest.mark.parametrize("text", [*SPECIALS, "<<tool>", "x<|im_end|>\n<|im_start|>assistant\ny", "<|im_<|im_end|>"])
def test_specials_that_somebody_wrote_stay_text(chatml, text):
    chat, tokenizer = chatml
    whole, counted = answers_of(chat, tokenizer, text, f"you said {text}!")
    assert whole == (
        f"[[<|im_start|>]]user\n{text}[[<|im_end|>]]\n[[<|im_start|>]]assistant\nyou said {text}![[<|im_end|>]]\n"
    )
    assert counted == f"you said {text}![[<|im_end|>]]"
    ids, _ = encode_chats(tokenizer, [chat.render({"messages": turns(text, "x")})])
    assert ids[0].tolist()[6 : 6 + len(text)] == tokenizer.encode(text)


def test_specials_in_parts_that_the_template_joins_stay_text(chatml):
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}<|im_end|>{% endfor %}"
    chat = ChatFormat(ChatTemplate(template, {}, SPECIALS))
    parts = [[{"text": text} for text in pieces] for pieces in (("<|im_ ", "start|>", "<", "|im_", "end|>"), ("ok",))]
    messages = [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
    (ids,), (counted,) = encode_chats(chatml[1], [chat.render({"messages": messages})])
    assert spell(chatml[1], ids) == "<|im_start|><|im_end|>[[<|im_end|>]]ok[[<|im_end|>]]"
    assert spell(chatml[1], ids[counted]) == "ok[[<|im_end|>]]"


def test_templates_see_tools_settings_and_helpers(chatml):
    template = (
        "{{ bos_token }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ mood }}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    chat = ChatFormat(ChatTemplate(template, {"bos_token": "<|endoftext|>"}, SPECIALS))
    row = {"tools": [{"name": "<tool>"}], "chat_template_kwargs": {"mood": "merry"}}
    whole, counted = answers_of(chat, chatml[1], "a", "b", **row)
    assert whole == '[[<|endoftext|>]]{"name": "<tool>"}merry2024ab'
    assert counted == "b"


def test_a_token_across_an_answers_edge_counts(tmp_path, write_tokenizer):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "t.json", merges=[("Ġ", "b")]))
    chat = ChatFormat(ChatTemplate("{% for m in messages %}: {{ m.content }}{% endfor %}", {}, SPECIALS))
    with_prompt = ChatFormat(
        ChatTemplate(f"{chat.template.source}{{% if add_generation_prompt %}}: {{% endif %}}", {}, ())
    )
    assert answers_of(with_prompt, tokenizer, "bb", "bc") == (": bb: bc", " bc")
    assert answers_of(chat, tokenizer, "bb", "bc")[1] == ": bc"


def test_a_special_takes_the_blanks_beside_it_as_when_the_model_is_asked(chatml, tmp_path, write_tokenizer):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "t.json", rstrip=True))
    assert answers_of(chatml[0], tokenizer, "hi", "one") == (
        "[[<|im_start|>]]user\nhi[[<|im_end|>]][[<|im_start|>]]assistant\none[[<|im_end|>]]",
        "one[[<|im_end|>]]",
    )


def test_weights_are_those_of_the_next_token(chatml):
    chat, tokenizer = chatml
    texts = [chat.render({"messages": turns(f"question {n}", f"réponse {n}" * n, "more", "ok")}) for n in range(1, 6)]
    ids, counted = encode_chats(tokenizer, texts)
    store = TokenStore.from_chats(ids, counted, tokenizer.token_bytes)
    rows = PackedDataset(store, seq_len=len(store.tokens) - 1, seed=3)
    order = rows.index.epoch_order(0)
    tokens, flags = (np.concatenate([arrays[doc] for doc in order]) for arrays in (ids, counted))
    for seq_len in (len(tokens) - 1, 17):
        batch = PackedDataset(store, seq_len, seed=3).rows(0, (len(tokens) - 1) // seq_len)
        n = batch["weights"].size
        assert batch["targets"].ravel().tolist() == tokens[1 : n + 1].tolist()
        assert batch["weights"].ravel().tolist() == flags[1 : n + 1].tolist()
        assert (batch["bytes"] == tokenizer.token_bytes[batch["targets"]] * batch["weights"]).all()
    text = "".join(f"réponse {n}" * n + "ok" for n in range(1, 6))
    assert rows[0]["bytes"].sum() == len(text.encode())
    assert rows[0]["segments"].max() == 5


def test_prepared_conversations_come_back_from_the_cache_with_their_answers(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "chats.jsonl", *(turns(f"say {n}", f"it is {n}") for n in range(20)))
    config = DataConfig(source=str(path), format="chat", tokenizer="bpe", val_fraction=0.2)
    first = prepare(config, 270, 32, 0, tmp_path / "cache")
    monkeypatch.setattr(dataset, "load_documents", lambda *_: pytest.fail("must have come from the cache"))
    second = prepare(config, 270, 32, 0, tmp_path / "cache")
    for left, right in ((first.train, second.train), (first.val, second.val)):
        np.testing.assert_array_equal(left.store.tokens, right.store.tokens)
        np.testing.assert_array_equal(left.store.answers, right.store.answers)
    store = second.val.store
    answer = second.tokenizer.decode(store.tokens[store.answers])
    assert len(store.doc_lengths) == 4
    assert answer.startswith("it is ")
    assert second.train.store.answers.sum() < len(second.train.store.tokens) / 2
    assert "(answers: " in second.describe()
    assert second.chat_template == BUILT_IN


def test_held_out_figures_are_of_the_answers_alone(tmp_path):
    path = write_rows(tmp_path / "chats.jsonl", *(turns(f"{n} xyz", "aaaa" + "bbbb") for n in range(9)))
    data = prepare(DataConfig(source=str(path), format="chat", tokenizer="bytes"), 258, 16, 0, tmp_path / "cache")
    assert data.val_text_stats.unigram_entropy == pytest.approx(1.0)


def test_format_field_and_template_have_their_own_entries(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {n}", "messages": turns(f"q{n}", "a"), "other": turns(f"r{n}", "b")} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jinja").write_text(BUILT_IN.replace("assistant\n", "assistant: "))
    (tmp_path / "same.jinja").write_text(BUILT_IN)
    text = {"source": str(path), "tokenizer": "bytes"}
    chat = text | {"format": "chat"}
    others = [chat | {"messages_field": "other"}, chat | {"chat_template": str(tmp_path / "same.jinja")}]
    found = [prepare(DataConfig(**config), 258, 8, 0, tmp_path / "cache") for config in (text, chat, *others)]
    assert found[0].train.store.answers is None
    assert found[1].fingerprint == found[3].fingerprint
    assert len({data.fingerprint for data in found}) == len(list((tmp_path / "cache").iterdir())) == 3
    (tmp_path / "same.jinja").write_text(BUILT_IN.replace("eos_token", "'.' + eos_token"))
    assert prepare(DataConfig(**others[1]), 258, 8, 0, tmp_path / "cache").fingerprint != found[3].fingerprint


def test_conversations_without_an_answer_are_skipped_and_counted_once(tmp_path, caplog):
    conversations = [turns("a", "b"), turns("c"), turns("d", "e"), turns("f")]
    config = DataConfig(source=str(write_rows(tmp_path / "x.jsonl", *conversations)), format="chat", tokenizer="bytes")
    with caplog.at_level(logging.WARNING):
        documents = load_documents(config, ChatFormat.of(config))
    assert (len(documents.train), len(documents.val), documents.num_empty) == (1, 1, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{config.source}: 2 of 4 conversations have no assistant's turn: skipped"
    ]


FORGETS = "{% for m in messages %}{{ m.content if loop.last else 'x' }}{{ eos_token }}{% endfor %}"
DROPS = "{% for m in messages %}{{ m.role | upper if loop.index == 2 and not loop.last else m.content }}{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}NOW{% endif %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('user\n first') }}{% endif %}"
GOOD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (BUILT_IN, '{"messages": [', r"line 2: not JSON \(.*\): write one object a line"),
        (BUILT_IN, {"chat": []}, r"line 2: no key 'messages' among 'chat': set data\.messages_field"),
        (BUILT_IN, {"messages": "hi"}, r"line 2: 'messages' is a str, must be a list"),
        (BUILT_IN, {"messages": []}, r"line 2: 'messages' is an empty list, must be a list"),
        (BUILT_IN, {"messages": ["hi"]}, r"line 2: messages\[0\] is a str: 'messages' must be a list"),
        (BUILT_IN, {"messages": [{"from": "user", "value": "q"}]}, r"messages\[0\] has the keys 'from', 'value'"),
        (BUILT_IN, {"messages": [GOOD[0], GOOD[1] | {"content": ""}]}, r"line 2: the answers hold no text as the chat"),
        (BUILT_IN, {"messages": [GOOD[0], GOOD[1] | {"content": None}]}, r"line 2: the chat template .* refuses it: "),
        (BUILT_IN, {"messages": [*turns("\ud800", "a")]}, r'line 2: a lone surrogate, "\\ud800", in the messages'),
        (BUILT_IN, {"messages": [*turns("\ufdd1", "a")]}, r"line 2: the text holds U\+FDD1, which marks"),
        (BUILT_IN, {"messages": [*GOOD], "chat_template_kwargs": [1]}, r"'chat_template_kwargs' is a list, must be an"),
        (STRICT, {"messages": [GOOD[1], GOOD[0]]}, r"line 2: the chat template \(.*\) refuses it: user first"),
        (
            SHOUTS,
            {"messages": [*GOOD]},
            r"line 2: messages\[1\]: the chat template \(.*\) must render the messages before",
        ),
        (FORGETS, {"messages": [*GOOD, *GOOD]}, r"line 2: messages\[1\]: .* must render .*: put \{% generation %\}"),
        (DROPS, {"messages": [*GOOD, *GOOD]}, r"line 2: messages\[1\]: .* must not render an answer otherwise because"),
        (MARKED.replace("'assistant'", "'model'"), {"messages": [*GOOD]}, r"line 2: the answers hold no text"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_rule(tmp_path, template, row, message):
    (tmp_path / "t.jinja").write_text(template)
    line = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": turns("q")}) + f"\n{line}\n")
    config = DataConfig(
        source=str(tmp_path / "x.jsonl"), format="chat", tokenizer="bytes", chat_template=str(tmp_path / "t.jinja")
    )
    with pytest.raises(ValueError, match=message) as error:
        load_documents(config, ChatFormat.of(config))
    assert "\n" not in str(error.value)
    assert "x.jsonl, line 2" in str(error.value)


def test_a_source_that_holds_no_conversations_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source, message in (
        (tmp_path / "a.txt", r'data\.format = "chat" reads \.jsonl files, not .*a\.txt'),
        (write_rows(tmp_path / "one.jsonl", turns("a", "b")), "has one conversation, must have two"),
        (
            write_rows(tmp_path / "none.jsonl", turns("a"), turns("b")),
            "has no conversation that an assistant speaks in",
        ),
    ):
        config = DataConfig(source=str(source), format="chat", tokenizer="bytes")
        with pytest.raises(ValueError, match=message):
            load_documents(config, ChatFormat.of(config))
