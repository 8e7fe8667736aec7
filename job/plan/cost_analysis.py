"""Memory, costs and roofline time of one program, from the TPU compiler.

Figures are the compiler's (`memory_analysis`, `cost_analysis`), per device. Its bytes count every
operand of every operation, on-chip memory included, so roofline times bound by memory are too high
rather than too low. It counts the body of a loop once: callers add the other iterations.
"""

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
    """FLOPs and bytes of a program, per device."""

    flops: float
    bytes_accessed: float
    collective_bytes: float = 0.0

    def plus(self, other: "Costs", times: float = 1.0) -> "Costs":
        """Return these costs plus `times` the others."""
        return Costs(
            self.flops + times * other.flops,
            self.bytes_accessed + times * other.bytes_accessed,
            self.collective_bytes + times * other.collective_bytes,
        )

    def bounds(self, chip: Accelerator) -> dict[str, float]:
        """Return the least seconds for arithmetic, memory and links (the roofline)."""
        assert chip.peak_flops
        assert chip.hbm_bandwidth
        assert chip.interconnect_bandwidth
        return {
            "arithmetic": self.flops / chip.peak_flops,
            "memory": self.bytes_accessed / chip.hbm_bandwidth,
            "links": self.collective_bytes / chip.interconnect_bandwidth,
        }


@dataclass(frozen=True)
class CompiledProgram:
    """One program, compiled or rejected because it does not fit in memory."""

    fits: bool
    memory: int
    """Bytes of arguments, outputs and temporaries; 0 if a rejection does not tell."""
    temporary: int
    costs: Costs
    seconds: float
    """Wall time of compilation, without tracing."""
    cpu_seconds: float
    """CPU time of compilation, which does not depend on other processes."""
    collectives: dict[str, int] = field(default_factory=dict)


def compile_program(function: Callable[..., Any], *arguments: Any) -> CompiledProgram:
    """Trace and compile a jitted function for abstract arguments."""
    lowered = function.lower(*arguments)  # type: ignore[attr-defined]
    begin, used = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        clocks = time.perf_counter() - begin, time.process_time() - used
        return CompiledProgram(False, needed_bytes(str(error)), 0, Costs(0, 0), *clocks)
    clocks = time.perf_counter() - begin, time.process_time() - used
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    kinds, moved = collectives(compiled.as_text())
    return CompiledProgram(
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
    )


def needed_bytes(message: str) -> int:
    """Return the bytes a rejected program needs, from the compiler's message; 0 if not given."""
    sizes = [float(number) * _UNITS[unit] for number, unit in _NEEDED.findall(message)]
    return int(max(sizes, default=0))


def collectives(text: str) -> tuple[dict[str, int], float]:
    """Return the number of collectives in a program's text by kind, and the bytes a device sends.

    Over n devices a ring sends 2 (n-1)/n of the bytes it all-reduces and (n-1)/n of those it
    gathers or scatters (Thakur et al. 2005); n is large enough here to count 2 and 1.
    """
    kinds: Counter[str] = Counter()
    moved = 0.0
    for match in filter(None, map(_COLLECTIVE.search, text.splitlines())):
        kind = match["kind"]
        kinds[kind] += 1
        arrays = [_bytes(*array) for array in _ARRAY.findall(match["shape"])]
        # A `-start` operation lists its operands too; the results are the larger ones.
        size = max(arrays, default=0) if match["start"] else sum(arrays)
        moved += (2 if kind == "all-reduce" else 1) * size
    return dict(kinds), moved


def _bytes(dtype: str, shape: str) -> int:
    return _SIZES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)


def combine(
    programs: Sequence[tuple[CompiledProgram, int]], resident: int, limit: int
) -> CompiledProgram:
    """Return programs that run one after the other as one program.

    Args:
        programs: programs with the number of times each runs.
        resident: bytes on a device besides the temporaries of the running program.
        limit: bytes of memory of a device.
    """
    costs, kinds = Costs(0, 0), Counter[str]()
    for program, times in programs:
        costs = costs.plus(program.costs, times)
        kinds.update({kind: times * count for kind, count in program.collectives.items()})
    temporary = max(program.temporary for program, _ in programs)
    memory = max(resident + temporary, *(program.memory for program, _ in programs))
    fits = memory <= limit and all(program.fits for program, _ in programs)
    return CompiledProgram(
        fits=fits,
        memory=memory,
        temporary=temporary,
        costs=costs if fits else Costs(0, 0),
        seconds=sum(program.seconds for program, _ in programs),
        cpu_seconds=sum(program.cpu_seconds for program, _ in programs),
        collectives=dict(kinds),
    )
