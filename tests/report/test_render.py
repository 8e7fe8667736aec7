"""The report page: what it must say, in which order, and that no text in it can do harm."""

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from job.report.plots import accuracy_bars, loss_curve
from job.report.render import Flip, render_html, render_markdown
from job.results import Results
from job.runtime.logs import legible
from tests.report import EVIL_FLIPS, FLIPS, HISTORY, evil, full, minimal

Render = Callable[[Results, list[dict[str, Any]], list[Flip]], str]


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "title", "script")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data

    def shape(self) -> list[tuple[str, list[str]]]:
        return [(tag, list(attributes)) for tag, attributes in self.tags]


def html_text(results: Results, history: list[dict[str, Any]], flips: list[Flip]) -> str:
    return Page(render_html(results, history, flips)).text


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.model_validate(full())


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return render_html(results, HISTORY, FLIPS)


@pytest.fixture(scope="module")
def hostile() -> Results:
    return Results.model_validate(evil(full()))


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_the_verdict_comes_before_every_figure_and_section(
    render: Render, results: Results
) -> None:
    text = render(results, HISTORY, FLIPS)
    verdict = text.index(results.verdict.sentence)
    for later in ("Next step:", "31.0% \u2192 35.1%", "What was run", "Multiple choice", "Caveats"):
        assert verdict < text.index(later)


KEY_FIGURES = [
    "Anatomy", "17 of 4,183", "20.5%", "38.5%", "less often", "18.42", "80% power is 2.0 points",
    "31.0% \u2192 35.1%", "p 4.6e-9", "0.109 \u2192 0.153", "+0.044 (0.036 to 0.052)",
    "2.9134 \u2192 1.4981", "13,593 tokens/s", "MFU 8.3%", "18 min 28 s", "2.46 chip-hours",
]  # fmt: skip
FIGURES = [
    "Anatomy", "17 of 4,183", "20.5%", "38.5%", "less often", "18.42", "80% power is 2.0 points",
    "999,885,952", "2,609,152", "0.26%", "1,297 / 4,183", "29.6 to 32.4%", "32.2%", "25.0%",
    "68.0%", "512", "341", "0.69", "0.111", "0.102", "1.5127", "39.6%", "41.3%", "412 truncated",
    "8.0% of positions", "43.8 s", "207,405", "3 blank", "6 min 43 s", "0.012 USD", "10.5 MB",
    "ab" * 32, "sha256:3f9a1c77", "gemma-4-26b", "no measurable change", "improved", "seed (42)",
]  # fmt: skip


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_every_figure_is_in_both_formats(render: Render, results: Results) -> None:
    text = render(results, HISTORY, FLIPS).replace("\u00a0", " ")
    assert [figure for figure in KEY_FIGURES + FIGURES if figure not in text] == []


def test_the_verdict_stands_unbroken_in_both_formats(results: Results, html: str) -> None:
    assert results.verdict.sentence in Page(html).text
    assert f"> **{results.verdict.sentence}**" in render_markdown(results, HISTORY, FLIPS)


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_missing_parts_leave_their_section_out(render: Render) -> None:
    text = render(Results.model_validate(minimal()), [], [])
    for section in ("Multiple choice", "Dialogue", "Questions that changed", "Side by side"):
        assert section not in text
    for present in ("Nothing was measured.", "Training loss", "1.5127", "MFU not available"):
        assert present in text
    assert "skipped: the spec names no reference model" in text
    assert "None" not in text


