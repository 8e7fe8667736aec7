"""Runs are compared on what both were asked, and on nothing else; what cannot be is refused."""

import io
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from job import cli
from job.commands.compare import compare_finished
from job.errors import StageError, UsageError
from job.evals.statistics import holm, mcnemar
from job.report.compare import RunComparison, differing
from job.report.compare_render import render_page, show
from job.storage.base import Store
from job.storage.local import LocalStore
from job.storage.locations import open_store
from tests.report import EVIL as WITH_SURROGATE
from tests.report.finished_runs import answers, leave_run, talks

EVIL = WITH_SURROGATE.replace("\ud800", "")  # no JSON file holds it
At = Callable[[str], Store]


@pytest.fixture(params=["folder", "bucket"])
def at(request: pytest.FixtureRequest, tmp_path: Path) -> At:
    """Where a run of a name is kept."""
    if request.param == "folder":
        return lambda name: open_store(str(tmp_path / name))
    request.getfixturevalue("bucket")
    return lambda name: open_store(f"gs://runs/team/{name}")


def local(tmp_path: Path, name: str, *rest: Any, **more: Any) -> str:
    store = LocalStore(tmp_path / name)
    leave_run(store, name, *rest, **more)
    return str(tmp_path / name)


def test_runs_are_tested_on_the_questions_and_dialogues_of_both(at: At) -> None:
    leave_run(at("one"), "one", answers("B" * 30 + "A" * 10), talks([0.1] * 60))
    leave_run(at("two"), "two", answers("A" * 20 + "B" * 10 + "A" * 9 + "B"), talks([0.2] * 60))
    found = compare_finished([at("one").uri, at("two").uri])
    (choice,), (dialogue,) = found.multiple_choice, found.dialogue
    test = choice.test
    assert (test.a, test.b, choice.eval, choice.scoring) == ("one", "two", "medmcqa", "letters")
    assert (test.questions, test.gained, test.lost) == (40, 20, 1)
    assert (choice.only_a, choice.only_b) == (0, 0)
    assert test.p_value == mcnemar(20, 1)
    assert dialogue.test.examples == 60
    assert dialogue.test.difference == pytest.approx(0.1)
    assert [test.p_holm, dialogue.test.p_holm] == holm([test.p_value, dialogue.test.p_value])
    assert [test.finding, dialogue.test.finding] == ["improved", "improved"]
    assert found.notes == []


def test_another_text_under_the_same_id_is_another_question(tmp_path: Path) -> None:
    first = local(tmp_path, "one", answers("AAAAAA"))
    other = [*answers("BBB"), *answers("BBB", start=3, text="Who?"), *answers("A", start=9)]
    second = local(tmp_path, "two", other)
    (found,) = compare_finished([first, second]).multiple_choice
    assert (found.test.questions, found.test.lost) == (3, 3)
    assert (found.only_a, found.only_b) == (3, 4)


def test_what_got_no_answer_is_not_compared(tmp_path: Path) -> None:
    runs = [local(tmp_path, "one", answers("AB!A")), local(tmp_path, "two", answers("A!AB"))]
    (found,) = compare_finished(runs).multiple_choice
    assert (found.test.questions, found.test.gained, found.test.lost) == (2, 0, 1)


def test_each_run_is_tested_against_the_first(
    tmp_path: Path,
) -> None:
    runs = [
        local(tmp_path, "one", answers("B" * 12)),
        local(tmp_path, "two", answers("A" * 6 + "B" * 6)),
        local(tmp_path, "three", answers("B" * 12)),
    ]
    found = [test.test for test in compare_finished(runs).multiple_choice]
    assert [(test.a, test.b) for test in found] == [("one", "two"), ("one", "three")]
    assert [(test.p_value, test.p_holm) for test in found] == [(2 / 2**6, 4 / 2**6), (1, 1)]
    assert found[0].finding == "not enough evidence"


def rescored(results: dict[str, Any]) -> None:
    results["evaluation"]["multiple_choice"][0]["scoring"] = "generate"


def renamed(results: dict[str, Any]) -> None:
    results["evaluation"]["multiple_choice"][0]["name"] = "other"


def longer(results: dict[str, Any]) -> None:
    results["evaluation"]["dialogue"]["max_new_tokens"] = 256


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (rescored, "one and two: medmcqa was scored by letters and by generate"),
        (renamed, "one and two: medmcqa is not an evaluation of two"),
    ],
)
def test_tasks_scored_or_named_otherwise_are_not_compared(
    change: Callable[[dict[str, Any]], None], note: str, tmp_path: Path
) -> None:
    first = local(tmp_path, "one", answers("AB"), talks([0.1] * 3))
    second = local(tmp_path, "two", answers("AB"), talks([0.1] * 3), change=change)
    found = compare_finished([first, second])
    assert (found.multiple_choice, found.notes) == ([], [note])
    assert len(found.dialogue) == 1


