"""A plan as text for people."""

from collections.abc import Iterator, Sequence

from job.plan.plan import MachinePlan, Plan, Program

_GB = 1e9


def render(plan: Plan) -> str:
    """The whole plan, in the order of the questions one has."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    model, work = plan.model, plan.work
    yield f"{plan.spec}: the run {plan.run}"
    to_do = [stage.name for stage in plan.stages if not stage.skipped]
    done = [stage.name for stage in plan.stages if stage.skipped]
    yield f"  stages      {' -> '.join(to_do) or 'none'}" + (
        f"; skipped: {', '.join(done)}" if done else ""
    )
    share = model.trainable / model.parameters
    yield (
        f"  model       {model.preset}: {model.parameters:,} parameters in {model.dtype}, "
        f"{model.trainable:,} trained ({share:.2%})"
    )
    yield (
        f"  training    {work.examples:,} examples, {work.tokens:,} tokens in {work.rows:,} rows "
        f"of {work.row_length:,}; {work.steps:,} steps of {work.slots_a_step:,} slots"
    )
    asked = ", ".join(f"{name} {count:,}" for name, count in work.evaluations.items())
    yield f"  prompts     {asked or 'none'}; before and after training"
    for assumption in work.assumptions:
        yield f"  assumed     {assumption}"
    for found in plan.machines:
        yield ""
        yield from _machine(found, plan.mfu)


def _machine(found: MachinePlan, mfu: float) -> Iterator[str]:
    order = " ".join(
        part for part in (found.accelerator_type, found.runtime_version, found.machine_type) if part
    )
    hosts = f"{found.hosts} host{'s' if found.hosts > 1 else ''}"
    yield f"{found.machine}: {found.chips} chip{'s' if found.chips > 1 else ''} on {hosts}" + (
        f" ({order})" if order else ""
    )
    if found.quota:
        yield f"  quota       {found.quota}; spot {found.spot_quota}"
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    again = found.rows_a_device // found.micro_batch
    yield (
        f"  mesh        {mesh}; {found.rows_a_device} rows a step on each"
        + (f", {found.micro_batch} at once, {again} times" if again > 1 else "")
    )
    memory = found.memory
    parts = ("weights", "adapter", "optimizer", "activations", "logits")
    split = ", ".join(f"{part} {getattr(memory, part) / _GB:.2f}" for part in parts)
    limit = "" if memory.limit is None else f" of {memory.limit / _GB:.1f}"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown limit"}[memory.fits]
    yield f"  memory      {memory.total / _GB:.2f}{limit} GB a device, {verdict}: {split}"
    for way in found.advice:
        yield f"  change      {way}"
    yield f"  FLOPs       {found.flops_a_step:.3g} a step over all devices"
    if found.step_seconds is None or found.stage_seconds is None or found.seconds is None:
        yield "  time        unknown: the speed of this machine is not in the registry"
    else:
        each = ", ".join(f"{name} {_time(s)}" for name, s in found.stage_seconds.items())
        yield (
            f"  time        {_time(found.seconds)} at {mfu:.0%} of the peak: {each}; a step "
            f"{found.step_seconds * 1e3:.0f} ms, {found.tokens_per_second:,.0f} tokens/s"
        )
        yield "              without starting the machine, reading data, loading and compiling"
    if found.cost is not None:
        yield (
            f"  cost        {_usd(found.cost.on_demand)} on demand, {_usd(found.cost.spot)} spot "
            f"(list prices of {found.cost.prices_of})"
        )
    if found.programs:
        yield from _programs(found.programs)


def _programs(programs: Sequence[Program]) -> Iterator[str]:
    yield ""
    yield "  compiled for the chip (a device's figures; seconds by the roofline):"
    columns = (
        "program", "memory GB", "FLOPs", "bytes", "between", "ms", "bound by", "compile s", "",
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
    yield from table(columns, rows, indent=4)


def render_table(plan: Plan) -> str:
    """The machines of a plan as one table."""
    columns = (
        "machine", "chips", "data x model", "rows", "at once", "GB", "fits", "step ms", "time",
        "on demand", "spot", "change",
    )  # fmt: skip
    rows = [
        (
            found.machine,
            str(found.chips),
            f"{found.mesh['data']} x {found.mesh['model']}",
            str(found.rows_a_device),
            str(found.micro_batch),
            f"{found.memory.total / _GB:.1f}",
            {True: "yes", False: "NO", None: "?"}[found.memory.fits],
            "?" if found.step_seconds is None else f"{found.step_seconds * 1e3:.0f}",
            "?" if found.seconds is None else _time(found.seconds),
            _usd(found.cost.on_demand if found.cost else None),
            _usd(found.cost.spot if found.cost else None),
            "; ".join(found.advice),
        )
        for found in plan.machines
    ]
    return "\n".join(table(columns, rows))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], indent: int = 0) -> Iterator[str]:
    """Lines of a table with aligned columns."""
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
