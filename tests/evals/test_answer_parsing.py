"""A generated answer is parsed as the one letter it names, or as none."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.evals.answer_parsing import parse_choice

OPTIONS = ["Aspirin", "Calcium gluconate", "Paracetamol", "Ibuprofen gel"]

LONE_LETTER = {
    "B": "B",
    " B\n": "B",
    "b": "B",
    "a": "A",
    "(b)": "B",
    "[C]": "C",
    '"D"': "D",
    "B.": "B",
    "B) because it is cheap": "B",
    "c) the usual dose": "C",
    "A, because it is cheap": "A",
    "A. A common cause": "A",
    "A - Aspirin": "A",
    "A\nbecause it is cheap": "A",
    "C: Paracetamol": "C",
    "D\n\nIbuprofen gel": "D",
    "C is the answer": "C",
}
MARKDOWN = {
    "**B**": "B",
    "**B.** Calcium gluconate": "B",
    "*C*": "C",
    "`D`": "D",
    "# B": "B",
    "> B": "B",
    "**Answer:** C": "C",
    "**Answer: C**": "C",
    "Choice: **D**": "D",
    "### Answer\n\nThe answer is **B**.": "B",
    "$\\boxed{B}$": "B",
}
PHRASE = {
    "The answer is B": "B",
    "the answer is b.": "B",
    "The answer is: B": "B",
    "Answer: (C)": "C",
    "ANSWER: C": "C",
    "Answer:\nC": "C",
    "The correct option is D": "D",
    "The best option is D.": "D",
    "The right choice would be (D)": "D",
    "Answer is option C": "C",
    "I choose A": "A",
    "I choose option b": "B",
    "I would choose c": "C",
    "We pick D!": "D",
    "Between B and D I choose D": "D",
    "I choose D over B": "D",
    "The answer is B. Again, the answer is B.": "B",
    "Let me think. A common cause is pain. The answer is D.": "D",
    "The answer is not B but C": "C",
    "The answer is B, not C": "B",
    "Option A is incorrect; option B": "B",
    "Option C is incorrect; option B": "B",
}
ALONE = {
    "It must be B": "B",
    "I'd go with B": "B",
    "It is C, not B": "C",
    "C rather than B": "C",
    "Not B. It is C.": "C",
    "B is incorrect, C is right": "C",
    "A is false. B is true.": "B",
    "I'm sure that it is B": "B",
    "Correct: B": "B",
}
QUOTED = {
    "Paracetamol": "C",
    "paracetamol is the usual drug": "C",
    "Give IBUPROFEN  gel.": "D",
    "It is calcium\ngluconate, of course": "B",
}
NONE = [
    "",
    "  \n",
    "**",
    "E",
    "e.",
    "Z. none of these",
    "The answer is E",
    "1",
    "Answer: 2",
    "I",
    "I don't know",
    "None of the above",
    "A common cause is viral",
    "A patient with pain",
    "I pick a fruit",
    "The answer is a common drug",
    "The answer is A common drug",
    "a cat",
    "It is grade A evidence",
    "not B",
    "Not A",
    "B is wrong",
    "B is not correct",
    "A) is wrong",
    "A. Incorrect",
    "Option A is wrong",
    "The answer is not B",
    "The answer isn't B",
    "All except D",
    "B or C",
    "B/C",
    "B and C are correct",
    "Answer: B or C",
    "Answer: B, C",
    "The answer is B. The answer is C.",
    "The options are A, B, C and D",
    "Aspirin or Paracetamol",
    "Ibuprofen",
    "Aspirins",
    "\u0410",  # a Cyrillic letter
    "abcd",
]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [*LONE_LETTER.items(), *MARKDOWN.items(), *PHRASE.items(), *ALONE.items(), *QUOTED.items()],
)
def test_an_answer_that_names_one_option_is_parsed(answer: str, letter: str) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize("answer", NONE)
def test_an_unclear_answer_is_unparsed(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) is None


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("E", ["a1", "b1", "c1", "d1", "e1"], "E"),
        ("The answer is e.", ["a1", "b1", "c1", "d1", "e1"], "E"),
        ("C", ["yes", "no"], None),
        ("Z", [f"option {n}" for n in range(26)], "Z"),
        ("the heart rate", ["heart", "heart rate"], "B"),
        ("heart", ["heart", "heart rate"], "A"),
        ("the heart, not the heart rate alone", ["heart", "heart rate"], "A"),
        ("5 mg (twice)", ["5 mg (twice)", "15 mg (twice)"], "A"),
        ("15 mg", ["5 mg", "15 mg"], "B"),
        ("10+", ["10", "20+"], "A"),
        ("same", ["same", "same"], None),
    ],
)
def test_letters_and_texts_are_the_question_s_own(
    answer: str, options: list[str], letter: str | None
) -> None:
    assert parse_choice(answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A:", None),
        ("A: ", None),
        ("**A:**", None),
        ("Answer:", None),
        ("Q: Which drug?\nA:", None),
        ("A: because it is cheap", "A"),
        ("A: A common cause", "A"),
        ("A: B", "B"),
        ("A: A", "A"),
        ("A: (C) it is", "C"),
        ("A: The answer is D.", "D"),
        ("A: Aspirin", "A"),
        ("A: Paracetamol", "C"),
        ("Q: Which drug? A: B", "B"),
    ],
)
def test_a_leading_a_and_colon_may_stand_for_answer(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A: Aspirin B: Calcium gluconate C: Paracetamol D: Ibuprofen gel", None),
        ("A. Aspirin B. Calcium gluconate C. Paracetamol D. Ibuprofen gel", None),
        ("A: Aspirin B: Calc", None),
        ("(A) Aspirin (B) Calcium gluconate", None),
        ("Answer: A) Aspirin B) Calcium gluconate", None),
        ("Answer:\nA. Aspirin\nB. Calcium gluconate\nC. Paracetamol", None),
        ("A:\nB:\nC:\nD:", None),
        ("A. Aspirin\nB. Calcium", None),
        ("A. Aspirin B. Calcium gluconate\nThe answer is B.", "B"),
        ("A. x\nB. y\nC. z\nD. w\n\nAnswer: C", "C"),
        ("A. Aspirin, not B. calcium", "A"),
        ("The answer is A. The answer is not B.", "A"),
        ("B. Aspirin interacts with C. difficile drugs", "B"),
    ],
)
def test_options_that_are_repeated_name_no_letter(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(
            ("Ｂ", "B"),
            ("（Ｂ）", "B"),
            ("B。", "B"),
            ("B、因为便宜", "B"),
            ("Ｃ：Paracetamol", "C"),
        ),
        *(("答案是B", "B"), ("正确答案为（C）。", "C"), ("答案：Ｄ", "D"), ("我选择B。", "B")),
        *(
            ("因此选C。", "C"),
            ("答案是B，不是C。", "B"),
            ("【答案】B", "B"),
            ("正解はBです。", "B"),
        ),
        *(("答えはDである。", "D"), ("정답은 C입니다.", "C"), ("답: B", "B")),
        *(("La respuesta correcta es la B.", "B"), ("La réponse est C.", "C")),
        *(("A resposta é D.", "D"), ("Die richtige Antwort ist B.", "B"), ("La risposta è C", "C")),
        *(("Правильный ответ: B", "B"), ("Jawaban: C", "C"), ("Đáp án là D.", "D")),
        *(("答案不是B", None), ("答案是B吗？", None), ("答案是B或C", None), ("答案是B、C", None)),
        *(("不选B", None), ("不应该选B", None), ("B、C", None), ("B。不正确", None)),
        *(
            ("答えはBではない", None),
            ("정답은 B가 아닙니다", None),
            ("La respuesta no es B.", None),
        ),
        *(("La respuesta es B o C.", None), ("Die Antwort ist nicht B.", None)),
        *(
            ("La respuesta no es la aspirin", None),
            ("Nicht Aspirin", None),
            ("¿La respuesta es B?", None),
        ),
    ],
)
def test_the_answer_is_b_is_read_in_other_languages(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@given(st.text(), st.integers(2, 26))
def test_the_result_is_always_a_letter_or_none(answer: str, count: int) -> None:
    options = [f"option number {n}" for n in range(count)]
    assert parse_choice(answer, options) in {None, *string.ascii_uppercase[:count]}


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "**{}**", "Answer: {}"]))
def test_space_around_an_answer_changes_nothing(letter: str, form: str) -> None:
    answer = form.format(letter)
    assert parse_choice(f"\n  {answer}  \n", OPTIONS) == parse_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A and B", None),
        ("neither A nor B", None),
        ("The answer is either A or B", None),
        ("B, C", None),
        ("(A) and (B)", None),
        ("C-section", None),
        ("Vitamin C", "B"),
        ("The answer is Vitamin C", "B"),
        ("Vitamin C, that is D", "D"),
        ("The answer cannot be B", None),
        ("B isn't right", None),
        ("The answer is A because", "A"),
        ("Not A but C", "C"),
        ("Option B is wrong, so C", "C"),
        ("Answer: A common cause", None),
    ],
)
def test_letters_in_lists_and_texts_are_not_chosen(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, ["Iron", "Vitamin C", "Zinc", "Copper"]) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A. Iron\nB. Vitamin C\nC. Zinc", None),
        ("A. Iron\nB. Vitamin C\nThe answer is B", "B"),
        ("The answer is (A) or (B)", None),
        ("(B) is the wrong choice", None),
        ("not zinc", None),
        ("It is not zinc but I don't know", None),
        ("Hepatitis B virus", None),
        ("Group B streptococcus", None),
        ("Vitamin D is low", None),
        ("A patient needs B", None),
    ],
)
def test_letters_that_merely_occur_are_not_chosen(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, ["Iron", "Vitamin C", "Zinc", "Copper"]) == letter
