"""Thoughts come off before an answer counts, and an answer cut inside them is none."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from job.chat.thoughts import split_thoughts
from job.evals.engine import Engine
from job.evals.local_model import LocalModel
from job.evals.metrics import overlap_scores, score_choices, score_dialogues, summarize_style
from job.evals.predictions import DialogueLine, SideLine, format_predictions, parse_predictions
from job.evals.questions import Question
from job.evals.statistics import Bootstrap
from job.evals.tasks import Task, dialogue_lines, side_by_side_examples, side_lines
from job.model.language_model import LanguageModel
from job.model.load import load_model
from job.scores import RowCounts
from job.spec.evals import SideBySideEval
from job.spec.schema import Model, MultipleChoiceEval
from tests.conversations import conversation
from tests.evals.test_prediction_cache import cache_in

LIMIT = 6


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("", "", ""),
        (" B. \n", "", " B. \n"),
        ("<think>\nIt is C, no.\n</think>\n\nB", "It is C, no.", "B"),
        ("<think>\n\n</think>\n\nB", "", "B"),
        ("<think>one</think>B<think>two</think>", "one\ntwo", "B"),
        ("<think>one</think><think>two</think>B", "one\ntwo", "B"),
        ("Well.\n<think>C?</think>\nB", "C?", "Well.\nB"),
        ("It is C, no.\n</think>\n\nB", "It is C, no.", "B"),
        ("<think>one</think> two </think> B", "one\ntwo", "B"),
        ("<think>a <think> b</think>B", "a\nb", "B"),
        ("<think>It is C, no. The answer is", "It is C, no. The answer is", None),
        ("<think>", "", None),
        ("Well. <think>The answer is B", "Well.\nThe answer is B", None),
        ("<think>one</think>B<think>The answer is C", "B\none\nThe answer is C", None),
        ("<|channel>thought\nIt is C, no.\n<channel|>B", "It is C, no.", "B"),
        ("<|channel>thought\n<channel|>B", "", "B"),
        ("<|channel>thoughts vary<channel|>B", "thoughts vary", "B"),
        ("It is C, no.\n<channel|>B", "It is C, no.", "B"),
        ("<|channel>thought\nIt is", "It is", None),
        ("[THINK]It is C, no.[/THINK]B", "It is C, no.", "B"),
        ("[THINK]It is", "It is", None),
        ("<|START_THINKING|>It is C.<|END_THINKING|>B", "It is C.", "B"),
        ("I think <b> and </thinking>", "", "I think <b> and </thinking>"),
    ],
)
def test_thoughts_are_split_from_the_answer(text: str, thoughts: str, answer: str | None) -> None:
    assert split_thoughts(text) == (thoughts, answer)


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>assistant\n<think>\n\n", True),
        ("<|turn>model\n<|channel>thought\n", True),
        ("[THINK]", True),
        ("<think>\n\n</think>\n\n", False),
        ("<|channel>thought\n<channel|>", False),
        ("What does <think> mean?\nassistant\n", False),
        ("", False),
    ],
)
def test_the_template_may_have_opened_the_thoughts(prompt: str, inside: bool) -> None:
    cut = ("The answer is C", None) if inside else ("", "The answer is C")
    assert split_thoughts("The answer is C", prompt) == cut
    assert split_thoughts("Is it C?</think>B", prompt) == ("Is it C?", "B")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A model without turns, so that a prompt of the user can end with an opening marker."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    return load_model(Model(preset="tiny", dtype="float32", chat_template="plain"), 0, mesh)


@pytest.fixture(scope="module")
def engine(model: LanguageModel) -> Engine:
    """One for all tests, so that they share its compiled programs."""
    return Engine(model, 2, 512)


@pytest.fixture
def local(model: LanguageModel, engine: Engine, tmp_path: Path) -> LocalModel:
    return LocalModel(engine, model.weights, cache_in(tmp_path))


def test_an_answer_cut_in_its_thoughts_is_unparsed_and_counted(local: LocalModel) -> None:
    entry = MultipleChoiceEval(
        name="t", dataset="samples", scoring="generate", options=["a", "b"], answer="c",
        prompt="{question} {options} <think>", max_new_tokens=LIMIT,
    )  # fmt: skip
    (line,), _ = local.answer_questions(
        Task(
            entry,
            None,
            [Question("q", "Which?", ("x", "y"), "A")],
            RowCounts(raw=1, valid=1, dropped={}),
        )
    )
    assert line.thoughts
    assert (line.answer, line.choice, line.finish) == ("", None, "length")
    score = score_choices([line])
    assert (score.unparsed, score.truncated, score.cut_in_thoughts) == (1, 1, 1)


def test_a_dialogue_cut_in_its_thoughts_is_an_empty_answer(local: LocalModel) -> None:
    cut, plain = conversation("1", "Why? <think>", "Rest."), conversation("2", "Why?", "Rest.")
    messages = [example.prompt_messages for example in (cut, plain)]
    lines = dialogue_lines([cut, plain], local.generate("dialogue", messages, LIMIT)[0])
    assert (lines[0].answer, lines[0].finish, lines[0].rougeL) == ("", "length", 0.0)
    assert lines[0].thoughts
    assert lines[0].tokens == LIMIT
    assert (bool(lines[1].answer), lines[1].thoughts) == (True, "")
    score = score_dialogues(lines, Bootstrap(50, 0))
    assert (score.truncated, score.cut_in_thoughts) == (2, 1)


def test_side_by_side_shows_no_thoughts(local: LocalModel) -> None:
    examples = side_by_side_examples([], SideBySideEval(prompts=["Why? <think>"]))
    replies, truncated = local.answer("side_by_side", examples, LIMIT)
    (line,) = side_lines(examples, replies)
    assert truncated == 0
    assert line.answer == ""
    assert line.thoughts


def test_predictions_without_thoughts_have_no_field_for_them() -> None:
    plain = SideLine(id="p", prompt="Why?", expected=None, answer="B")
    content = format_predictions([plain])
    assert content == b'{"id": "p", "prompt": "Why?", "expected": null, "answer": "B"}\n'
    both = [plain, plain.model_copy(update={"thoughts": "Hm."})]
    assert parse_predictions(format_predictions(both), SideLine) == both


def test_an_expected_answer_is_compared_without_its_thoughts() -> None:
    scores = overlap_scores("<think>Is it serious?</think>Please rest.", "Please rest.")
    assert scores["rougeL"] == 1.0


def test_style_is_counted_outside_of_thoughts() -> None:
    line = DialogueLine(
        id="1", prompt="p", expected="<think>see a doctor?</think>Rest.", answer="Rest.",
        thoughts="see a doctor?", tokens=1, finish="stop", rouge1=0, rouge2=0, rougeL=0,
    )  # fmt: skip
    models = {"baseline": [line], "finetuned": [line]}
    (trait,) = summarize_style({"refers": ["doctor"]}, models)
    assert (trait.expected.count, trait.models["baseline"].count) == (0, 0)
