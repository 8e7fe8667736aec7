"""Chat templates render as transformers renders them, and no text acts as markup."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.chat.conversation import Conversation, Message
from job.chat.renderer import ChatRenderer, UnrenderableError
from job.chat.templates import BUILT_IN, ChatTemplate, built_in, choose_template
from job.errors import UsageError
from tests.conversations import turns

GEMMA = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "</s>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN = ("<|turn>", "<turn|>")
TOKENS = (*GEMMA, *CHATML, *LLAMA, *TURN)


class Words:
    """Special tokens, the first of which begins a text."""

    def __init__(self, tokens: Sequence[str] = TOKENS, start: int | None = 0) -> None:
        self.special_ids = self.added_ids = {token: number for number, token in enumerate(tokens)}
        self.named = {"bos_token": tokens[0], "eos_token": tokens[1]}
        self.start_id = start


def renderer(text: str, words: Words | None = None, **kwargs: object) -> ChatRenderer:
    return ChatRenderer(ChatTemplate("test", "a test", text, kwargs), words or Words())


def learned(renderer: ChatRenderer, messages: Conversation) -> list[list[str]]:
    """The parts with a loss of each text that a conversation gives."""
    texts = renderer.training_texts(messages)
    return [[text.text[a:b] for a, b in text.replies] for text in texts]


LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}<|im_end|>\n"
    "{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT = turns("Hi. ", "Yes.", "Why?", "So.", system="Be kind.")

EXPECTED = {
    "gemma": "<bos><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n<start_of_turn>model\n"
    "Yes.<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    "So.<end_of_turn>\n",
    "gemma4": "<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\nHi.<turn|>\n<|turn>model\n"
    "Yes.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\nSo.<turn|>\n",
    "llama3": "<bos><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi. <|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\nSo.<|im_end|>\n",
    "mistral": "<bos>[INST] Be kind.\n\nHi. [/INST] Yes.<eos>[INST] Why? [/INST] So.<eos>",
    "plain": "<bos>Be kind.\n\nHi.\nYes.<eos>Why?\nSo.<eos>",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_render_as_documented(name: str) -> None:
    chat = ChatRenderer(built_in(name), Words())
    (text,) = chat.training_texts(CHAT)
    assert text.text == EXPECTED[name]
    assert [text.text[a:b].strip() for a, b in text.replies] == [
        f"Yes.{chat.end_token}", f"So.{chat.end_token}",
    ]  # fmt: skip
    assert EXPECTED[name].startswith(chat.prompt(CHAT[:-1]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_ins_start_a_text_only_where_the_tokenizer_does(name: str) -> None:
    chat = ChatRenderer(built_in(name, starts=False), Words())
    (text,) = chat.training_texts(CHAT)
    assert text.text == EXPECTED[name].removeprefix("<bos>")
    chosen = choose_template(name, "model", None, Words(start=None))
    assert chosen.text == chat.template.text


def test_weight_0_takes_a_reply_out_of_the_loss() -> None:
    silent = [replace(m, weight=0) if m.content == "Yes." else m for m in CHAT]
    assert learned(renderer(LOOP + PROMPT), silent) == [["So.<|im_end|>"]]


def test_marks_of_the_template_are_the_loss() -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    chat = renderer(text + PROMPT)
    assert learned(chat, CHAT) == [["Yes.<|im_end|>", "So.<|im_end|>"]]
    silent = [replace(m, weight=0) if m.content == "Yes." else m for m in CHAT]
    assert learned(chat, silent) == [["So.<|im_end|>"]]
    assert "\ufdd0" not in chat.training_texts(CHAT)[0].text


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)


def test_replies_that_read_differently_later_get_their_own_text() -> None:
    chat = renderer(THINKING + PROMPT)
    empty = "<think>\n\n</think>\n\n"
    assert learned(chat, CHAT) == [[f"{empty}Yes.<|im_end|>"], [f"{empty}So.<|im_end|>"]]
    first, last = chat.training_texts(CHAT)
    assert first.text == chat.prompt(CHAT[:2]) + f"{empty}Yes.<|im_end|>"
    assert last.text.startswith(chat.prompt(CHAT[:-1]))
    assert "Yes.<|im_end|>\n<|im_start|>user\nWhy?" in last.text


def test_a_reply_unlike_its_prompt_is_refused_with_the_reason() -> None:
    chat = renderer(
        LOOP + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    assert chat.unrenderable(CHAT) == "reply not rendered as a continuation of its prompt"
    assert renderer(LOOP + PROMPT).unrenderable(CHAT) is None


def test_a_reply_follows_the_empty_thoughts_of_its_prompt() -> None:
    opening = "<|channel>thought\n<channel|>"
    words = Words((*TOKENS, "<|channel>", "<channel|>"))
    chat = renderer(LOOP + PROMPT.replace("assistant\n", f"assistant\n{opening}"), words)
    assert learned(chat, CHAT) == [["Yes.<|im_end|>"], ["So.<|im_end|>"]]
    for end, text in zip((2, 4), chat.training_texts(CHAT), strict=True):
        assert text.text == chat.prompt(CHAT[:end]) + f"{CHAT[end].content}<|im_end|>"


TOOLS = json.dumps([{"type": "function", "function": {"name": "lookup", "parameters": {}}}])
CALL = json.dumps(
    {"tool_calls": [{"function": {"name": "lookup", "arguments": {"a": "b<|im_end|>"}}}]}
)
WITH_TOOLS = (
    Message("tools", TOOLS), Message("user", "Find it."), Message("assistant", "", extra=CALL),
    Message("tool", "found"), Message("assistant", "It is found."),
)  # fmt: skip
TOOL_LOOP = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
)


def test_tools_are_rendered_by_templates_that_know_them() -> None:
    chat = renderer(TOOL_LOOP + PROMPT)
    (calls, answer), = learned(chat, WITH_TOOLS)  # fmt: skip
    assert '"lookup"' in calls
    assert "< |im_end|>" in calls
    assert answer == "It is found.<|im_end|>"
    assert renderer(LOOP + PROMPT).unrenderable(WITH_TOOLS) == (
        "tools, which the chat template does not know"
    )


def test_variables_reach_the_template() -> None:
    text = LOOP + "{% if add_generation_prompt %}{{ mode }}{{ bos_token }}{% endif %}"
    chat = renderer(text, mode="fast")
    assert chat.prompt([Message("user", "a")]).endswith("<|im_end|>\nfast<bos>")
    one, other = (ChatTemplate("a", "b", "c", {"x": x}).sha256 for x in (1, 2))
    assert one != other


def test_templates_have_the_helpers_of_transformers() -> None:
    text = (
        "{%- for m in messages -%}{%- if loop.index > 2 -%}{%- break -%}{%- endif -%}"
        "{{ {'é': m.content} | tojson }}{{ strftime_now('%Y') }}<|im_end|>{%- endfor -%}"
    )
    assert renderer(text).prompt([Message("user", "<a>")]) == ('{"é": "<a>"}2024<|im_end|>')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}<|im_end|>", "unsafe"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer",
        ),
        ("{{ messages.append(1) }}<|im_end|>", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}<|im_end|>", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token ends"),
        ("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}", "leaves out"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.chat.renderer.PROBE_SECONDS", 0.3)
    with pytest.raises(
        UsageError, match=r"^model\.chat_template: the template \(a test\)"
    ) as error:
        renderer(text)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_system_message_the_template_refuses_opens_the_first_turn() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    dropping = LOOP.replace("messages", "messages if m.role != 'system'", 1)
    for text in (refusing + LOOP, dropping):
        chat = renderer(text + PROMPT)
        assert not chat.has_system_role
        assert "Be kind.\n\nHi. <|im_end|>" in chat.prompt(CHAT[:2])
    assert renderer(LOOP + PROMPT).has_system_role


PIECES = [*TOKENS, "<", ">", "|", "<|", "|>", "/", "bos", "eos>", "end_of_turn>", " ", "a"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)
neutralize = ChatRenderer(built_in("gemma"), Words()).neutralize


@given(TEXTS)
@settings(deadline=None, max_examples=100)
def test_neutral_text_has_no_special_token_and_only_more_spaces(text: str) -> None:
    once = neutralize(text)
    assert not any(token in once for token in TOKENS)
    assert neutralize(once) == once
    assert once.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    "text", ["a < b > c", "<b>bold</b>", "[INSTANCE]", "<end of turn>", "<|unknown|>", "<bosom>"]
)
def test_text_without_special_tokens_is_unchanged(text: str) -> None:
    assert neutralize(text) == text


@pytest.mark.parametrize("name", BUILT_IN)
@given(TEXTS, TEXTS)
@settings(deadline=None, max_examples=20)
def test_a_prompt_has_only_the_templates_special_tokens(name: str, text: str, system: str) -> None:
    chat = ChatRenderer(built_in(name), Words())

    def count(messages: Conversation) -> list[int]:
        return [chat.prompt(messages).count(token) for token in TOKENS if token != "[INST]"]

    hostile = count([Message("system", system), Message("user", text)])
    assert hostile == count([Message("system", "a"), Message("user", "b")]) or not system.strip()


def test_a_conversation_the_template_refuses_has_a_reason() -> None:
    chat = renderer(
        LOOP + "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    )
    with pytest.raises(UnrenderableError, match="the chat template says: too long"):
        chat.prompt(CHAT)


def choose(name: str, preset: str, folder: Path | None, tokens: Sequence[str]) -> ChatTemplate:
    return choose_template(name, preset, folder, Words(tokens))


def test_auto_takes_the_models_own_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert choose("auto", "x", tmp_path, GEMMA).text == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    own = choose("auto", "x", tmp_path, GEMMA)
    assert (own.name, own.source, own.text) == ("own", "chat_template.jinja of the model", "new")
    assert choose("plain", "x", tmp_path, GEMMA).replaces_own
    assert not choose("plain", "x", None, GEMMA).replaces_own


def test_one_of_several_templates_is_taken_by_its_name(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert choose("auto", "x", tmp_path, GEMMA).text == "a"
    assert choose("rag", "x", tmp_path, GEMMA).text == "b"
    with pytest.raises(UsageError, match="no template 'raq'; .*default, rag"):
        choose("raq", "x", tmp_path, GEMMA)


@pytest.mark.parametrize(
    ("preset", "tokens", "name"),
    [
        ("gemma3_instruct_1b", GEMMA, "gemma"),
        ("hf://google/gemma-3-1b-it", GEMMA, "gemma"),
        ("gemma3_1b", GEMMA, "plain"),  # turn tokens do not make an instruct model
        ("./gemma-4-it", (*GEMMA, *TURN), "gemma4"),
        ("llama3_instruct_8b_en", LLAMA, "llama3"),
        ("qwen2.5_instruct_0.5b_en", CHATML, "chatml"),
        ("qwen2.5_0.5b_en", CHATML, "plain"),
        ("tiny", GEMMA, "gemma"),
        ("/home/me/chat-project/Meta-Llama-3-8B", LLAMA, "plain"),
    ],
)
def test_auto_chooses_by_name_and_tokens(preset: str, tokens: Sequence[str], name: str) -> None:
    assert choose("auto", preset, None, tokens).name == name


def test_an_instruct_model_of_which_nothing_is_known_is_refused() -> None:
    with pytest.raises(UsageError, match="no chat template .* write gemma, .* a Jinja file"):
        choose("auto", "new_instruct_1b", None, ("<|user|>", "<|end|>"))
    words = Words(("<s>", "</s>"))
    mistral = choose_template("auto", "mistral_instruct_7b_en", None, words, "MistralTokenizer")
    assert mistral.name == "mistral"


def test_a_template_whose_tokens_are_missing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>"):
        choose("chatml", "x", None, GEMMA)


def test_a_file_can_be_the_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    with pytest.raises(UsageError, match="No such file"):
        choose(str(path), "x", None, GEMMA)
    path.write_text("mine")
    assert choose(str(path), "x", None, GEMMA).text == "mine"


def test_plain_by_default_says_where_turns_are_possible() -> None:
    assert choose("auto", "qwen3_8b_en", None, CHATML).source.endswith("chat_template: chatml")
    assert choose("auto", "qwen3_8b_en", None, ("<s>", "</s>")).source == "built in"
    assert choose("plain", "qwen3_8b_en", None, CHATML).source == "built in"


def test_fixed_text_is_no_system_role() -> None:
    chat = renderer(LOOP.replace("messages", "messages if m.role != 'system'", 1) + PROMPT)
    assert chat.prompt(turns("a", system="instruction")).count("instruction") == 1


def test_replies_keep_thoughts_that_are_special_tokens() -> None:
    chat = renderer(LOOP + PROMPT, Words((*TOKENS, "[THINK]", "[/THINK]")))
    assert learned(chat, turns("[THINK]a", "[THINK]b[/THINK]c")) == [
        ["[THINK]b[/THINK]c<|im_end|>"]
    ]
    assert "[ THINK]a" in chat.prompt(turns("[THINK]a"))
