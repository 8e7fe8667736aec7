"""`job plan` as a user types it."""

import json
from pathlib import Path

import pytest

from tests.test_cli import job

ONE_B = "chatdoctor-gemma3-1b"


def test_a_shipped_spec_is_planned_offline_in_seconds(tmp_path: Path) -> None:
    output = f"output={json.dumps(str(tmp_path))}"
    offline = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9"}
    done = job("plan", ONE_B, "--set", output, **offline)
    assert done.returncode == 0
    for words in (
        "data -> baseline -> train -> finetuned -> reference -> judge -> report",
        "999,885,952 parameters",
        "2,609,152 trained",
        "v5e-8: 8 chips on 1 host (v5litepod-8",
        "fits",
        "at 40% of peak FLOP/s",
        "on demand",
        "assumed     an example has 210 tokens",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_demo_is_planned_without_its_weights(tmp_path: Path) -> None:
    output = f"output={json.dumps(str(tmp_path))}"
    done = job("plan", "demo", "--set", output, JOB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0
    assert "smollm2-135m-instruct: 134,515,008 parameters in float32" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_as_json_for_several_machines() -> None:
    done = job("plan", ONE_B, "--json", "--on", "v5e-8", "--on", "v6e-8")
    plan = json.loads(done.stdout)
    first, second = plan["machines"]
    assert (first["machine"], second["machine"]) == ("v5e-8", "v6e-8")
    assert first["memory"]["total"] == sum(
        first["memory"][part]
        for part in ("weights", "adapter", "optimizer", "activations", "logits")
    )
    assert first["cost"]["spot"] < first["cost"]["on_demand"]
    assert second["step_seconds"] < first["step_seconds"]


def test_the_table_has_a_line_per_size_with_advice() -> None:
    done = job("plan", ONE_B, "--table")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        f"v5e-{n}" for n in (1, 4, 8, 16, 32, 64, 128, 256)
    ]
    assert "train.batch_size 256" in lines[-1]
    large = job("plan", ONE_B, "--table", "--set", "model.preset=gemma3_instruct_12b_text")
    assert " NO " in large.stdout
    assert "runtime.mesh.model" in large.stdout


def test_finished_stages_are_shown_as_skipped(tmp_path: Path) -> None:
    arguments = ("smoke", "--set", f"output={json.dumps(str(tmp_path / 'runs'))}")
    ran = job("run", *arguments, "--until", "data", JOB_CACHE=str(tmp_path / "cache"))
    assert ran.returncode == 0
    done = job("plan", *arguments)
    assert (
        "baseline -> train -> finetuned -> reference -> judge -> report; skipped: data"
        in done.stdout
    )


def test_an_unreadable_bucket_counts_as_empty() -> None:
    nobody = {"GOOGLE_APPLICATION_CREDENTIALS": "", "HOME": "/nonexistent", "NO_GCE_CHECK": "true"}
    done = job("plan", "smoke", "--set", "output=gs://bucket-of-someone/runs", **nobody)
    assert done.returncode == 0, done.stderr
    assert "data -> baseline -> train" in done.stdout
    assert "assumed     nothing is done yet (no usable Google Cloud credentials" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smoke", "--on", "v5e-9"), "v5e does not have this size"),
        (("smoke", "--on", "tpu"), "is not a known accelerator"),
        (("smoke", "--on", "h100-1", "--compile"), "h100-1 is not a TPU"),
        (("smoke", "--table", "--compile"), "leave one of them out"),
        (("smoke", "--set", "model.preset=nothing"), "the shape of 'nothing' is not known"),
    ],
)
def test_an_impossible_plan_exits_2_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = job("plan", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize("option", ["--examples", "--tokens"])
def test_a_number_below_one_is_refused(option: str) -> None:
    done = job("plan", "smoke", option, "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Error: Invalid value for '{option}'" in done.stderr
