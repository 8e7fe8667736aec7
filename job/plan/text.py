"""A plan as text."""

from collections.abc import Iterator, Sequence

from job.plan.estimate import MFU
from job.plan.plan import MachinePlan, Plan, Program

_GB = 1e9


def render(plan: Plan) -> Iterator[str]:
    """Yield the lines of the complete plan."""
    model, work = plan.model, plan.work
    yield f"{plan.spec}: run {plan.run}"
    remaining = [stage.name for stage in plan.stages if not stage.skipped]
    done = [stage.name for stage in plan.stages if stage.skipped]
    yield f"  stages      {' -> '.join(remaining) or 'none'}" + (
        f"; skipped: {', '.join(done)}" if done else ""
    )
    share = model.trainable / model.parameters
    yield (
        f"  model       {model.preset}: {model.parameters:,} parameters in {model.dtype}, "
        f"{model.trainable:,} trained ({share:.2%})"
    )
    yield f"  template    {model.chat_template}"
    yield (
        f"  training    {work.examples:,} examples, {work.tokens:,} tokens in {work.rows:,} rows "
        f"of {work.row_length:,}; {work.steps:,} steps of {work.slots_a_step:,} tokens, "
        "padding included"
    )
    prompts = ", ".join(f"{each.name} {each.prompts:,}" for each in work.evaluations)
    yield f"  prompts     {prompts or 'none'}; before and after training"
    for sentence in work.evidence:
        yield f"  evidence    {sentence}"
    for assumption in work.assumptions:
        yield f"  assumed     {assumption}"
    for machine in plan.machines:
        yield ""
        yield from _machine(machine)


def _machine(machine: MachinePlan) -> Iterator[str]:
    names = (machine.accelerator_type, machine.runtime_version, machine.machine_type)
    order = " ".join(name for name in names if name)
    hosts = f"{machine.hosts} host{'s' if machine.hosts > 1 else ''}"
    yield (
        f"{machine.machine}: {machine.chips} chip{'s' if machine.chips > 1 else ''} on {hosts}"
        + (f" ({order})" if order else "")
    )
    if machine.quota:
        yield f"  quota       {machine.quota}; spot {machine.spot_quota}"
    mesh = " x ".join(f"{name} {size}" for name, size in machine.mesh.items())
    accumulation = machine.rows_a_device // machine.micro_batch
    yield (
        f"  mesh        {mesh}; per-device batch size {machine.micro_batch}, "
        f"gradient accumulation steps {accumulation}"
    )
    memory = machine.memory
    parts = ("weights", "adapter", "optimizer", "activations", "logits")
    split = ", ".join(f"{part} {getattr(memory, part) / _GB:.2f}" for part in parts)
    limit = "" if memory.limit is None else f" of {memory.limit / _GB:.1f}"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown limit"}[memory.fits]
    yield f"  memory      {memory.total / _GB:.2f}{limit} GB per device, {verdict}: {split}"
    for setting in machine.advice:
        yield f"  change      {setting}"
    yield f"  FLOPs       {machine.flops_a_step:.3g} per step over all devices"
    if machine.step_seconds is None or machine.stage_seconds is None or machine.seconds is None:
        yield "  time        unknown: the speed of this machine is not in the registry"
    else:
        stages = ", ".join(f"{name} {_time(s)}" for name, s in machine.stage_seconds.items())
        yield (
            f"  time        {_time(machine.seconds)} at {MFU:.0%} of peak FLOP/s: {stages}; "
            f"{machine.step_seconds * 1e3:.0f} ms per step, "
            f"{machine.tokens_per_second:,.0f} tokens/s"
        )
        yield "              not included: starting the machine, reading data, loading, compiling"
    if machine.cost is not None:
        yield (
            f"  cost        {_usd(machine.cost.on_demand)} on demand, {_usd(machine.cost.spot)} "
            f"spot (list prices of {machine.cost.prices_of})"
        )
    if machine.programs:
        yield from _programs(machine.programs)


def _programs(programs: Sequence[Program]) -> Iterator[str]:
    yield ""
    yield "  compiled for the chip (figures per device; roofline times):"
    columns = (
        "program", "memory GB", "FLOPs", "bytes", "collective bytes", "ms", "bound by",
        "compile s", "",
    )  # fmt: skip
    rows = [
        (
            program.name,
            f"{program.bytes / _GB:.2f}" + ("" if program.fits else " NO"),
            f"{program.flops:.3g}",
            f"{program.bytes_accessed:.3g}",
            f"{program.collective_bytes:.3g}",
            f"{program.seconds * 1e3:.1f}",
            program.bound,
            f"{program.compile_seconds:.0f}",
            ", ".join(f"{name} {value:,.4g}" for name, value in program.detail.items()),
        )
        for program in programs
    ]
    yield from _table(columns, rows, indent=4)


def render_table(plan: Plan) -> Iterator[str]:
    """Yield the lines of a table of the machines."""
    columns = (
        "machine", "chips", "data x model", "rows", "micro-batch", "GB", "fits", "step ms", "time",
        "on demand", "spot", "change",
    )  # fmt: skip
    rows = [
        (
            machine.machine,
            str(machine.chips),
            f"{machine.mesh['data']} x {machine.mesh['model']}",
            str(machine.rows_a_device),
            str(machine.micro_batch),
            f"{machine.memory.total / _GB:.1f}",
            {True: "yes", False: "NO", None: "?"}[machine.memory.fits],
            "?" if machine.step_seconds is None else f"{machine.step_seconds * 1e3:.0f}",
            "?" if machine.seconds is None else _time(machine.seconds),
            _usd(machine.cost.on_demand if machine.cost else None),
            _usd(machine.cost.spot if machine.cost else None),
            "; ".join(machine.advice),
        )
        for machine in plan.machines
    ]
    yield from _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> Iterator[str]:
    """Yield the lines of a table with aligned columns."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        yield (" " * indent + "  ".join(cells)).rstrip()


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _usd(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"${value:.2f}" if value >= 1 else f"${value:.3f}"
