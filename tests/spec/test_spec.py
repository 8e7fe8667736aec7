"""Every mistake in a spec is told once, with its place and the way out, before anything runs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from job import cli
from job.errors import SpecError, UsageError
from job.spec.load import load_spec, parse_spec, run_id, shipped_specs
from job.spec.schema import Spec
from tests.spec import BASE

EVALS = """\
evals:
  multiple_choice:
    - name: first
      dataset: samples
      options: [opa, opb]
      answer: cop
"""
SECTIONS = ["name", "output", "seed", "runtime", "model", "data", "train", "evals", "reference"]


class Bad(NamedTuple):
    """A wrong spec: the line with the mistake ends in `# <-` (else it is the first)."""

    text: str
    path: str
    message: str
    override: str | None = None

    @property
    def where(self) -> str:
        if self.override is not None:
            return f"--set {self.override}"
        marked = [n for n, line in enumerate(self.text.split("\n"), 1) if line.endswith("# <-")]
        return f"spec.yaml:{marked[0] if marked else 1}"


def with_prompt(template: str) -> str:
    return BASE.replace('prompt: "{input}"', f"prompt: {template!r} # <-")


def with_dataset(dataset: str, more: str = "") -> str:
    return BASE.replace("dataset: samples", f"dataset: {dataset} # <-{more}")


BAD = {
    "top level key": Bad(
        BASE + "trian: # <-\n  epochs: 2\n", "trian", "unknown key; did you mean 'train'?"
    ),
    "section key": Bad(
        BASE + "train:\n  learning_rte: 1 # <-\n", "train.learning_rte", "mean 'learning_rate'?"
    ),
    "nested key": Bad(
        BASE + "runtime:\n  mesh:\n    date: 1 # <-\n", "runtime.mesh.date", "mean 'data'?"
    ),
    "key of a list item": Bad(
        BASE + EVALS + "      scorin: letters # <-\n",
        "evals.multiple_choice.0.scorin",
        "did you mean 'scoring'?",
    ),
    "key like no other": Bad(
        BASE + "reference:\n  model: m\n  zzz: 1 # <-\n", "reference.zzz", "attempts, base_url"
    ),
    "word for a number": Bad(BASE + "train:\n  epochs: many # <-\n", "train.epochs", "'many'"),
    "fraction for a count": Bad(BASE + "train:\n  epochs: 1.5 # <-\n", "train.epochs", "1.5"),
    "number for a text": Bad(
        BASE.replace("tiny", "5 # <-"), "model.preset", "valid string (got 5)"
    ),
    "value for a section": Bad(BASE + "train: 5 # <-\n", "train", "valid dictionary"),
    "empty section": Bad(BASE + "train: # <-\n", "train", "got None"),
    "list for a section": Bad(BASE + "train: [1] # <-\n", "train", "got [1]"),
    "below the range": Bad(BASE + "train:\n  epochs: 0 # <-\n", "train.epochs", "greater than 0"),
    "above the range": Bad(BASE + "seed: 2147483648 # <-\n", "seed", "less than 2147483648"),
    "at the open end": Bad(
        BASE + "train:\n  warmup_ratio: 1 # <-\n", "train.warmup_ratio", "less than 1"
    ),
    "not a number": Bad(
        BASE + "train:\n  learning_rate: .nan # <-\n", "train.learning_rate", "got nan"
    ),
    "none of the choices": Bad(
        BASE + "train:\n  schedule: cos # <-\n",
        "train.schedule",
        "'constant', 'linear' or 'cosine' (got 'cos')",
    ),
    "neither of two types": Bad(
        BASE + "train:\n  micro_batch: none # <-\n", "train.micro_batch", "or should be 'auto'"
    ),
    "capitals in the name": Bad(
        BASE.replace("doctor", "The Doctor # <-"), "name", "lowercase letters"
    ),
    "long name": Bad(BASE.replace("doctor", "d" * 64), "name", "at most 63 characters"),
    "duplicate key": Bad(BASE + "name: other # <-\n", "name", "given twice (first on line 1)"),
    "duplicate nested key": Bad(
        BASE + "train:\n  epochs: 1\n  epochs: 2 # <-\n",
        "train.epochs",
        "given twice (first on line 9)",
    ),
    "not YAML": Bad(BASE + "train: {epochs: 1: 2} # <-\n", "", "not valid YAML"),
    "tab": Bad(BASE + "train:\n\tepochs: 1 # <-\n", "", r"'\t' that cannot start any token"),
    "two documents": Bad(BASE + "--- # <-\nname: other\n", "", "another document"),
    "Python tag": Bad(
        BASE + "seed: !!python/name:os.system # <-\n", "", "could not determine a constructor"
    ),
    "alias": Bad(BASE + "seed: *nothing # <-\n", "", "*nothing is an alias"),
    "list as a key": Bad(BASE + "[a, b]: 1 # <-\n", "", "unhashable key"),
    "empty file": Bad("", "", "this is an empty file"),
    "comments only": Bad("# nothing\n", "", "this is an empty file"),
    "list": Bad("- name: doctor\n", "", "this is a list"),
    "text": Bad("name\n", "", "this is a str"),
    "no column": Bad(with_prompt("{}"), "data.prompt", "got {}"),
    "blank column": Bad(with_prompt("{ }"), "data.prompt", "got { }"),
    "JSON": Bad(with_prompt("{a} {'label': 1}"), "data.prompt", "got {'label': 1}"),
    "open brace": Bad(with_prompt("{a"), "data.prompt", "unbalanced braces"),
    "closing brace": Bad(with_prompt("{a} }"), "data.prompt", "unbalanced braces"),
    "no field": Bad(with_prompt("a {{b}}"), "data.prompt", "names no field"),
    "interpolation": Bad(with_prompt("${HOME}"), "data.prompt", "${...}, which is not expanded"),
    "scheme of a dataset": Bad(
        with_dataset("s3://bucket/rows"), "data.dataset", "s3:// is not supported here"
    ),
    "Hub dataset without a name": Bad(
        with_dataset("hf://owner"), "data.dataset", "write hf://owner/name"
    ),
    **{
        f"Hub dataset {name}": Bad(with_dataset(name), "data.dataset", "write hf://owner/name")
        for name in ("hf://../..", "hf://a/..", "hf://./x", "hf://a/b..c", "hf://a/-b", "hf://é/x")
    },
    "revision of a local dataset": Bad(
        BASE + "  revision: main # <-\n",
        "data.revision",
        "`revision` applies to an hf:// dataset only",
    ),
    "data files of a local dataset": Bad(
        BASE + "  data_files: [a.csv] # <-\n", "data.data_files", "`data_files`"
    ),
    "revision of a local model": Bad(
        BASE.replace("tiny", "tiny\n  revision: main # <-"),
        "model.revision",
        "`revision` applies to an hf:// preset only",
    ),
    "scheme of the output": Bad(
        BASE + "output: s3://b/runs # <-\n", "output", "gs://bucket/prefix"
    ),
    "output without a bucket": Bad(BASE + "output: gs:// # <-\n", "output", "gs://bucket/prefix"),
    "init_adapter of the Hub without an owner": Bad(
        BASE + "train:\n  init_adapter: hf://adapter # <-\n",
        "train.init_adapter",
        "is not hf://owner/name",
    ),
    "pack_length without packing": Bad(
        BASE + "train:\n  packing: false\n  pack_length: 512 # <-\n",
        "train.pack_length",
        "needs `packing: true`",
    ),
    "pack_length below max_length": Bad(
        BASE + "train:\n  max_length: 512\n  pack_length: 256 # <-\n",
        "train.pack_length",
        "must hold an example",
    ),
    "blocks compiled of which everything is kept": Bad(
        BASE + "train:\n  remat: none\n  compile: blocks # <-\n",
        "train.compile",
        "set `remat` to matmuls or blocks",
    ),
    "weight decay of sgd": Bad(
        BASE + "train:\n  optimizer: sgd\n  weight_decay: 0.1 # <-\n",
        "train.weight_decay",
        "does not apply to sgd",
    ),
    "one name for two evaluations": Bad(
        BASE
        + EVALS.replace("evals:", "evals: # <-")
        + "    - {name: first, dataset: samples, options: [opa, opb], answer: cop}\n",
        "evals",
        "are named 'first'",
    ),
    "name of another evaluation": Bad(
        BASE + EVALS.replace("evals:", "evals: # <-").replace("first", "dialogue"),
        "evals",
        "name of another evaluation",
    ),
    "one option": Bad(
        BASE + EVALS.replace("[opa, opb]", "[opa] # <-"),
        "evals.multiple_choice.0.options",
        "at least 2 items",
    ),
    "prompt without the options": Bad(
        BASE + EVALS + '      prompt: "{question}" # <-\n',
        "evals.multiple_choice.0.prompt",
        "exactly the fields {question} and {options}",
    ),
    "missing key": Bad(BASE.replace("name: doctor\n", ""), "name", "required, but missing"),
    "missing section": Bad(
        BASE.replace("model:\n  preset: tiny\n", ""), "model", "required, but missing"
    ),
    "missing key of a section": Bad(
        BASE.replace("data:", "data: # <-").replace('  prompt: "{input}"\n', ""),
        "data.prompt",
        "required, but missing",
    ),
    "missing key of a list item": Bad(
        BASE
        + EVALS.replace("- name: first", "- name: first # <-").replace("      answer: cop\n", ""),
        "evals.multiple_choice.0.answer",
        "required, but missing",
    ),
    "address of another scheme": Bad(
        BASE + "reference:\n  model: m\n  base_url: ftp://host/v1 # <-\n",
        "reference.base_url",
        "`base_url`",
    ),
    "address with credentials": Bad(
        BASE + "reference:\n  model: m\n  base_url: https://me:pw@host/v1 # <-\n",
        "reference.base_url",
        "without credentials",
    ),
    "budget of nothing": Bad(
        BASE + "reference:\n  model: m\n  max_usd: 0 # <-\n",
        "reference.max_usd",
        "greater than 0",
    ),
    "effort that there is not": Bad(
        BASE + "reference:\n  model: m\n  reasoning: 'off' # <-\n",
        "reference.reasoning",
        "'none', 'minimal'",
    ),
    "flag without a value": Bad(BASE, "", "write --set KEY=VALUE", "train.epochs"),
    "flag without a key": Bad(BASE, "", "write --set KEY=VALUE", "=3"),
    "flag with an empty part": Bad(BASE, "", "write --set KEY=VALUE", "train..epochs=3"),
    "flag out of range": Bad(BASE, "train.epochs", "greater than 0", "train.epochs=0"),
    "flag with an unknown key": Bad(BASE, "train.epochz", "mean 'epochs'?", "train.epochz=1"),
    "flag that is not YAML": Bad(BASE, "train.epochs", "is not valid YAML", "train.epochs=["),
    "flag without a content": Bad(BASE, "train.epochs", "got None", "train.epochs="),
    "flag into a value": Bad(BASE, "name.first", "'name' is a value", "name.first=x"),
    "flag past the list": Bad(
        BASE + EVALS,
        "evals.multiple_choice.1.limit",
        "is a list of 1",
        "evals.multiple_choice.1.limit=9",
    ),
    "flag with a name in a list": Bad(
        BASE + EVALS,
        "evals.multiple_choice.first.limit",
        "'first' is not the index",
        "evals.multiple_choice.first.limit=9",
    ),
    "flag at a list item": Bad(
        BASE + EVALS,
        "evals.multiple_choice.0.limit",
        "greater than 0",
        "evals.multiple_choice.0.limit=0",
    ),
    "flag with an interpolation": Bad(BASE, "output", "not expanded", "output=${OUT}/runs"),
}

ACROSS_SECTIONS = {
    "reference.evals": BASE + EVALS + "reference:\n  model: m\n  evals: [second]\n",
    "evals.dialogue.examples": BASE + "evals:\n  dialogue: {examples: 201}\n",
    "evals.side_by_side.examples": BASE + "evals:\n  side_by_side: {examples: 201}\n",
}


class Folder:
    """A working folder that holds one spec, and what the real command says of it there."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path
        self._capsys = capsys

    def job(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        return cli.main(), *self._capsys.readouterr()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Folder]:
    monkeypatch.chdir(tmp_path)
    yield Folder(tmp_path, capsys)