def test_a_page_without_figures_holds_no_drawing() -> None:
    assert "<svg" not in render_html(Results.model_validate(minimal()), [], [])


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_the_same_results_give_the_same_bytes(render: Render) -> None:
    first, second = (
        render(Results.model_validate(full()), HISTORY, FLIPS).encode() for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_the_reference_is_always_called_remote(render: Render, results: Results) -> None:
    text = render(results, HISTORY, FLIPS)
    around = [
        text[max(0, m.start() - 9) : m.end() + 10] for m in re.finditer("(?i)reference", text)
    ]
    assert len(around) >= 5
    assert [words for words in around if "remote" not in words] == []


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_at_most_40_flips_are_shown_and_the_rest_counted(render: Render, results: Results) -> None:
    text = render(results, HISTORY, FLIPS)
    assert len(re.findall(r"Question \d+\?", text)) == 40
    assert "80 gained" in text
    assert "60 more" in text
    assert "20 lost" in text


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_caveats_follow_from_the_results(render: Render, results: Results) -> None:
    text = render(results, HISTORY, FLIPS)
    assert "baseline is not measurably above always answering A (32.2%)" in text
    assert "finetuned is not measurably above" not in text
    assert "baseline chose A in 90.0% of its answers" in text
    assert "7 questions have no answer of reference (remote)" in text
    assert "single run with one seed (42)" in text
    assert "not correctness" in text
    assert "random weights" not in text
    tiny = full() | {"model": full()["model"] | {"preset": "tiny"}}
    assert "model is tiny, with random weights" in render(Results.model_validate(tiny), [], [])


def doubtful() -> Results:
    """A run without the model's own template, whose tuned dialogues were cut."""
    run = full()
    run["model"] |= {"chat_template": "plain", "chat_template_ignored": True}
    run["evaluation"]["dialogue"]["models"]["finetuned"] |= {
        "truncated": 199,
        "cut_in_thoughts": 12,
    }
    run["evaluation"]["multiple_choice"][0]["models"]["baseline"] |= {
        "truncated": 4183,
        "unparsed": 99,
        "cut_in_thoughts": 88,
    }
    return Results.model_validate(run)


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_what_makes_the_verdict_doubtful_is_at_the_top(render: Render) -> None:
    text = render(doubtful(), HISTORY, FLIPS).replace("\\", "")
    top = text[text.index("Fine-tuning helped") : text.index("31.0% \u2192 35.1%")]
    assert top.count("Warning:") == 3
    assert "The model was prompted without its own chat template" in top
    assert "dialogue: 199 of 200 answers of finetuned were cut off at the limit" in top
    assert "medmcqa: 4,183 of 4,183 answers of baseline were cut off at the limit" in top
    assert "88 cut in thoughts" in text
    assert "12 cut in thoughts" in text


@pytest.mark.parametrize(
    ("truncated", "missing", "warned"),
    [(0, 0, ""), (179, 0, ""), (180, 0, "180 of 200"), (90, 100, "90 of 100"), (89, 100, "")],
)
def test_nine_in_ten_answers_cut_of_those_there_are_a_warning(
    truncated: int, missing: int, warned: str
) -> None:
    run = full()
    score = run["evaluation"]["dialogue"]["models"]["finetuned"]
    score |= {"truncated": truncated, "missing": missing}
    text = render_markdown(Results.model_validate(run), HISTORY, FLIPS)
    assert text.count("Warning:") == bool(warned)
    assert warned == "" or f"dialogue: {warned} answers of finetuned" in text


@pytest.mark.parametrize(
    ("task", "dialogue", "side", "warned", "noted"),
    [
        (0, 0, 0, [], []),
        (41, 2, 0, [], ["medmcqa: 41 of 4,183", "dialogue: 2 of 200"]),
        (42, 3, 0, ["medmcqa: 42 of 4,183", "dialogue: 3 of 200"], []),
        (0, 0, 1, ["side by side: 1 of 1"], []),
    ],
)
def test_truncated_prompts_are_counted_and_above_1_percent_a_warning(
    task: int, dialogue: int, side: int, warned: list[str], noted: list[str]
) -> None:
    run = full()
    run["evaluation"]["multiple_choice"][0]["truncated_prompts"] = task
    run["evaluation"]["dialogue"]["truncated_prompts"] = dialogue
    run["evaluation"]["side_by_side_truncated_prompts"] = side
    text = render_markdown(Results.model_validate(run), HISTORY, FLIPS).replace("\\", "")
    top, rest = text[: text.index("31.0% \u2192 35.1%")], text[text.index("Caveats") :]
    end = " prompts were longer than evals.max_prompt_tokens and lost their beginning."
    assert top.count("Warning:") == len(warned)
    assert all(sentence + end in top for sentence in warned)
    assert rest.count(end) == len(noted)
    assert all(sentence + end in rest for sentence in noted)


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_rows_that_are_no_questions_are_counted_with_reasons(render: Render) -> None:
    run = full()
    dropped = {"no right option in 'cop'": 12, "empty option": 5}
    rows = {"raw": 4200, "valid": 4183, "dropped": dropped}
    run["evaluation"]["multiple_choice"][0]["rows"] = rows
    text = render(Results.model_validate(run), [], []).replace("\\", "")
    counts = "of 4,200 rows read, 4,183 are used; left out: 12 no right option in 'cop', 5 empty"
    assert text.count(counts) == 2
    assert "rows read" not in render(Results.model_validate(full()), [], [])


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_both_models_of_an_evaluation_share_a_warning(render: Render) -> None:
    run = full()
    for score in run["evaluation"]["dialogue"]["models"].values():
        score["truncated"] = 200
    text = render(Results.model_validate(run), HISTORY, FLIPS)
    assert "200 of 200 answers of baseline and 200 of 200 answers of finetuned" in text
    assert text.count("Warning:") == 1


@pytest.mark.parametrize("render", [html_text, render_markdown])
def test_the_template_is_named_with_its_source(render: Render) -> None:
    run = full()
    run["model"] |= {"chat_template": "chatml", "chat_template_source": "built in"}
    text = render(Results.model_validate(run), [], [])
    assert re.search(r"chatml chat template \\?\(built in\\?\)", text)


def test_hostile_text_adds_nothing_to_the_html(hostile: Results, html: str) -> None:
    written = render_html(hostile, HISTORY, EVIL_FLIPS)
    page = Page(written)
    assert page.shape() == Page(html).shape()
    for tag, attributes in page.tags:
        assert tag not in ("script", "img", "iframe", "object", "link", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "xlink:href")
            assert name != "href" or (value or "").startswith("#")
            assert name != "style" or "evil" not in (value or "")


def test_hostile_text_is_legible_in_the_html(hostile: Results) -> None:
    written = render_html(hostile, HISTORY, EVIL_FLIPS)
    text = Page(written).text
    assert "<script>alert(1)</script>" in text
    assert "\u2039U+001B\u203a[31m\u2039U+0000\u203a\u2039U+202E\u203a" in text
    assert "W" * 5000 in text
    assert set(re.findall(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\uffff]", written)) == set()
    assert "overflow-wrap: anywhere" in written
    assert written.encode()


def test_hostile_text_adds_no_markup_to_the_markdown(results: Results, hostile: Results) -> None:
    written = render_markdown(hostile, HISTORY, EVIL_FLIPS)
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])

    def shape(markdown: str) -> list[Any]:
        return [
            (token.type, token.tag, [child.type for child in token.children or []])
            for token in parser.parse(markdown)
        ]

    assert shape(written) == shape(render_markdown(results, HISTORY, FLIPS))
    kinds = Counter(child for _, _, children in shape(written) for child in children)
    assert set(kinds) <= {"text", "strong_open", "strong_close", "em_open", "em_close"}
    html = [token.content for token in parser.parse(written) if token.type == "html_block"]
    assert not [block for block in html if "script" in block or "evil" in block]
    fences = [token.content for token in parser.parse(written) if token.type == "fence"]
    assert "<script>alert(1)</script>" in fences[0]
    assert max(len(line) for fence in fences for line in fence.split("\n")) <= 100
    assert "\x1b" not in written
    assert written.encode()


