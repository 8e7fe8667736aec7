"""A question that stands in the training text is found; one that merely resembles it is not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.contamination import WORDS, Passages, find_overlap
from tests.conversations import conversation

WORD = [f"w{n}" for n in range(400)]


def sentence(length: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORD, k=length))


def found(question: str, *texts: str) -> list[int]:
    passages = Passages({"q": question})
    return [number for number, text in enumerate(texts) if any(passages.search(text))]


def test_a_passage_of_thirteen_words_matches_anywhere() -> None:
    question = sentence(40, 1)
    words = question.split()
    passage = " ".join(words[20 : 20 + WORDS])
    shorter = " ".join(words[20 : 20 + WORDS - 1])
    texts = [passage, f"x {passage} y", f"{passage.upper()}!", shorter, f"{shorter} x {words[32]}"]
    assert found(question, *texts) == [0, 1, 2]


def test_a_short_question_must_match_completely() -> None:
    question = "Drug of choice for malaria is?"
    assert found(question, "The drug of choice for malaria is this.", "drug of choice") == [0]
    assert Passages({"q": "What is it?"}).too_short == 1
    assert found("What is it?", "What is it?") == []


@pytest.mark.parametrize(
    ("question", "copy", "other"),
    [
        (
            "下列关于糖尿病患者饮食治疗的叙述中，哪一项是不正确的？",
            "老师问：下列关于糖尿病患者饮食治疗的叙述中哪一项是不正确的。我不知道。",
            "下列关于高血压患者药物治疗的叙述中，哪一项是正确的？",
        ),
        (
            "糖尿病の患者に最初に使われる薬はどれですか。",
            "問題「糖尿病の患者に最初に使われる薬はどれですか」に答えます。",
            "高血圧の患者に最初に使われる薬はどれですか。",
        ),
        (
            "ยาตัวใดที่ใช้รักษาโรคเบาหวานเป็นอันดับแรก",
            "คำถาม ยาตัวใดที่ใช้รักษาโรคเบาหวานเป็นอันดับแรก ครับ",
            "ยาตัวใดที่ใช้รักษาโรคความดันโลหิตสูง",
        ),
        (
            "मधुमेह के रोगी को सबसे पहले कौन सी दवा दी जाती है",
            "प्रश्न: मधुमेह के रोगी को सबसे पहले कौन सी दवा दी जाती है?",
            "बुखार के रोगी को सबसे पहले कौन सी दवा दी जाती है",
        ),
    ],
)
def test_questions_in_other_scripts_match_as_well(question: str, copy: str, other: str) -> None:
    assert Passages({"q": question}).too_short == 0
    assert found(question, copy, other) == [0]


def test_a_short_question_without_spaces_is_not_searched() -> None:
    assert Passages({"a": "什么是糖尿病？", "b": "什么"}).too_short == 2
    assert found("什么是糖尿病？", "请问什么是糖尿病？") == []


@given(st.integers(0, 10_000), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_only_the_planted_question_matches(seed: int, before: int, after: int) -> None:
    questions = [sentence(20, seed * 100 + n) for n in range(5)]
    noise = [sentence(80, seed * 100 + 50 + n) for n in range(4)]
    planted = f"{sentence(before, 7)} {questions[3]} {sentence(after, 8)}"
    passages = Passages({str(number): question for number, question in enumerate(questions)})
    assert not any(hit for text in noise for hit in passages.search(text))
    hits = list(passages.search(planted))
    assert [question for question, _ in hits] == ["3"]
    assert hits[0][1] in " ".join(questions[3].split())


def test_the_overlap_names_the_pairs() -> None:
    questions = {f"q{n}": sentence(20, n) for n in range(3)}
    examples = [
        conversation("e0", "hello", "there"),
        conversation("e1", "hello", f"so: {questions['q1']}."),
        conversation("e2", questions["q2"], "c", "a", "b"),
    ]
    overlap = find_overlap({"exam": questions}, {}, examples)
    assert overlap.slices["exam"].found == 2
    assert [(pair.question, pair.example) for pair in overlap.pairs] == [("q1", "e1"), ("q2", "e2")]
    assert overlap.examples == 3
