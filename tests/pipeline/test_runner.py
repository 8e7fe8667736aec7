"""What must run again follows from what changed: no stage too many, and none too few."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import UsageError
from job.pipeline.preflight import check_local_inputs
from job.pipeline.run import StageRecord
from job.pipeline.runner import run_job
from job.pipeline.stages import NAMES, STAGES, dependents, stage_digests
from job.pipeline.status import read_stage_records, stale_stages
from job.results import Artifact, EnvironmentInfo
from job.spec.load import LoadedSpec, parse_spec
from job.spec.schema import Spec
from job.storage.local import LocalStore
from tests.spec import BASE

TEXT = f"""{BASE}
evals:
  multiple_choice:
    - {{name: first, dataset: samples, options: [opa, opb], answer: cop}}
reference:
  model: large
"""
ALL = ["data", "baseline", "train", "finetuned", "reference", "judge", "report"]
KEY = "OPENROUTER_API_KEY"


@pytest.fixture(autouse=True)
def without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


def spec_with(*overrides: str) -> Spec:
    return parse_spec(TEXT, "spec.yaml", overrides)


def changed_stages(before: Spec, after: Spec) -> list[str]:
    """Names of the stages whose digest differs."""
    old, new = stage_digests(before), stage_digests(after)
    return [name for name in old if old[name] != new[name]]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=1", ALL),
        ("data.train_examples=9", ALL),
        ("data.prompt='{input} {instruction}'", ALL),
        ("model.lora.rank=4", ["train", "finetuned", "judge", "report"]),
        ("model.lora.targets=[key]", ["train", "finetuned", "judge", "report"]),
        ("model.dtype=float32", ["baseline", "train", "finetuned", "judge", "report"]),
        ("model.chat_template=plain", ["baseline", "train", "finetuned", "judge", "report"]),
        ("train.epochs=2", ["train", "finetuned", "judge", "report"]),
        ("train.learning_rate=1e-3", ["train", "finetuned", "judge", "report"]),
        ("evals.multiple_choice.0.limit=3", ["baseline", "finetuned", "judge", "report"]),
        ("evals.multiple_choice.0.max_new_tokens=3", ["baseline", "finetuned", "judge", "report"]),
        (
            "evals.side_by_side.examples=2",
            ["baseline", "finetuned", "reference", "judge", "report"],
        ),
        ("evals.side_by_side.max_new_tokens=2", ["baseline", "finetuned", "judge", "report"]),
        ("evals.bootstrap_samples=500", ["report"]),
        ("reference.concurrency=2", ["report"]),
        ("evals.dialogue.max_new_tokens=9", ["baseline", "finetuned", "judge", "report"]),
        ("evals.batch_size=2", ["report"]),
        ("evals.max_truncated_share=0.5", ["report"]),
        (
            "evals.multiple_choice.0.shuffle_options=true",
            ["baseline", "finetuned", "judge", "report"],
        ),
        ("reference.model=larger", ["reference", "report"]),
        ("reference=null", ["reference", "report"]),
        ("evals.judge={model: m}", ["judge", "report"]),
        (
            "evals.tasks=[{name: t, metric: f1}]",
            ["baseline", "finetuned", "reference", "judge", "report"],
        ),
        ("runtime.devices=8", ["report"]),
        ("output=gs://bucket/runs", []),
        ("train.epochs=1", []),
    ],
)
def test_a_change_touches_the_stages_that_depend_on_it_and_no_other(
    override: str, changed: list[str]
) -> None:
    assert changed_stages(spec_with(), spec_with(override)) == changed


def test_every_stage_has_a_digest_of_its_own() -> None:
    digests = stage_digests(spec_with())
    assert list(digests) == ALL
    assert ["preflight", *ALL] == list(NAMES)
    assert len(set(digests.values())) == len(ALL)
    assert digests == stage_digests(spec_with())


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("data", ["baseline", "train", "finetuned", "reference", "judge", "report"]),
        ("baseline", ["judge", "report"]),
        ("train", ["finetuned", "judge", "report"]),
        ("finetuned", ["judge", "report"]),
        ("reference", ["report"]),
        ("report", []),
    ],
)
def test_dependents_are_found_through_others(stage: str, expected: list[str]) -> None:
    assert dependents(stage) == expected


def test_a_stage_needs_only_stages_before_it() -> None:
    for place, stage in enumerate(STAGES):
        assert set(stage.needs) <= {earlier.name for earlier in STAGES[:place]}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


MACHINE = EnvironmentInfo(
    platform="cpu", device_kind="cpu", devices=1, processes=1, python="3.12", packages={},
    git_commit=None, image=None,
)  # fmt: skip


def finish(store: LocalStore, spec: Spec, *, open_questions: bool = False) -> None:
    """Leave what a run leaves whose stages are all done: markers, and two files a stage."""
    for name, digest in stage_digests(spec).items():
        outputs = []
        for kind in ("first", "second"):
            path = f"{name}/{kind}"
            store.write(path, b"content")
            outputs.append(Artifact(path=path, bytes=7, sha256="0" * 64))
        outcome: dict[str, object] = {"open": open_questions} if name == "reference" else {}
        marker = StageRecord(
            stage=name,
            digest=digest,
            outputs=outputs,
            started="",
            seconds=1.0,
            outcome=outcome,
            environment=MACHINE,
        )
        store.write(f"stages/{name}.json", marker.model_dump_json().encode())


def stale(store: LocalStore, spec: Spec) -> list[str]:
    return stale_stages(spec, store, read_stage_records(store), stage_digests(spec))


def test_all_stages_run_where_nothing_was_done(store: LocalStore) -> None:
    assert stale(store, spec_with()) == ALL


def test_no_stage_runs_where_all_is_done(store: LocalStore) -> None:
    finish(store, spec_with())
    assert stale(store, spec_with()) == []


Damage = Callable[[LocalStore], None]

DAMAGES: dict[str, Damage] = {
    "marker is missing": lambda store: store.delete("stages/train.json"),
    "marker is cut short": lambda store: store.write("stages/train.json", b'{"stage": "train", '),
    "marker is empty": lambda store: store.write("stages/train.json", b""),
    "marker is of another kind": lambda store: store.write("stages/train.json", b"{}"),
    "marker is no text": lambda store: store.write("stages/train.json", b"\xff\xfe"),
    "output is missing": lambda store: store.delete("train/second"),
    "output is longer": lambda store: store.write("train/second", b"contents"),
    "output is empty": lambda store: store.write("train/second", b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_stage_runs_again_with_all_that_depends_on_it(
    damage: Damage, store: LocalStore
) -> None:
    finish(store, spec_with())
    damage(store)
    assert stale(store, spec_with()) == ["train", "finetuned", "judge", "report"]


def test_files_that_no_stage_left_change_nothing(store: LocalStore) -> None:
    finish(store, spec_with())
    store.write("notes.txt", b"mine")
    store.write("stages/another.json", b"{")
    assert stale(store, spec_with()) == []


def test_a_change_of_the_spec_makes_its_stages_stale(store: LocalStore) -> None:
    finish(store, spec_with())
    assert stale(store, spec_with("train.epochs=2")) == ["train", "finetuned", "judge", "report"]
    assert stale(store, spec_with("output=elsewhere")) == []


def local_spec(path: Path, where: str) -> Spec:
    return spec_with(f"{where}.dataset={path}")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("data", ALL),
        ("evals.multiple_choice.0", ["baseline", "finetuned", "judge", "report"]),
    ],
)
def test_a_local_file_that_changed_under_its_name_makes_its_readers_stale(
    where: str, expected: list[str], store: LocalStore, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a"}\n')
    finish(store, local_spec(rows, where))
    rows.write_text('{"input": "a"}\n')
    assert stale(store, local_spec(rows, where)) == []
    rows.write_text('{"input": "b"}\n')
    assert stale(store, local_spec(rows, where)) == expected


@pytest.mark.parametrize(
    ("open_questions", "key", "overrides", "expected"),
    [
        (True, None, [], []),
        (True, "  ", [], []),
        (True, "sk-or-key", [], ["reference", "report"]),
        (False, "sk-or-key", [], []),
        (True, "sk-or-key", ["reference=null"], []),
    ],
)
def test_the_reference_is_asked_again_only_where_there_is_more_to_get(
    open_questions: bool,
    key: str | None,
    overrides: list[str],
    expected: list[str],
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if key is not None:
        monkeypatch.setenv(KEY, key)
    spec = spec_with(*overrides)
    finish(store, spec, open_questions=open_questions)
    assert stale(store, spec) == expected


def refuse(folder: Path, message: str, **arguments: Any) -> None:
    """The run must be refused with `message` before it writes anything."""
    spec = arguments.pop("spec", spec_with(f"output={folder}/runs"))
    with pytest.raises(UsageError, match=message) as refused:
        run_job(LoadedSpec(spec, "spec.yaml"), **arguments)
    assert refused.value.exit_code == 2
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "identity",
    [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "/a",
        "a b",
        "-a",
        "a-",
        ".a",
        "a.",
        "a\n",
        "\u00e4",
        "a" * 129,
    ],
)
def test_a_run_id_that_is_no_plain_name_is_refused(identity: str, tmp_path: Path) -> None:
    refuse(tmp_path, r"^--run-id .*letters, digits", run_id=identity)


@pytest.mark.parametrize("until", ["", "Train", "training", "all"])
def test_an_unknown_stage_to_stop_at_is_refused_with_the_known_ones(
    until: str, tmp_path: Path
) -> None:
    refuse(tmp_path, "no such stage; write one of preflight, data, baseline, train", until=until)


def test_a_folder_needs_no_list_of_files(tmp_path: Path) -> None:
    check_local_inputs(spec_with(f"data.dataset={tmp_path}"))


@pytest.mark.parametrize("where", ["data", "evals.multiple_choice.0"])
def test_a_local_file_that_is_not_there_is_refused_by_its_place_in_the_spec(
    where: str, tmp_path: Path
) -> None:
    overrides = (f"output={tmp_path}/runs", f"{where}.dataset={tmp_path}/none.jsonl")
    refuse(tmp_path, rf"^{where}\.dataset: there is no file", spec=spec_with(*overrides))
