"""A log line is one line of JSON that Cloud Logging reads, and it never has a secret."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from job.pipeline.layout import LOG
from job.pipeline.run_log import RunLog
from job.runtime import logs
from job.runtime.logs import REDACTED, SECRET_VARIABLES, Redactor
from job.storage.local import LocalStore

SECRET = "correct-horse-battery"
SHAPES = [
    "hf_" + "aB3" * 8,
    "sk-or-v1-" + "0f" * 20,
    "sk-proj_" + "aB3" * 8,
    "ya29." + "a0Af_-" * 6,
    "AIza" + "Sy_-1" * 7,
]

Lines = Callable[[], list[dict[str, Any]]]


class Terminal(io.StringIO):
    """A stream that reports a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The lines of a process without a terminal."""
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENROUTER_API_KEY", f" {SECRET}\n")
    stream = io.StringIO()
    logs.configure(stream=stream)
    return stream


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    return lambda: [json.loads(line) for line in stream.getvalue().split("\n")[:-1]]


def test_a_line_has_the_fields_that_cloud_logging_reads(lines: Lines) -> None:
    structlog.contextvars.bind_contextvars(run_id="doctor-1", stage="train")
    logs.get().info("step", loss=1.5, step=7)
    logs.get().warning("careful")
    logs.get().error("broken", error="why")
    first, second, third = lines()
    assert list(first)[:3] == ["severity", "time", "message"]
    assert first.pop("time").endswith("Z")
    assert first == {
        "severity": "INFO",
        "message": "step",
        "loss": 1.5,
        "step": 7,
        "run_id": "doctor-1",
        "stage": "train",
        "logging.googleapis.com/labels": {"run_id": "doctor-1", "stage": "train"},
    }
    assert (second["severity"], third["severity"], third["error"]) == ("WARNING", "ERROR", "why")


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\rb", "a\n\n", "\n", '{"a": 1}\n{"b"', "a\x00b"]
)
def test_text_with_line_breaks_stays_one_line(text: str, lines: Lines, stream: io.StringIO) -> None:
    logs.get().info(text, detail={"nested": [text]})
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()
    assert [(line["message"], line["detail"]["nested"]) for line in lines()] == [(text, [text])]


def test_letters_of_any_script_stay_legible(lines: Lines, stream: io.StringIO) -> None:
    logs.get().info("\u00e4rztlich \u4f60\u597d \U0001f600")
    assert "\u00e4rztlich \u4f60\u597d \U0001f600" in stream.getvalue()


def test_objects_of_libraries_are_written_as_text(lines: Lines) -> None:
    logs.get().info("wrote", path=Path("runs/a"))
    assert lines()[0]["path"] == "runs/a"


@pytest.mark.parametrize("secret", [SECRET, *SHAPES])
def test_a_secret_appears_nowhere(secret: str, lines: Lines, stream: io.StringIO) -> None:
    logs.get().error(
        f"failed with {secret}",
        error=f"GET https://host/?key={secret}&x=1: Bearer {secret}",
        nested={"a": [{"b": (secret, f'"{secret}"')}], "n": 1},
        rows=[secret, [secret]],
    )
    assert secret not in stream.getvalue()
    assert lines()[0]["message"] == f"failed with {REDACTED}"
    assert lines()[0]["nested"]["n"] == 1


def test_an_authorization_header_is_hidden(
    stream: io.StringIO,
) -> None:
    logs.get().info("sent", header="Authorization: Bearer abc.def-123~x/y+z==")
    assert "abc.def" not in stream.getvalue()


@pytest.mark.parametrize(
    "name",
    ["token", "HF_TOKEN", "api_key", "apikey", "OPENROUTER_API_KEY", "client_secret", "Password"],
)
def test_a_value_under_a_secret_name_is_hidden(name: str, lines: Lines) -> None:
    logs.get().info("settings", **{name: "plain"}, inside={"deeper": [{name: "plain"}]})
    assert lines()[0][name] == REDACTED
    assert lines()[0]["inside"] == {"deeper": [{name: REDACTED}]}


def test_figures_about_tokens_are_not_secrets(lines: Lines) -> None:
    logs.get().info("done", tokens=512, tokens_per_second=3.5, token=3, keyword="plain")
    shown = lines()[0]
    assert (shown["tokens"], shown["tokens_per_second"]) == (512, 3.5)
    assert (shown["token"], shown["keyword"]) == (3, "plain")


def test_a_short_or_unset_variable_hides_nothing() -> None:
    redact = Redactor({"HF_TOKEN": "no", "OPENROUTER_API_KEY": "", "KAGGLE_KEY": "  "})
    assert redact.text("no token here") == "no token here"


def test_a_secret_that_contains_another_is_hidden() -> None:
    redact = Redactor({"HF_TOKEN": "abcdef", "KAGGLE_KEY": "abcdef-and-more"})
    assert redact.text("x abcdef-and-more y abcdef") == f"x {REDACTED} y {REDACTED}"


SHAPES = st.sampled_from(
    [
        "hf_{}", "sk-{}", "ghp_{}", "gho_{}", "github_pat_{}", "AKIA{:.16}", "ya29.{}", "AIza{}",
        "Bearer {}", "Authorization: Basic {}", "{{'Authorization': 'Basic {}'}}",
        "https://user:{}@proxy:8080/x", "https://:{}@host", "https://h/p?token={}&a=1",
        "gs://b/o?X-Goog-Signature={}", "https://h/?a=1&access_token={}", "https://h/?sig={}",
        "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n{}",
    ]
)  # fmt: skip


@given(SHAPES, st.text("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", min_size=36, max_size=60), st.text())
@settings(deadline=None)
def test_what_looks_like_a_secret_is_redacted(shape: str, secret: str, around: str) -> None:
    assume(secret[:16] not in around)
    text = f"{around} {shape.format(secret)} {around}"
    assert secret[:16] not in Redactor({}).text(text)


@pytest.mark.parametrize(
    "text",
    ["a basic understanding", "user:name@host", "?page=2&size=3", "https://h:8080/a@b", "a key=x"],
)
def test_ordinary_text_is_not_redacted(text: str) -> None:
    assert Redactor({}).text(text) == text


def test_text_of_others_cannot_move_the_cursor_or_add_lines() -> None:
    stream = Terminal()
    logs.configure(None, stream)
    logs.get().warning("bad\x1b[2J name\nerror: fake", detail=["a\x1b]0;title\x07", "b\r\nc"])
    (line,) = stream.getvalue().splitlines()
    assert "\x1b[2J" not in line and "\x1b]0" not in line and "\x07" not in line
    assert "error: fake" in line


NESTED = st.recursive(
    st.just(SECRET) | st.text().map(lambda text: f"{text} {SECRET} {text}") | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(NESTED)
@settings(deadline=None)
def test_secrets_in_nested_values_are_redacted(value: Any) -> None:
    cleaned = Redactor({"HF_TOKEN": SECRET}).value(value)
    assert SECRET not in json.dumps(cleaned)


def test_lines_before_the_file_is_open_come_first_and_once(tmp_path: Path) -> None:
    run_log = RunLog()
    logs.configure(run_log.write, io.StringIO())
    logs.get().info("first")
    logs.get().info("second")
    run_log.open(LocalStore(tmp_path), tmp_path)
    logs.get().info("third")
    assert messages(tmp_path / LOG) == ["first", "second", "third"]
    run_log.close()
    logs.get().info("after the end")
    assert messages(tmp_path / LOG) == ["first", "second", "third"]


def messages(path: Path) -> list[str]:
    """Read the messages of a log file."""
    return [json.loads(line)["message"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_log_file_is_redacted_like_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    lines, stream = list[str](), Terminal()
    logs.configure(lines.append, stream)
    logs.get().info(f"hello {SECRET}", detail=[SECRET])
    (written,) = lines
    assert json.loads(written)["message"] == f"hello {REDACTED}"
    assert SECRET not in written + stream.getvalue()
    assert f"hello {REDACTED}" in stream.getvalue()


def test_a_terminal_gets_a_short_line_without_json() -> None:
    stream = Terminal()
    logs.configure(stream=stream)
    structlog.contextvars.bind_contextvars(run_id="doctor-1", stage="train")
    logs.get().info("step", loss=1.23456789, rows={"raw": 3})
    shown = stream.getvalue()
    assert "train" in shown
    assert "loss=1.235" in shown
    assert "raw:3" in shown
    assert "doctor-1" not in shown
    assert "{" not in shown


def test_debug_lines_are_not_logged(stream: io.StringIO) -> None:
    logs.get().debug("noise")
    assert stream.getvalue() == ""


def test_values_that_json_lacks_are_redacted_text(lines: Lines) -> None:
    error = ValueError(f"refused {SECRET}")
    logs.get().info("done", error=error, seen={SECRET: {SECRET}}, loss=float("nan"), cut="\ud800")
    (line,) = lines()
    assert SECRET not in json.dumps(line)
    assert line["error"] == "refused [redacted]"
    assert (line["loss"], line["cut"]) == ("nan", "\\ud800")
