"""The model card says what the results say, and no more."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from job.report.model_card import PEFT_CONFIG, license_in, license_of, render_card
from job.results import Results
from tests.report import EVIL as WITH_SURROGATE
from tests.report import evil, full, minimal

EVIL = WITH_SURROGATE.replace("\ud800", "")


def card(run: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The front matter and the text."""
    written = render_card(Results.model_validate(run))
    _, front, body = written.split("---\n", 2)
    return yaml.safe_load(front), body


def plain(markdown: str) -> str:
    """The text without escapes."""
    return re.sub(r"\\(.)", r"\1", markdown)


def with_peft(run: dict[str, Any]) -> dict[str, Any]:
    return run | {"artifacts": [{"path": PEFT_CONFIG, "bytes": 2, "sha256": "ab" * 32}]}


def test_the_front_matter_is_what_hubs_read() -> None:
    run = with_peft(full())
    run["data"]["dataset"] = "hf://clinic/dialogues"
    assert card(run)[0] == {
        "base_model": "google/gemma-3-1b-it",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "gemma",
        "tags": ["lora", "keras-hub", "peft"],
        "datasets": ["clinic/dialogues"],
    }


def test_a_local_model_is_not_named_for_the_hub() -> None:
    run = minimal()
    run["model"]["preset"] = "/models/mine"
    front, body = card(run)
    assert not {"base_model", "datasets", "license_link"} & set(front)
    assert (front["library_name"], front["license"]) == ("keras-hub", "other")
    assert "PeftModel" not in body
    assert "the job does not know them" in body


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("hf://google/gemma-3-1b-it", "gemma"),
        ("hf://google/gemma-2b", "gemma"),
        ("hf://google/gemma-1.1-7b-it", "gemma"),
        ("hf://google/gemma-2-9b", "gemma"),
        ("hf://google/gemma-3n-E2B-it", "gemma"),
        ("gemma3_1b", "gemma"),
        ("gemma_2b_en", "gemma"),
        ("kaggle://keras/gemma3/keras/gemma3_1b", "gemma"),
        ("/models/gemma-3-1b-it/", "gemma"),
        ("hf://google/gemma-4-26b-a4b-it", "apache-2.0"),
        ("hf://google/gemma-5-1b", "other"),
        ("hf://google/medgemma-4b-it", "other"),
        ("hf://Qwen/Qwen3-0.6B", "other"),
        ("llama3_8b_en", "other"),
        ("tiny", "other"),
    ],
)
def test_the_license_is_that_of_the_models_name(preset: str, expected: str) -> None:
    assert license_of(preset) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# Mine\n", "mit"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlanguage: en\n---\n", ""),
        ("---\nlicense: {\n---\n", ""),
        ("# Mine\n", ""),
        (None, ""),
    ],
)
def test_the_license_is_read_from_the_base_model_s_card(
    text: str | None, expected: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert license_in(tmp_path / "README.md") == expected


def test_a_license_that_was_read_precedes_the_one_of_a_name() -> None:
    run = full()
    run["model"]["license"] = "mit"
    front, body = card(run)
    assert front["license"] == "mit"
    assert "The license of the base model, hf://google/gemma-3-1b-it, is mit." in plain(body)


def test_the_card_names_the_template_and_its_source() -> None:
    run = full()
    run["model"]["chat_template_source"] = "chat_template.jinja of the model"
    named = "gemma chat template (chat_template.jinja of the model)"
    assert plain(card(run)[1]).count(named) == 2


def test_the_card_repeats_the_warnings_of_the_report() -> None:
    run = full()
    run["model"]["chat_template_ignored"] = True
    assert "- The model was prompted without its own chat template" in card(run)[1]


def test_the_card_counts_truncated_prompts_and_rows_left_out() -> None:
    run = full()
    run["evaluation"]["multiple_choice"][0] |= {
        "truncated_prompts": 9,
        "rows": {"raw": 4190, "valid": 4183, "dropped": {"empty option": 7}},
    }
    text = plain(card(run)[1])
    assert "- medmcqa: 9 of 4,183 prompts were longer than evals.max_prompt_tokens" in text
    assert "- medmcqa: of 4,190 rows read, 4,183 are used; left out: 7 empty option." in text


def test_the_base_of_a_local_adapter_is_passed_explicitly() -> None:
    run = with_peft(full())
    assert "Pass the base model explicitly" not in card(run)[1]
    run["model"]["preset"] = "/models/mine"
    assert "Pass the base model explicitly" in card(run)[1]


def test_scores_have_intervals_and_trivial_baselines() -> None:
    _, body = card(full())
    for words in (
        "| finetuned | 35.1% | 33.7 to 36.5% |",
        "| *Always A* | 32.2% | |",
        "| *Chance* | 25.0% | |",
        "+4.1 points (95% interval \u22120.7 to 5.5), 512 gained and 341 lost, exact McNemar "
        "p 4.6e-9, Holm-corrected p 9.2e-9: improved.",
        "| finetuned | 0.153 | 0.147 to 0.159 |",
        "| *Echoed prompt* | 0.111 | 0.105 to 0.117 |",
        "2.9134 before, 1.4981 after",
        "Gemma Terms of Use",
        "baseline is not measurably above always answering A",
    ):
        assert words in body, words


def test_a_run_that_measured_nothing_claims_nothing() -> None:
    _, body = card(minimal())
    assert "Only the loss was measured." in body
    assert "not measured before, not measured after" in body
    for word in ("Accuracy", "ROUGE", "improved", "McNemar", "None"):
        assert word not in body


def test_no_change_is_never_called_one() -> None:
    run = full()
    run["verdict"]["sentence"] = "Fine-tuning made no measurable change."
    for test in run["evaluation"]["multiple_choice"][0]["comparisons"]:
        test["finding"] = "no measurable change"
    run["evaluation"]["dialogue"]["comparison"]["finding"] = "no measurable change"
    _, body = card(run)
    assert not re.search(r"improve|better|helped|higher", body)
    assert body.count(": no measurable change.") == 3


def test_code_to_load_it_is_python_with_the_run_s_own_values() -> None:
    run = with_peft(full())
    run["model"]["revision"] = "abc123"
    blocks = re.findall(r"```python\n(.*?)```", card(run)[1], re.S)
    for block in blocks:
        ast.parse(block)
    assert 'from_pretrained("google/gemma-3-1b-it", revision="abc123")' in blocks[0]
    assert "enable_lora(16, target_layer_names=targets)" in blocks[1]
    assert '["query", "value"]' in blocks[1]


def test_the_tiny_model_has_no_code_to_load_it() -> None:
    run = with_peft(full())
    run["model"]["preset"] = "tiny"
    assert "```" not in card(run)[1]
    run["model"]["preset"] = "gemma3_1b"
    assert '# "gemma3_1b" in transformers\' format' in card(run)[1]


def test_hostile_text_adds_nothing() -> None:
    run = with_peft(evil(full()))
    run["model"]["preset"] = f"hf://{EVIL}"
    front, body = card(run)
    assert front["base_model"] == EVIL
    assert set(front) <= {
        "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "tags",
        "datasets",
    }  # fmt: skip
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(body)
    plain = parser.parse(card(with_peft(full()))[1])
    headings = [t.tag for t in tokens if t.type == "heading_open"]
    assert headings == [t.tag for t in plain if t.type == "heading_open"]
    kinds = {child.type for token in tokens for child in token.children or []}
    assert kinds <= {
        "text", "strong_open", "strong_close", "em_open", "em_close", "softbreak", "code_inline",
    }  # fmt: skip
    inline = [child for token in tokens for child in token.children or []]
    assert {child.content for child in inline if child.type == "code_inline"} == {"job generate"}
    assert not [token for token in tokens if token.type == "html_block"]
    for token in tokens:
        if token.type == "fence":
            ast.parse(token.content.replace("\u2039", "").replace("\u203a", ""))
    assert "\x1b" not in body