def test_text_keeps_lines_letters_and_emoji() -> None:
    plain = "one\ttwo\nthr\u00e9\u00e9 \u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469 \u3000x"
    assert legible(plain) == plain
    assert legible("a\r\nb\rc\u2028\u200b\ufeff") == (
        "a\nb\u2039U+000D\u203ac\u2039U+2028\u203a\u2039U+200B\u203a\u2039U+FEFF\u203a"
    )


def test_every_drawing_is_described_and_ids_never_clash(html: str) -> None:
    page = Page(html)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == html.count("<svg") == html.count("</title>") - 1 == 4
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert re.search(r"Accuracies|loss", drawing["aria-label"] or "")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = re.findall(r'(?:href="|url\()#([\w-]+)', html)
    assert len(ids) == len(set(ids))
    assert set(used) <= set(ids)


def test_drawings_follow_the_colours_of_the_page(results: Results) -> None:
    for svg in (loss_curve(HISTORY), accuracy_bars(results.evaluation.multiple_choice)):
        assert "var(--accent" in svg
        assert re.findall(r"#[0-9a-f]{6}\b(?!\))", re.sub(r"var\([^)]*\)", "", svg)) == []
        assert "<style" not in svg
        assert "http" not in svg


def test_a_long_history_stays_a_small_drawing() -> None:
    long = [{"step": step, "loss": 2 + (step % 7) / 10} for step in range(20_000)]
    assert len(loss_curve(long)) < 10_000


def test_the_curve_takes_what_there_is_of_a_history() -> None:
    assert loss_curve([]) == ""
    assert loss_curve([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}]) == ""
    assert ">validation<" in loss_curve([{"step": 3, "validation_loss": 0.5}])
    resumed = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}]
    assert loss_curve(resumed) == loss_curve([resumed[0], resumed[2]]) != loss_curve(resumed[:2])


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_a_reference_that_failed_says_why(render: Callable[..., str]) -> None:
    run = full()
    run["reference"] |= {"status": "failed", "reason": "22 of 22 have no answer: HTTP 401"}
    text = render(Results.model_validate(run), HISTORY, FLIPS)
    assert "failed: 22 of 22 have no answer: HTTP 401" in text
