"""The commands of `job`: arguments in, exit code out, nothing else.

Heavy imports (keras, jax, datasets) are inside the command that needs them, so that `--help`,
`validate`, `plan` and `schema` answer immediately.
"""

import json
import os
import sys
from typing import Annotated, Literal

import typer

from job import __version__
from job.errors import JobError, RunStoppedError
from job.runtime.logs import Redactor, legible
from job.storage.certificates import share_bundle
from job.storage.locations import ensure_home

app = typer.Typer(
    name="job",
    help="Fine-tune a language model from one YAML spec and measure what changed.",
    epilog="Exit codes: 0 done, 2 wrong spec or arguments, 3 wrong environment, 4 a stage failed, "
    "75 stopped early (run the same command to resume).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecArgument = Annotated[
    str,
    typer.Argument(
        envvar="JOB_SPEC",
        help="A path, a gs:// URI, or the name of a shipped spec, like smoke; the environment "
        "variable may also hold the YAML text.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the spec; repeatable."),
]
OutputOption = Annotated[
    str | None, typer.Option(metavar="URI", help="Folder or gs:// prefix for runs.")
]
RunIdOption = Annotated[
    str | None,
    typer.Option("--run-id", metavar="ID", help="Name of the run; default: from the spec."),
]
RunArgument = Annotated[str, typer.Argument(help="A run: a folder, or gs://bucket/prefix/run-id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"job {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""
    ensure_home()
    share_bundle()


@app.command()
def run(
    spec: SpecArgument,
    overrides: SetOption = None,
    output: OutputOption = None,
    run_id: RunIdOption = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard the outputs of an earlier run with this id.")
    ] = False,
) -> None:
    """Run a job, or resume it."""
    from job.pipeline.runner import run_job
    from job.spec.load import load_spec

    loaded = load_spec(spec, _with_output(overrides, output))
    run_job(loaded, run_id=run_id, until=until, fresh=fresh)


def _with_output(overrides: list[str] | None, output: str | None) -> list[str]:
    changes = list(overrides or [])
    if output is not None:
        changes.append(f"output={json.dumps(output, ensure_ascii=False)}")
    return changes


@app.command()
def validate(
    spec: SpecArgument,
    overrides: SetOption = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Also reject local files and folders."),
    ] = False,
    write: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the spec with defaults and overrides."),
    ] = None,
) -> None:
    """Check a spec; report all problems, each with its path and line."""
    from job.chat.templates import planned_template
    from job.spec.load import check_portable, load_spec, run_id, write_spec

    loaded = load_spec(spec, overrides or [])
    if portable:
        check_portable(loaded)
    if write is not None:
        write_spec(loaded.spec, write)
    model = loaded.spec.model
    template = planned_template(model.chat_template, model.preset)
    typer.echo(legible(f"{loaded.source}: valid; its run id is {run_id(loaded.spec)}"))
    typer.echo(legible(f"chat template: {template}"))


@app.command()
def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="MACHINE", help="A machine, like v5e-8 or h100-1; repeatable."),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print one line per size of the machine.")
    ] = False,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile for the TPU; needs the tpu extra, but no TPU."),
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Training examples, if the spec sets no limit."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Mean tokens per example.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the memory, time and cost of a run without starting it."""
    from job.commands.plan import plan_job
    from job.plan.text import render, render_table
    from job.spec.load import load_spec

    loaded = load_spec(spec, overrides or [])
    planned = plan_job(
        loaded, on or (), sizes=table, compiled=compile_, examples=examples, tokens=tokens
    )
    if as_json:
        typer.echo(planned.model_dump_json(indent=2))
    else:
        typer.echo(legible("\n".join(render_table(planned) if table else render(planned))))