def test_dialogues_with_another_limit_are_not_compared(tmp_path: Path) -> None:
    first = local(tmp_path, "one", answers("AB"), talks([0.1] * 3))
    second = local(tmp_path, "two", answers("AB"), talks([0.1] * 3), change=longer)
    found = compare_finished([first, second])
    assert found.dialogue == []
    assert found.notes == [
        "one and two: dialogue was scored by ROUGE-L of up to 128 new tokens and by ROUGE-L of up "
        "to 256 new tokens"
    ]


def test_settings_that_differ_are_found_by_their_paths() -> None:
    one = {
        "seed": 1,
        "output": "a",
        "train": {"epochs": 1, "lr": 0.1},
        "list": [{"name": "m", "n": 1}],
    }
    two = {"seed": 1, "output": "b", "train": {"epochs": 2}, "list": [{"name": "m", "n": 2}]}
    assert differing([one, two, one]) == {
        "train.epochs": [1, 2, 1],
        "train.lr": [0.1, None, 0.1],
        "list.m.n": [1, 2, 1],
    }


def test_runs_of_the_same_name_are_called_by_their_place(tmp_path: Path) -> None:
    runs = []
    for place in ("a", "b"):
        leave_run(LocalStore(tmp_path / place / "r"), "r", answers("AB"))
        runs.append(str(tmp_path / place / "r"))
    assert [run.label for run in compare_finished(runs).runs] == runs


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["one"], "name at least two runs"),
        (["one", "one/"], "is named twice"),
        (["one", "none"], "has no results.json: it is not a run, or not finished"),
        (["one", "stranger"], "shares no question and no dialogue with"),
        (["one", "two", "stranger"], "shares no question and no dialogue with"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_exit_2(
    runs: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local(tmp_path, "one", answers("AB"), talks([0.1]))
    local(tmp_path, "two", answers("AB"), talks([0.1]))
    local(tmp_path, "stranger", answers("AB", text="Who?"), talks([0.1], "I cough."))
    page = tmp_path / "page.html"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["job", "compare", *runs, "--html", str(page)])
    assert cli.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not page.exists()


def test_answers_that_were_changed_are_refused(tmp_path: Path) -> None:
    runs = [local(tmp_path, name, answers("AB")) for name in ("one", "two")]
    (tmp_path / "two/evals/finetuned/medmcqa/predictions.jsonl").write_text("{}")
    with pytest.raises(StageError, match=r"predictions\.jsonl does not have the checksum"):
        compare_finished(runs)


@pytest.fixture
def compared(tmp_path: Path) -> RunComparison:
    def other(results: dict[str, Any]) -> None:
        results["run"]["spec"] = {"seed": 1, "evil": EVIL}
        results["verdict"]["sentence"] = results["model"]["preset"] = EVIL

    first = local(tmp_path, "one", answers("BBBBAA"), talks([0.1] * 60))
    second = local(tmp_path, "two", answers("ABBBAA"), talks([0.2] * 60), change=other)
    return compare_finished([first, second])


def test_the_table_shows_the_findings(compared: RunComparison) -> None:
    out = io.StringIO()
    show(compared, Console(file=out, width=200))
    text = out.getvalue()
    for words in (
        "two vs. one", "6 questions", "+16.7 points", "1 gained, 0 lost", "60 dialogues",
        "not enough evidence", "higher", "train.epochs", "35.1%",
    ):  # fmt: skip
        assert words in text
    assert "\x1b" not in text
    assert "<script>" in text


def test_the_page_holds_the_same_and_hostile_text_is_harmless(compared: RunComparison) -> None:
    page = render_page(compared)
    tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not [name for name, _ in attrs if name.startswith("on") or name == "src"]

    Parser().feed(page)
    assert set(tags) & {"script", "img", "iframe", "link", "a", "object"} == set()
    assert "1 gained, 0 lost" in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert page.encode()


def test_the_command_prints_json_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [local(tmp_path, name, answers("AB"), talks([0.1])) for name in ("one", "two")]
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["job", "compare", *runs, "--json", "--html", str(page)])
    assert cli.main() == 0
    found = RunComparison.model_validate(json.loads(capsys.readouterr().out))
    assert found == compare_finished(runs)
    assert page.read_text() == render_page(found)


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    runs = [local(tmp_path, name, answers("AB")) for name in ("one", "two")]
    with pytest.raises(StageError, match="cannot write .*: No such file or directory"):
        compare_finished(runs, str(tmp_path / "none/page.html"))
    with pytest.raises(UsageError, match="neither a local folder nor gs://"):
        compare_finished([runs[0], "s3://bucket/run"])
