"""The commands of `job`, and nothing else: arguments in, exit code out.

Heavy imports (keras, jax, datasets) happen inside the command that needs them, so that
`--help`, `validate` and `schema` answer at once.
"""

import json
import os
import sys
from typing import Annotated, NoReturn

import typer

from job import __version__
from job.errors import EXIT_RESUMABLE, JobError, RunStoppedError
from job.runtime.logs import Redactor
from job.runtime.signals import exit_now

app = typer.Typer(
    name="job",
    help="Fine-tune a language model from one YAML spec, and measure what that changed.",
    epilog="Exit codes: 0 done, 2 wrong spec or arguments, 3 wrong machine, 4 a stage failed, "
    "75 stopped early (run the same command to go on).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SpecArgument = Annotated[
    str,
    typer.Argument(
        envvar="JOB_SPEC",
        help="A path, a gs:// URI, or the name of a shipped spec, like smoke; in the variable it "
        "may be the YAML itself.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the spec; repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"job {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def run(
    spec: SpecArgument,
    overrides: SetOption = None,
    output: Annotated[
        str | None, typer.Option(metavar="URI", help="Folder or gs:// prefix of the runs.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the run; default: by the spec.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what an earlier run with this id left.")
    ] = False,
) -> None:
    """Run the job, or go on with it where it stopped."""
    from job.pipeline.runner import run_job
    from job.spec.load import load_spec

    changes = list(overrides or [])
    if output is not None:
        changes.append(f"output={json.dumps(output, ensure_ascii=False)}")
    run_job(load_spec(spec, changes), run_id=run_id, until=until, fresh=fresh)


@app.command()
def validate(
    spec: SpecArgument,
    overrides: SetOption = None,
    portable: Annotated[
        bool,
        typer.Option("--portable", help="Refuse what only this machine has, like its files."),
    ] = False,
    write: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the spec with all that was set.")
    ] = None,
) -> None:
    """Check a spec and report all problems at once, each with its path and line."""
    from job.spec.load import check_portable, load_spec, run_id, write_spec

    loaded = load_spec(spec, overrides or [])
    if portable:
        check_portable(loaded)
    if write is not None:
        write_spec(loaded.spec, write)
    typer.echo(f"{loaded.source}: valid; its run id is {run_id(loaded.spec)}")


@app.command()
def plan(
    spec: SpecArgument,
    overrides: SetOption = None,
    on: Annotated[
        list[str] | None,
        typer.Option(metavar="MACHINE", help="Such as v5e-8 or h100-1; repeatable."),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="One line for each size of the machine.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Ask the TPU's compiler; needs the tpu extra.")
    ] = False,
    examples: Annotated[
        int | None, typer.Option(metavar="N", help="Training examples, where the spec takes all.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Mean tokens of an example.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the peak that is assumed.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a run would do, need and cost, without starting it."""
    from job.commands.plan import PlanOptions, plan_job
    from job.plan.text import render, render_table
    from job.spec.load import load_spec

    asked = PlanOptions(tuple(on or ()), table, compile_, examples, tokens, mfu)
    found = plan_job(load_spec(spec, overrides or []), asked)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        typer.echo(render_table(found) if table else render(found))


@app.command()
def accelerators(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="MACHINE", help="Such as v5e-8; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how machines are ordered: cloud names, quotas, list prices."""
    from dataclasses import asdict

    from job.machine.accelerators import ACCELERATORS, machine_order, machine_sizes, parse_machine

    wanted = [parse_machine(name) for name in names or ()]
    found = [
        machine_order(one)
        for one in wanted or [size for a in ACCELERATORS for size in machine_sizes(a)]
    ]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    for one in found:
        ordered = one.accelerator_type or one.machine_type or "not of a cloud"
        price = "no price" if one.usd_per_hour is None else f"{one.usd_per_hour:.2f} USD/h"
        spot = "" if one.spot_usd_per_hour is None else f", spot {one.spot_usd_per_hour:.2f}"
        typer.echo(f"{one.machine:<10} {one.hosts:>3} host(s)  {ordered:<18} {price}{spot}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec, for editors."""
    from job.spec.schema import Spec

    typer.echo(json.dumps(Spec.model_json_schema(), indent=2))


@app.command()
def fetch(
    run_uri: Annotated[str, typer.Argument(help="A run: a folder, or gs://bucket/prefix/run-id.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to put it.")],
) -> None:
    """Download a finished run and check every checksum."""
    from job.commands.fetch import fetch_run

    fetch_run(run_uri, folder)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Finished runs; the first is compared with."),
    ],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put finished runs side by side, with paired tests on the questions that match."""
    from job.commands.compare import compare_finished

    found = compare_finished(runs, html)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    from rich.console import Console

    from job.report.compare_text import show

    show(found, Console(width=None if sys.stdout.isatty() else 160))


@app.command()
def generate(
    run_uri: Annotated[str, typer.Argument(help="A run: a folder, or gs://bucket/prefix/run-id.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to say; without it, a conversation.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file that holds it; - is standard input.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Let the model without the adapter answer too.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instruction; default: as in training.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Limit of an answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Draw the answer; without it, greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Of the likeliest tokens with this share.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Of so many of the likeliest tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Of what is drawn.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line an answer.")] = False,
) -> None:
    """Let a run's tuned model answer, once or in a conversation."""
    from job.commands.generate import GenerateOptions, generate_answers

    wanted = GenerateOptions(max_new_tokens, base, system, temperature, top_p, top_k, seed, as_json)
    generate_answers(run_uri, wanted, prompt, prompt_file)


@app.command()
def export(
    run_uri: Annotated[str, typer.Argument(help="A run: a folder, or gs://bucket/prefix/run-id.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A new folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="peft: the adapter for transformers, PEFT and vLLM; merged-transformers, "
            "merged-keras: the whole model with the adapter merged in.",
        ),
    ],
    rank: Annotated[
        str,
        typer.Option(
            metavar="RANK",
            help="Of peft. exact: layers may differ in rank; uniform: one rank, filled up with "
            "zeros; a number: the nearest adapter of that rank, with the error printed.",
        ),
    ] = "exact",
) -> None:
    """Write a run's adapter, or its merged model, for where it is to be used."""
    from job.commands.export import export_run

    export_run(run_uri, to, folder, rank)


def main() -> NoReturn:
    """Run a command: errors of users become one message and their exit code."""
    try:
        sys.exit(app())
    except JobError as error:
        message, code = str(error), error.exit_code
    except RunStoppedError as stopped:
        message, code = str(stopped), EXIT_RESUMABLE
    sys.stderr.write(f"error: {Redactor(os.environ).text(message)}\n")
    _end(code)


def _end(code: int) -> NoReturn:
    """End with an error, without waiting for other processes or for the compiler to end."""
    processes, ahead = (
        sys.modules.get(f"job.{name}")
        for name in ("machine.distributed", "pipeline.background_compile")
    )
    busy = ahead is not None and ahead.is_compiling()
    if processes is not None and (busy or processes.is_joined()):
        exit_now(code)
    sys.exit(code)
