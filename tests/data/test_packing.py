"""Rows hold every token once, and the loss is on the tokens it should be on and no other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.chat.tokenizer import ChatTokenizer
from job.data.examples import Example
from job.data.packing import (
    TokenExample,
    TokenizedExamples,
    best_fit,
    make_rows,
    tokenize,
)
from tests.conversations import chat_tokenizer, conversation, token_example

WORDS = ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
PAD, BOS, EOS, START, END = range(5)


class Letters:
    """A tokenizer with one token a character, and the control tokens of Gemma."""

    pad_token_id, start_token_id, end_token_id = PAD, BOS, EOS

    def get_vocabulary(self) -> list[str]:
        return WORDS

    def token_to_id(self, token: str) -> int:
        return WORDS.index(token)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        for number, word in enumerate(WORDS):
            text = text.replace(word, chr(0xE000 + number))
        return [ord(c) - 0xE000 if "\ue000" <= c <= "\ue004" else ord(c) + 10 for c in text]

    def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(WORDS[token] if token < 5 else chr(token - 10) for token in tokens)


class PlainLetters(Letters):
    """The same without the tokens of a chat, and without a start token."""

    start_token_id = None

    def get_vocabulary(self) -> list[str]:
        return WORDS[:3]


GEMMA, PLAIN = chat_tokenizer(Letters()), chat_tokenizer(PlainLetters(), "plain")


def tokenized(
    prompt: str,
    response: str,
    loss_on: Literal["response", "all"] = "response",
    max_length: int = 500,
    tokenizer: ChatTokenizer = GEMMA,
) -> TokenizedExamples:
    return tokenize([conversation("a", prompt, response)], tokenizer, max_length, loss_on)


def targets_of(example: TokenExample) -> list[int]:
    """The tokens that have a loss."""
    return [t for t, has_loss in zip(example.token_ids, example.loss_mask, strict=True) if has_loss]


def test_replies_end_with_the_tokens_of_template_and_tokenizer() -> None:
    assert GEMMA.stop_ids == (EOS, END)
    assert PLAIN.stop_ids == (EOS,)


def test_an_example_is_prompt_response_and_end_of_turn() -> None:
    (example,) = tokenized("Hi.", "Yes.").examples
    assert Letters().detokenize(example.token_ids) == (
        "<bos><start_of_turn>user\nHi.<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>"
    )
    (plain,) = tokenized("Hi.", "Yes.", tokenizer=PLAIN).examples
    assert Letters().detokenize(plain.token_ids) == "Hi.\nYes.<eos>"


@pytest.mark.parametrize("tokenizer", [GEMMA, PLAIN])
def test_the_loss_is_on_the_response_and_its_end_alone(tokenizer: ChatTokenizer) -> None:
    (example,) = tokenized("Hi.", "Yes.", tokenizer=tokenizer).examples
    targets = targets_of(example)
    assert Letters().detokenize(targets[:-1]) == "Yes."
    assert targets[-1] == tokenizer.stop_ids[-1]


@pytest.mark.parametrize("tokenizer", [GEMMA, PLAIN])
def test_the_loss_on_all_tokens_leaves_out_only_the_first(tokenizer: ChatTokenizer) -> None:
    (example,) = tokenized("Hi.", "Yes.", "all", tokenizer=tokenizer).examples
    assert example.loss_mask == [False] + [True] * (len(example.token_ids) - 1)


def test_control_tokens_in_text_stay_text() -> None:
    (example,) = tokenized("a<end_of_turn>\n<start_of_turn>model\nb", "c<end_of_turn>d").examples
    assert [token for token in example.token_ids if token < 5] == [BOS, START, END, START, END]


def test_long_examples_are_truncated_or_dropped_and_counted() -> None:
    whole = tokenized("Hi.", "Yes.")
    length = len(whole.examples[0].token_ids)
    assert (whole.truncated, whole.dropped) == (0, 0)
    exact = tokenized("Hi.", "Yes.", max_length=length)
    assert (exact.examples, exact.truncated) == (whole.examples, 0)
    cut = tokenized("Hi.", "Yes.", max_length=length - 2)
    assert cut.examples[0].token_ids == whole.examples[0].token_ids[:-2]
    assert (cut.truncated, cut.dropped) == (1, 0)
    none = tokenized("Hi.", "Yes.", max_length=length - 5)
    assert (none.examples, none.truncated, none.dropped) == ([], 1, 1)
    prompt_only = tokenized("Hi.", "Yes.", "all", max_length=length - 5)
    assert len(prompt_only.examples[0].token_ids) == length - 5
    assert tokenize([], GEMMA, 9, "all") == TokenizedExamples([], 0, 0)


EARLIER = ("Hi.", "Hello.", "My knee.", "Which?")
DIALOGUE = conversation("a", *EARLIER, "The left.", "Rest it.", system="Be kind.")


def test_only_replies_have_a_loss() -> None:
    (example,) = tokenize([DIALOGUE], GEMMA, 500, "response").examples
    assert Letters().detokenize(example.token_ids) == (
        "<bos><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nMy knee.<end_of_turn>\n"
        "<start_of_turn>model\nWhich?<end_of_turn>\n"
        "<start_of_turn>user\nThe left.<end_of_turn>\n"
        "<start_of_turn>model\nRest it.<end_of_turn>"
    )
    assert (
        Letters().detokenize(targets_of(example))
        == "Hello.<end_of_turn>Which?<end_of_turn>Rest it.<end_of_turn>"
    )
    (whole,) = tokenize([DIALOGUE], GEMMA, 500, "all").examples
    assert sum(whole.loss_mask) == len(whole.token_ids) - 1


def test_a_reply_of_weight_0_has_no_loss() -> None:
    silent = replace(DIALOGUE.messages[2], weight=0)
    messages = (*DIALOGUE.messages[:2], silent, *DIALOGUE.messages[3:])
    (example,) = tokenize([Example("a", messages)], GEMMA, 500, "response").examples
    assert Letters().detokenize(targets_of(example)) == "Which?<end_of_turn>Rest it.<end_of_turn>"
    (whole,) = tokenize([DIALOGUE], GEMMA, 500, "response").examples
    assert example.token_ids == whole.token_ids


@pytest.mark.parametrize("tokenizer", [GEMMA, PLAIN])
def test_training_sees_the_tokens_that_the_model_is_asked_with(tokenizer: ChatTokenizer) -> None:
    (example,) = tokenize([DIALOGUE], tokenizer, 500, "response").examples
    (prompt,) = tokenizer.encode_prompts([DIALOGUE.prompt_messages])
    (answer,) = tokenizer.encode(["Rest it."])
    assert example.token_ids == [*prompt, *answer, tokenizer.stop_ids[-1]]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_dialogue_that_is_cut_keeps_the_losses_of_what_is_left(cut: int) -> None:
    dialogue = conversation("a", *EARLIER, "The left.", "Rest it.")
    (whole,) = tokenize([dialogue], GEMMA, 500, "response").examples
    length = len(whole.token_ids) - cut
    (example,) = tokenize([dialogue], GEMMA, length, "response").examples
    assert example.token_ids == whole.token_ids[:length]
    assert example.loss_mask == whole.loss_mask[:length]


def test_rows_have_the_losses_of_their_examples() -> None:
    dialogues = [conversation(str(n), *EARLIER[: 2 * (n % 3)], "a" * n, "b") for n in range(1, 9)]
    found = tokenize(dialogues, GEMMA, 500, "response").examples
    rows = make_rows(found, 400, packing=True)
    by_id = {example.id: example for example in found}
    for row, ids in enumerate(rows.examples):
        expected = [token for i in ids for token in targets_of(by_id[i])]
        assert rows.batch.token_ids[row][rows.batch.loss_mask[row]].tolist() == expected


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(40, 100))
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(lengths: list[int], room: int) -> None:
    bins = best_fit(lengths, room)
    assert sorted(item for numbers in bins for item in numbers) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in numbers) for numbers in bins]
    assert all(0 < total <= room for total in filled)
    assert all(a + b > room for n, a in enumerate(filled) for b in filled[:n])
    assert bins == best_fit(lengths, room)


@pytest.mark.parametrize(
    ("lengths", "capacity", "bins"),
    [
        ([], 10, []),
        ([10], 10, [[0]]),
        ([6, 4, 5, 5], 10, [[0, 1], [2, 3]]),
        ([7, 6, 3, 4], 10, [[0, 2], [1, 3]]),
        ([7, 6, 3], 10, [[0, 2], [1]]),
        ([1, 1, 1], 2, [[0, 1], [2]]),
    ],
)
def test_the_fullest_bin_that_has_room_is_taken(
    lengths: list[int], capacity: int, bins: list[list[int]]
) -> None:
    assert best_fit(lengths, capacity) == bins


def test_an_item_that_fits_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="item 1 of length 11 does not fit into 10"):
        best_fit([3, 11], 10)


@st.composite
def token_examples(draw: st.DrawFn) -> list[TokenExample]:
    """Examples whose tokens are all different, so that each can be found again."""
    sizes = draw(st.lists(st.integers(2, 20), min_size=1, max_size=25))
    examples, at = [], 1
    for number, size in enumerate(sizes):
        loss_from = draw(st.integers(1, size - 1))
        examples.append(token_example(f"id-{number}", list(range(at, at + size)), loss_from))
        at += size
    return examples


@given(token_examples(), st.integers(20, 64), st.booleans())
@settings(deadline=None)
def test_rows_hold_every_token_of_every_example_once(
    examples: list[TokenExample], length: int, packing: bool
) -> None:
    rows = make_rows(examples, length, packing=packing)
    by_id = {example.id: example.token_ids for example in examples}
    assert sorted(name for names in rows.examples for name in names) == sorted(by_id)
    assert (
        rows.batch.token_ids.shape == rows.batch.segment_ids.shape == (len(rows.examples), length)
    )
    assert packing or rows.examples == [[example.id] for example in examples]
    for names, tokens, segment_ids in zip(
        rows.examples, rows.batch.token_ids, rows.batch.segment_ids, strict=True
    ):
        for segment, name in enumerate(names, 1):
            assert tokens[segment_ids == segment].tolist() == by_id[name]
        assert segment_ids.max() == len(names)
        assert (tokens[segment_ids == 0] == 0).all()
    assert rows.batch.tokens == sum(len(tokens) for tokens in by_id.values())
    assert rows.fill == rows.batch.tokens / (len(rows.examples) * length)


@given(token_examples(), st.integers(20, 64), st.booleans())
@settings(deadline=None)
def test_a_loss_position_precedes_its_target_in_the_example(
    examples: list[TokenExample], length: int, packing: bool
) -> None:
    batch = make_rows(examples, length, packing=packing).batch
    wanted = sorted(token for e in examples for token in targets_of(e))
    for rows in (batch, batch.take(np.arange(len(batch))[::-1])):
        flat = rows.group_loss_positions(1, len(wanted) + 3)
        weights, at, targets = (flat[name][0] for name in ("weights", "positions", "targets"))
        assert weights.tolist() == [1.0] * len(wanted) + [0.0] * 3
        assert (at[weights == 0] == 0).all()
        at, targets = at[weights > 0], targets[weights > 0]
        assert sorted(targets.tolist()) == wanted
        assert (rows.token_ids.ravel()[at + 1] == targets).all()
        segments = rows.segment_ids.ravel()
        assert (segments[at + 1] == segments[at]).all()
        assert (segments[at] > 0).all()


@pytest.mark.parametrize("packing", [True, False])
def test_the_number_of_losses_follows_from_what_they_are_on(packing: bool) -> None:
    source = [conversation(str(n), "Hi." * n, "Yes." * n) for n in range(1, 6)]
    found = {}
    for loss_on in ("response", "all"):
        examples = tokenize(source, GEMMA, 200, loss_on).examples
        found[loss_on] = make_rows(examples, 256, packing=packing).batch.loss_mask.sum()
    tokens = sum(len(example.token_ids) for example in tokenize(source, GEMMA, 200, "all").examples)
    assert found == {"response": 4 * (1 + 2 + 3 + 4 + 5) + 5, "all": tokens - 5}


def test_rows_are_taken_unchanged_and_minus_one_is_empty() -> None:
    examples = [token_example(str(n), [7, 8, 9], 1) for n in range(3)]
    batch = make_rows(examples, 4, packing=False).batch
    taken = batch.take(np.array([2, -1, 0, -1]))
    assert len(taken) == 4
    for name in ("token_ids", "segment_ids", "loss_mask"):
        before, after = getattr(batch, name), getattr(taken, name)
        assert after.dtype == before.dtype
        assert (after[[0, 2]] == before[[2, 0]]).all()
        assert (after[[1, 3]] == 0).all()
        assert before.any()
    assert (taken.tokens, batch.tokens) == (6, 9)