def arguments_of(bad: Bad) -> list[str]:
    chosen = [] if bad.override is None else ["--set", bad.override]
    return ["run", "spec.yaml", *chosen, "--until", "preflight"]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_mistake_ends_the_run_with_one_located_message(
    bad: Bad, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "spec.yaml").write_text(bad.text, encoding="utf-8")
    code, out, err = folder.job(monkeypatch, *arguments_of(bad))
    place = f"{bad.where}: {bad.path}: " if bad.path else f"{bad.where}: "
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {place}")
    assert bad.message in err
    assert err.count("\n") == 1
    assert folder.names() == ["spec.yaml"]


@pytest.mark.parametrize(("path", "text"), ACROSS_SECTIONS.items(), ids=ACROSS_SECTIONS.keys())
def test_contradicting_sections_are_reported_once(
    path: str, text: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "spec.yaml").write_text(text, encoding="utf-8")
    code, out, err = folder.job(monkeypatch, "run", "spec.yaml", "--until", "preflight")
    assert (code, out) == (2, "")
    assert err.startswith("error: spec.yaml:")
    assert path in err
    assert err.count("\n") == 1
    assert folder.names() == ["spec.yaml"]


def test_the_command_writes_nothing_for_a_wrong_spec(tmp_path: Path) -> None:
    bad = BAD["key of a list item"]
    (tmp_path / "spec.yaml").write_text(bad.text, encoding="utf-8")
    run_and_refuse(tmp_path, "run", "spec.yaml", "--output", "runs", message=bad.message)


