import json

import pytest

from moejax.config.run import DataConfig
from moejax.data.chat_template import BUILT_IN, ChatTemplate
from moejax.data.tokenizer import BOS, EOS

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def write(path, content) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]},
        ),
    ],
)
def test_the_template_beside_the_tokenizer_is_found(chat_tokenizer, name, content):
    folder = chat_tokenizer.parent
    write(folder / "tokenizer_config.json", {"chat_template": "another"})
    write(folder / name, content)
    template = ChatTemplate.find(DataConfig(tokenizer=str(chat_tokenizer)))
    assert (template.source, template.place) == (TEMPLATE, str(folder / name))


def test_names_of_specials_come_from_the_files_beside_the_tokenizer(chat_tokenizer, tmp_path):
    folder = chat_tokenizer.parent
    write(tmp_path / "t.jinja", TEMPLATE)
    write(folder / "special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<tool>"})
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "add_bos_token": True, "unk_token": None})
    template = ChatTemplate.find(DataConfig(tokenizer=str(chat_tokenizer), chat_template=str(tmp_path / "t.jinja")))
    assert template.names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert template.render([{"role": "user", "content": "a"}], False, {}) == "<|im_start|>a<|im_end|>"


def test_a_saved_tokenizer_of_ours_has_the_built_in_template(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    template = ChatTemplate.find(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert (template.source, template.names) == (BUILT_IN, {"bos_token": BOS, "eos_token": EOS})


def test_a_missing_template_says_where_it_was_looked_for(chat_tokenizer):
    where = r"no chat template: .*chat_template\.jinja is missing, .*tokenizer_config\.json has no \(default\)"
    for content in (None, {"eos_token": "<tool>"}, {"chat_template": [{"name": "rag", "template": "no"}]}):
        if content is not None:
            write(chat_tokenizer.parent / "tokenizer_config.json", content)
        with pytest.raises(ValueError, match=where) as error:
            ChatTemplate.find(DataConfig(tokenizer=str(chat_tokenizer)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n{% if %}", r"t\.jinja\), line 2: no jinja template \("), (b"\xff", r"t\.jinja: invalid UTF-8 at byte 0")],
)
def test_a_broken_template_is_named(tmp_path, content, message):
    path = tmp_path / "t.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        ChatTemplate.find(DataConfig(tokenizer="bytes", chat_template=str(path)))


def test_a_template_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.chat_template \(.*none\.jinja\) is no file"):
        ChatTemplate.find(DataConfig(tokenizer="bytes", chat_template=str(tmp_path / "none.jinja")))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_config_beside_the_tokenizer_is_named(chat_tokenizer, content):
    write(chat_tokenizer.parent / "tokenizer_config.json", content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json(, line 1)?: .*save it again"):
        ChatTemplate.find(DataConfig(tokenizer=str(chat_tokenizer)))


def test_a_template_cannot_reach_outside(tmp_path):
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}, (EOS,))
    with pytest.raises(ValueError, match="refuses it: access to attribute '__class__'"):
        template.render([], False, {})