@app.command()
def manifest(
    spec: SpecArgument,
    on: Annotated[str, typer.Option(metavar="MACHINE", help="A machine, like v5e-8 or cpu.")],
    overrides: SetOption = None,
    output: OutputOption = None,
    run_id: RunIdOption = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="The image, best with its digest.")
    ] = None,
    queue: Annotated[
        str | None, typer.Option(metavar="NAME", help="A LocalQueue of Kueue.")
    ] = None,
    namespace: Annotated[str, typer.Option(metavar="NS", help="The namespace.")] = "default",
    service_account: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Kubernetes service account that may use the bucket."),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Run on Spot nodes.")] = False,
    max_seconds: Annotated[
        int, typer.Option(min=60, metavar="S", help="Maximum run time, without the queue.")
    ] = 14_400,
) -> None:
    """Print a Kubernetes Job, or a JobSet for a slice, that runs a spec on GKE."""
    from job.commands.manifest import Cluster, kubernetes_manifest
    from job.machine.accelerators import parse_machine
    from job.spec.load import load_spec

    text = kubernetes_manifest(
        load_spec(spec, _with_output(overrides, output)),
        parse_machine(on),
        Cluster(namespace, queue, service_account),
        image=image,
        run_id=run_id,
        spot=spot,
        max_seconds=max_seconds,
    )
    typer.echo(text)


@app.command()
def accelerators(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MACHINE", help="A machine, like v5e-8; default: all."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List machines with their cloud names, quotas and list prices."""
    from job.machine.accelerators import ACCELERATORS, machine_sizes, machine_spec, parse_machine

    machines = [parse_machine(name) for name in names or ()]
    machines = machines or [size for a in ACCELERATORS for size in machine_sizes(a)]
    specs = [machine_spec(machine) for machine in machines]
    if as_json:
        typer.echo(json.dumps(specs, indent=2))
        return
    for spec in specs:
        name = spec["accelerator_type"] or spec["machine_type"] or "not in a cloud"
        hourly, on_spot = spec["usd_per_hour"], spec["spot_usd_per_hour"]
        price = "no price" if hourly is None else f"{hourly:.2f} USD/h"
        spot = "" if on_spot is None else f", spot {on_spot:.2f}"
        typer.echo(f"{spec['machine']:<10} {spec['hosts']:>3} host(s)  {name:<18} {price}{spot}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec, for editors."""
    from job.spec.schema import Spec

    typer.echo(json.dumps(Spec.model_json_schema(), indent=2))


@app.command()
def fetch(
    run_uri: RunArgument,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Target folder.")],
) -> None:
    """Download a finished run and verify every checksum."""
    from job.commands.fetch import fetch_run

    fetch_run(run_uri, folder)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Finished runs; all are compared with the first."),
    ],
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write an HTML page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare finished runs, with paired tests on the questions they share."""
    from job.commands.compare import compare_finished

    comparison = compare_finished(runs, html)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=2))
        return
    from rich.console import Console

    from job.report.compare_render import show

    show(comparison, Console(width=None if sys.stdout.isatty() else 160))


@app.command()
def generate(
    run_uri: RunArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Prompts to answer; without one, a conversation starts."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also answer with the base model.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt; default: as in training.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum tokens per answer.")
    ] = 256,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Sampling temperature; default: greedy.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, metavar="S", help="Sampling seed.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one line per answer.")
    ] = False,
) -> None:
    """Generate answers with a run's fine-tuned model, once or in a conversation."""
    from job.commands.generate import GenerateOptions, generate_answers

    chosen = GenerateOptions(max_new_tokens, base, system, temperature, seed, as_json)
    generate_answers(run_uri, chosen, prompt or [])


@app.command()
def export(
    run_uri: RunArgument,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new folder.")],
    to: Annotated[
        Literal["peft", "merged-keras", "merged-transformers"],
        typer.Option(
            help="peft: the adapter for PEFT, transformers and vLLM; merged-transformers, "
            "merged-keras: the full model with the adapter merged in.",
        ),
    ],
    rank: Annotated[
        Literal["exact", "uniform"],
        typer.Option(help="For peft: ranks that may differ by layer, or one, padded with zeros."),
    ] = "exact",
) -> None:
    """Export a run's adapter, or the model with the adapter merged in."""
    from job.commands.export import export_run

    export_run(run_uri, to, folder, rank)


def main() -> int:
    """Run a command and return its exit code; a `JobError` becomes one message on stderr."""
    try:
        app()
    except SystemExit as ended:  # how typer returns
        return int(ended.code or 0)
    except (JobError, RunStoppedError) as error:
        sys.stderr.write(f"error: {legible(Redactor(os.environ).text(str(error)))}\n")
        return error.exit_code
    return 0