def test_the_command_writes_nothing_for_a_wrong_flag(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(BASE, encoding="utf-8")
    run_and_refuse(tmp_path, "run", "spec.yaml", "--set", "train", message="--set train:")


def run_and_refuse(folder: Path, *arguments: str, message: str) -> None:
    """Run the command in a process of its own; it must refuse in one line and write nothing."""
    command = [sys.executable, "-m", "job", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["spec.yaml"]


def test_all_problems_are_reported_in_file_order_flags_last() -> None:
    text = """\
name: The Doctor
output: s3://bucket
model:
  preset: tiny
  lora: {rank: 0}
data:
  dataset: samples
  prompt: "{a}}"
train:
  epochs: 1
  epochs: 2
  schedule: cos
evals:
  multiple_choice:
    - {name: first, dataset: ftp://host/a, options: [a, b], answer: c}
"""
    with pytest.raises(SpecError) as refused:
        parse_spec(text, "spec.yaml", ["train.batch_size=0", "seed=-1"])
    assert [(problem.where, problem.path) for problem in refused.value.problems] == [
        ("spec.yaml:1", "name"),
        ("spec.yaml:2", "output"),
        ("spec.yaml:5", "model.lora.rank"),
        ("spec.yaml:6", "data.response"),
        ("spec.yaml:8", "data.prompt"),
        ("spec.yaml:11", "train.epochs"),
        ("spec.yaml:12", "train.schedule"),
        ("spec.yaml:15", "evals.multiple_choice.0.dataset"),
        ("--set seed=-1", "seed"),
        ("--set train.batch_size=0", "train.batch_size"),
    ]
    assert str(refused.value).split("\n") == [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize("name", shipped_specs())
def test_shipped_specs_are_valid_and_say_how_to_run_them(name: str) -> None:
    loaded = load_spec(name)
    assert loaded.spec.name == loaded.source == name
    shipped = Path(cli.__file__).parent / "specs" / f"{name}.yaml"
    first = shipped.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# (uv run --extra \w+ )?job run {name}\b", first)


def test_the_closest_name_of_an_unknown_spec_is_suggested() -> None:
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        load_spec("smoek")


def test_a_spec_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load_spec(str(tmp_path / "spec.yaml"))


def test_validate_prints_the_run_id_of_a_valid_spec(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.path / "spec.yaml").write_text(BASE, encoding="utf-8")
    expected = f"spec.yaml: valid; its run id is {run_id(parse_spec(BASE, 'spec.yaml'))}\n"
    expected += "chat template: the model's own, else the built-in one of its turn tokens\n"
    assert folder.job(monkeypatch, "validate", "spec.yaml") == (0, expected, "")


def test_the_schema_describes_every_field_and_refuses_others(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = folder.job(monkeypatch, "schema")
    schema: dict[str, Any] = json.loads(out)
    assert code == 0
    assert list(schema["properties"]) == SECTIONS
    assert sorted(schema["required"]) == ["data", "model", "name"]
    models = {"Spec": schema, **schema["$defs"]}
    for name, model in models.items():
        if name == "JsonValue":  # any value, for variables of chat templates
            continue
        assert model["type"] == "object"
        assert model["additionalProperties"] is False, name
        for field, described in model["properties"].items():
            assert described.get("description", "").endswith("."), f"{name}.{field}"
    references = set(values_under(schema, "$ref"))
    assert references == {f"#/$defs/{name}" for name in schema["$defs"]}


def values_under(value: object, key: str) -> Iterator[Any]:
    """Every value under `key`, however deep."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name == key:
                yield item
            yield from values_under(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from values_under(item, key)


def test_flags_replace_values_items_and_missing_sections() -> None:
    spec = parse_spec(
        BASE + EVALS,
        "spec.yaml",
        [
            "model.lora.targets=[key, value]",
            "model.lora.targets.1=query",
            "evals.multiple_choice.0.limit=7",
            "evals.multiple_choice.0.options.1=opc",
            "evals.dialogue=null",
            "data.prompt='{question}: {detail}'",
            "output=gs://bucket/runs",
            "output=gs://bucket/later",
        ],
    )
    assert spec.model.lora.targets == ["key", "query"]
    assert spec.evals.multiple_choice[0].limit == 7
    assert spec.evals.multiple_choice[0].options == ["opa", "opc"]
    assert spec.evals.dialogue is None
    assert spec.data.prompt == "{question}: {detail}"
    assert spec.output == "gs://bucket/later"
    assert spec.model.preset == "tiny"


def test_a_flag_that_begins_a_section_needs_the_rest_of_it() -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(BASE, "spec.yaml", ["reference.concurrency=2"])
    assert [(found.path, found.message) for found in refused.value.problems] == [
        ("reference.model", "required, but missing")
    ]


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "1e-04"])
def test_a_learning_rate_is_a_number_however_it_is_written(written: str) -> None:
    in_file = parse_spec(BASE + f"train:\n  learning_rate: {written}\n", "spec.yaml")
    by_flag = parse_spec(BASE, "spec.yaml", [f"train.learning_rate={written}"])
    assert in_file.train.learning_rate == by_flag.train.learning_rate == 1e-4
    assert run_id(in_file) == run_id(by_flag)


@pytest.mark.parametrize(
    "override",
    ["train.epochs=2", "model.lora.rank=4", "data.train_examples=9", "seed=1", "name=other"],
)
def test_the_run_id_changes_with_what_the_adapter_is_made_from(override: str) -> None:
    assert identity(override) != identity()


@pytest.mark.parametrize(
    "override",
    [
        "evals.dialogue=null",
        "evals.multiple_choice.0.limit=3",
        "output=gs://bucket/runs",
        "reference={model: m}",
        "runtime.devices=8",
        "train.epochs=1",
    ],
)
def test_the_run_id_stays_when_only_measuring_changes(override: str) -> None:
    assert identity(override) == identity()


def identity(*overrides: str) -> str:
    return run_id(parse_spec(BASE + EVALS, "spec.yaml", overrides))


def test_the_run_id_does_not_depend_on_layout_or_order() -> None:
    reordered = yaml.safe_dump(yaml.safe_load(BASE), sort_keys=True, default_flow_style=True)
    assert run_id(parse_spec(reordered, "other.yaml")) == run_id(parse_spec(BASE, "spec.yaml"))


def refuses_or_accepts(text: str, *overrides: str) -> None:
    """Parsing may end in a spec or in a SpecError with problems, and in nothing else."""
    try:
        assert isinstance(parse_spec(text, "spec.yaml", overrides), Spec)
    except SpecError as refused:
        assert refused.problems
        assert all(problem.message for problem in refused.problems)


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=60)
def test_no_text_can_crash_the_reader(text: str) -> None:
    refuses_or_accepts(text)
    refuses_or_accepts(BASE + text)


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*SECTIONS, "dataset", "prompt", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from([*SECTIONS, "more"]), DOCUMENTS, max_size=6))
@settings(deadline=None, max_examples=60)
def test_no_document_can_crash_the_checks(document: dict[str, Any]) -> None:
    refuses_or_accepts(yaml.safe_dump(document))


@given(
    st.sampled_from(
        ["train.epochs", "train", "model.lora", "data.prompt", "evals.multiple_choice"]
    ),
    st.text(alphabet=st.characters(codec="ascii", exclude_characters="!&*-"), max_size=12),
)
@settings(deadline=None, max_examples=60)
def test_no_value_of_a_flag_can_crash_the_reader(key: str, value: str) -> None:
    refuses_or_accepts(BASE, f"{key}={value}")


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("trian.epochs=3", "trian"),
        ("train.lora.rank=3", "train.lora"),
        ("seed=2020-13-45", "seed"),
        ("seed=!!int x", "seed"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("train.epochs=true", "train.epochs"),
        ("train.learning_rate=true", "train.learning_rate"),
        ("data.system={a.b}", "data.system"),
        ("name=${X}", "name"),
    ],
)
def test_a_wrong_flag_is_reported_once_at_the_flag(flag: str, path: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(BASE, "spec.yaml", [flag])
    (problem,) = caught.value.problems
    assert (problem.where, problem.path) == (f"--set {flag}", path)


def test_checks_across_sections_name_the_line_to_change() -> None:
    text = BASE + "  validation_examples: 2\nevals:\n  dialogue:\n    examples: 5\n"
    with pytest.raises(SpecError, match=r"spec.yaml:11: evals.dialogue.examples: .* is more than"):
        parse_spec(text, "spec.yaml")


def test_a_value_that_contains_itself_is_refused() -> None:
    with pytest.raises(SpecError, match="is not valid YAML"):
        parse_spec(BASE, "spec.yaml", ["train=&a [*a]"])


@pytest.mark.parametrize("text", [BASE, json.dumps(yaml.safe_load(BASE))], ids=["YAML", "JSON"])
def test_the_environment_may_hold_the_spec_itself(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_SPEC", text)
    loaded = load_spec(text)
    assert (loaded.source, loaded.spec) == ("JOB_SPEC", parse_spec(BASE, "spec.yaml"))
    monkeypatch.delenv("JOB_SPEC")
    with pytest.raises(UsageError, match="no spec"):
        load_spec(text)


def test_job_spec_names_the_spec_if_the_command_does_not(tmp_path: Path) -> None:
    for value, code, out, err in (
        ("smoke", 0, "smoke: valid", ""),
        (f"{BASE}colour: red\n", 2, "", "error: JOB_SPEC:"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "job", "validate"],
            env={**os.environ, "JOB_SPEC": value},
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code
        assert done.stdout.startswith(out)
        assert done.stderr.startswith(err)


def test_the_reference_cannot_answer_dialogues_that_are_left_out() -> None:
    text = BASE + "evals:\n  dialogue: null\nreference:\n  model: m\n  dialogue: true\n"
    with pytest.raises(SpecError, match="`reference.dialogue` needs `evals.dialogue`"):
        parse_spec(text, "spec.yaml")


@pytest.mark.parametrize(
    ("api", "base_url", "expected"),
    [
        ("auto", "https://openrouter.ai/api/v1", True),
        ("auto", "https://eu.openrouter.ai:443/api/v1", True),
        ("auto", "http://127.0.0.1:8000/v1", False),
        ("auto", "https://notopenrouter.ai/v1", False),
        ("openrouter", "http://127.0.0.1:8000/v1", True),
        ("openai", "https://openrouter.ai/api/v1", False),
    ],
)
def test_openrouter_is_known_by_its_address_or_by_name(
    api: str, base_url: str, expected: bool
) -> None:
    text = BASE + f"reference: {{model: m, api: {api}, base_url: '{base_url}'}}\n"
    reference = parse_spec(text, "spec.yaml").reference
    assert reference is not None
    assert reference.is_openrouter is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "*a is an alias; write the value out"),
        ("name: &n t\nmodel: {preset: *n}\n", "*n is an alias"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("# " + "x" * 1_000_001, "at most 1,000,000 characters"),
    ],
)
def test_yaml_that_grows_when_it_is_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec(text, "spec.yaml")
    assert message in str(raised.value)
