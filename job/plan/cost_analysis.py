"""One program through the TPU compiler: does it fit, what does it cost, how fast can it be.

The figures are the compiler's own (`memory_analysis`, `cost_analysis`), a device's. Its bytes
count every operand of every operation, on-chip memory included, so that the seconds of the
roofline are rather too many where a program is bound by them. It counts the body of a loop once:
callers add what loops do beyond that.
"""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from job.machine.accelerators import Accelerator

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


_COLLECTIVE = re.compile(
    r" = (?P<shape>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)


_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


_NEEDED = re.compile(r"(?:Used|required[^(]*\()\s*([\d.]+)([KMG])")


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Costs:
    """What a program does, on each device."""

    flops: float
    bytes_accessed: float
    collective_bytes: float = 0.0

    def plus(self, other: "Costs", times: float = 1.0) -> "Costs":
        """These and `times` the others; negative times take them away."""
        return Costs(
            max(0.0, self.flops + times * other.flops),
            max(0.0, self.bytes_accessed + times * other.bytes_accessed),
            max(0.0, self.collective_bytes + times * other.collective_bytes),
        )

    def bounds(self, chip: Accelerator) -> dict[str, float]:
        """Seconds that arithmetic, memory and links need at least."""
        assert chip.peak_flops
        assert chip.hbm_bandwidth
        assert chip.interconnect_bandwidth
        return {
            "arithmetic": self.flops / chip.peak_flops,
            "memory": self.bytes_accessed / chip.hbm_bandwidth,
            "links": self.collective_bytes / chip.interconnect_bandwidth,
        }


@dataclass(frozen=True)
class Compiled:
    """One program, compiled or refused for want of memory."""

    fits: bool
    memory: int
    """Bytes of arguments, results and temporaries; 0 where a refusal does not say."""
    temporary: int
    costs: Costs
    seconds: float
    """Of the compiler; tracing is not in them."""
    cpu_seconds: float
    """The same in seconds of a processor core, which other processes do not lengthen."""
    collectives: dict[str, int] = field(default_factory=dict)
    text: str = field(default="", repr=False)
    """The optimized program."""


def compile_program(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Trace and compile a jitted function for arguments that are shapes."""
    lowered = function.lower(*arguments)  # type: ignore[attr-defined]
    begin, used = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        clocks = time.perf_counter() - begin, time.process_time() - used
        return Compiled(False, needed_bytes(str(error)), 0, Costs(0, 0), *clocks)
    clocks = time.perf_counter() - begin, time.process_time() - used
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    kinds, moved = collectives(text)
    return Compiled(
        fits=True,
        memory=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        costs=Costs(analysis["flops"], analysis["bytes accessed"], moved),
        seconds=clocks[0],
        cpu_seconds=clocks[1],
        collectives=kinds,
        text=text,
    )


def needed_bytes(message: str) -> int:
    """The memory that the compiler says a refused program needs; 0 where it does not."""
    sizes = [float(number) * _UNITS[unit] for number, unit in _NEEDED.findall(message)]
    return int(max(sizes, default=0))


def collectives(text: str) -> tuple[dict[str, int], float]:
    """Operations between devices in a program's text, and the bytes that a device sends.

    Over n devices a ring sends 2 (n-1)/n of what it sums and (n-1)/n of what it gathers or
    scatters (Thakur et al. 2005); n is large enough here to count 2 and 1.
    """
    kinds: Counter[str] = Counter()
    moved = 0.0
    for match in filter(None, map(_COLLECTIVE.search, text.splitlines())):
        kind = match["kind"]
        kinds[kind] += 1
        arrays = [_bytes(*array) for array in _ARRAY.findall(match["shape"])]
        # What starts an operation names its operands too; the larger half are the results.
        size = max(arrays, default=0) if match["start"] else sum(arrays)
        moved += (2 if kind == "all-reduce" else 1) * size
    return dict(kinds), moved


def _bytes(dtype: str, shape: str) -> int:
    return _SIZES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)


def joined(programs: Sequence[tuple[Compiled, int]], kept: int, limit: int) -> Compiled:
    """Programs that run one after the other as one.

    Args:
        programs: each with how often it runs.
        kept: bytes that lie on a device besides what a program works with.
        limit: bytes that it has.
    """
    costs, kinds = Costs(0, 0), Counter[str]()
    for program, times in programs:
        costs = costs.plus(program.costs, times)
        kinds.update({kind: times * count for kind, count in program.collectives.items()})
    working = max(program.temporary for program, _ in programs)
    refused = [program for program, _ in programs if not program.fits]
    memory = max(kept + working, *(program.memory for program, _ in programs))
    fits = not refused and memory <= limit
    return Compiled(
        fits=fits,
        memory=memory,
        temporary=working,
        costs=costs if fits else Costs(0, 0),
        seconds=sum(program.seconds for program, _ in programs),
        cpu_seconds=sum(program.cpu_seconds for program, _ in programs),
        collectives=dict(kinds),
        text="\n".join(program.text for program, _ in programs),
    )


def with_costs(program: Compiled, costs: Costs) -> Compiled:
    """The program with what its loops do counted in full."""
    return dataclasses.replace(program, costs=costs)
