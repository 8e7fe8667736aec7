"""Real templates and tokenizers give the token ids that transformers gives."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from job.chat.conversation import MarkedText, Message
from job.chat.templates import ChatTemplate, own_templates
from job.chat.text_tokenizer import FastTokenizer
from job.chat.tokenizer import ChatTokenizer
from tests import real_models
from tests.peers import run_peer

pytestmark = pytest.mark.real

CONVERSATIONS = 50
WORDS = (
    *("The", "knee", " hurts", ",", "since", "12345", "days.", "it's", "WE'LL", "naïve", "Ünï"),
    *("日本語", "пример", "العربية", "\u200b", "🙂", "👩‍⚕️", "a\tb", "  two", "\n", "\n\n", "x=1;"),
    *("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "[INST]", "</s>", "<think>", "<turn|>", "<bos>"),
)  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look a term up.",
            "parameters": {
                "type": "object",
                "properties": {"term": {"type": "string", "description": "the term"}},
                "required": ["term"],
            },
        },
    }
]


@dataclass(frozen=True)
class Case:
    """A tokenizer with a template."""

    tokenizer: str
    """The function of `real_models` that makes it."""
    template: str | None
    """The file of axolotl's; None: the tokenizer's own."""
    added: tuple[str, ...] = ()
    """Special tokens of the template that stand-in tokenizers lack."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    marked: bool = False


CASES = {
    "SmolLM2": Case("smollm2", None),
    "Gemma 3": Case("gemma3_270m", "gemma3"),
    "Gemma 4": Case("gemma3_270m", "gemma4", ("<|turn>", "<turn|>", "<|channel>", "<channel|>")),
    "Llama 3": Case("llama3_tokenizer", "llama3", kwargs={"date_string": "26 Jul 2024"}),
    "Mistral 1": Case("llama3_tokenizer", "mistral_v1", ("<s>", "</s>")),
    "Mistral 2/3": Case("llama3_tokenizer", "mistral_v2v3", ("<s>", "</s>", "[INST]", "[/INST]")),
    "Mistral 7": Case("llama3_tokenizer", "mistral_v7_tekken", ("[INST]", "[/INST]")),
    "Qwen 2.5": Case("qwen2_tokenizer", "qwen_25"),
    "Qwen 3": Case("qwen2_tokenizer", "qwen3"),
    "Qwen 3, no thinking": Case("qwen2_tokenizer", "qwen3", kwargs={"enable_thinking": False}),
    "ChatML": Case("qwen2_tokenizer", "chatml"),
    "ChatML, marked": Case("qwen2_tokenizer", "chatml", marked=True),
    "Phi 3": Case("llama3_tokenizer", "phi_3", ("<|user|>", "<|assistant|>", "<|end|>")),
}


def prepare(case: Case, folder: Path) -> tuple[ChatTokenizer, str | None]:
    """Return this project's tokenizer, and the template for transformers; the folder is theirs."""
    source = getattr(real_models, case.tokenizer)()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if case.added:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens(list(case.added))
        tokenizer.save(str(folder / "tokenizer.json"))
    if "</s>" in case.added:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if case.template is None:
        text = own_templates(source)["default"][0]
    else:
        text = (real_models.chat_templates() / f"{case.template}.jinja").read_text("utf-8")
    if case.marked:
        marks = "{% generation %}", "{% endgeneration %}"
        text = MARKED_CHATML.replace("[", marks[0]).replace("]", marks[1])
    template = ChatTemplate("test", "a test", text, case.kwargs)
    return ChatTokenizer(FastTokenizer(folder), template), text


MARKED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "[{{ m.content + '<|im_end|>' }}]{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def generated(seed: int, *, tools: bool) -> list[Message]:
    """A conversation of 1 to 6 turns; the seed decides what is in it."""
    draw = random.Random(seed)

    def text(least: int = 0) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 12))).strip()

    messages = [Message("tools", json.dumps(TOOLS))] if tools and seed % 3 == 0 else []
    messages += [Message("system", text(1) or "Be kind.")] if draw.random() < 0.5 else []
    for turn in range(draw.randint(1, 6)):
        messages.append(Message("user", text() or ("" if turn else "Hi.")))
        if messages[0].role == "tools" and turn == 0:
            call = {"name": "lookup", "arguments": {"term": text(1)}}
            calls = {"tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}]}
            messages.append(Message("assistant", "", extra=json.dumps(calls)))
            result = {"name": "lookup", "tool_call_id": "a1b2c3d4e"}
            messages.append(Message("tool", text(1) or "none", extra=json.dumps(result)))
        messages.append(Message("assistant", text(1) or "Yes."))
    return messages


def for_transformers(messages: Sequence[Message], chat: ChatTokenizer) -> dict[str, Any]:
    """The conversation as `apply_chat_template` takes it, special tokens in its texts broken."""

    def clean(value: Any, *, of_reply: bool = False) -> Any:
        if isinstance(value, str):
            return chat.renderer.neutralize(value, of_reply=of_reply)
        if isinstance(value, dict):
            of_reply = of_reply or value.get("role") == "assistant"
            return {key: clean(item, of_reply=of_reply) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item, of_reply=of_reply) for item in value]
        return value

    turns = [m for m in messages if m.role != "tools"]
    tools = [json.loads(m.content) for m in messages if m.role == "tools"]
    rows = [
        {"role": m.role, "content": m.content, **(json.loads(m.extra) if m.extra else {})}
        for m in turns
    ]
    if rows[0]["role"] == "system" and not chat.renderer.has_system_role:
        rows[1]["content"] = f"{rows[0]['content']}\n\n{rows[1]['content']}".strip()
        del rows[0]
    return {"messages": clean(rows), "tools": clean(tools[0]) if tools else None}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Texts of every kind, from the shipped samples and made of the words above."""
    samples = (Path(__file__).parents[2] / "job/samples/dialogues.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in samples.splitlines()]
    real = [row[key] for row in rows for key in ("input", "output")]
    draw = random.Random(1)
    plain = [word for word in WORDS if "<" not in word and "[" not in word]
    mixed = [
        "".join(draw.choices([*plain, " ", "\r\n", "'S"], k=20)) for _ in range(10_000 - len(real))
    ]
    return real + mixed


def test_token_ids_and_masks_equal_those_of_transformers(tmp_path: Path, texts: list[str]) -> None:
    chats: dict[str, ChatTokenizer] = {}
    conversations: dict[str, list[list[Message]]] = {}
    requests = []
    for number, (name, case) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        chat, template = prepare(case, folder)
        tools = chat.renderer.knows_tools
        candidates = [generated(seed, tools=tools) for seed in range(3 * CONVERSATIONS)]
        usable = [c for c in candidates if chat.renderer.unrenderable(c) is None]
        chats[name], conversations[name] = chat, usable[:CONVERSATIONS]
        assert len(conversations[name]) == CONVERSATIONS, name
        requests.append({
            "folder": str(folder), "template": template, "kwargs": case.kwargs,
            "conversations": [for_transformers(c, chat) for c in conversations[name]],
            "texts": texts if not case.added and case.template != "qwen3" else [],
        })  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(requests))
    run_peer("render_chats.py", tmp_path / "request.json", tmp_path / "answer.json", seconds=900)
    answers = json.loads((tmp_path / "answer.json").read_text())
    knowing = {name for name, chat in chats.items() if chat.renderer.knows_tools}
    assert {"Qwen 2.5", "Qwen 3"} <= knowing <= {*CASES} - {"SmolLM2", "Gemma 3", "ChatML"}
    table = []
    for (name, chat), request, expected in zip(chats.items(), requests, answers, strict=True):
        tokenized = chat.tokenize(conversations[name])
        prompts = chat.encode_prompts([c[:-1] for c in conversations[name]])
        for rows, ids, prompt, mask in zip(
            tokenized, expected["ids"], expected["prompts"], expected["masks"], strict=True
        ):
            row = rows[-1].token_ids
            if row != ids:  # the reply follows the empty thoughts of its prompt
                reply = row[len(prompt) :]
                assert (row[: len(prompt)], name) == (prompt, "Gemma 4")
                assert ids[-len(reply) - 1 : -1] == reply  # and a line break
            if mask is not None:
                assert rows[-1].loss_mask == [bool(each) for each in mask], name
        assert prompts == expected["prompts"], name
        fast = FastTokenizer(Path(request["folder"]))
        own = [t.token_ids for t in fast.encode([MarkedText(text) for text in request["texts"]])]
        assert own == expected["texts"], name
        table.append(f"{name}: {len(prompts)} conversations, {len(own)} texts equal")
    print("\n".join(table))  # noqa: T201 - the table of what was compared
