"""A damaged spec is refused in plain words, or read as what it says.

`FUZZ_CASES` sets how many damages of each shipped spec are tried.
"""

import os
import random
from collections import Counter
from importlib import resources

import pytest

from job.errors import SpecError
from job.spec.load import parse_spec, spec_text
from tests.damage import damage

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", "60"))
SPECS = sorted(
    path.name for path in (resources.files("job") / "specs").iterdir() if path.name.endswith("yaml")
)


@pytest.mark.parametrize("name", SPECS)
def test_a_damaged_spec_is_refused_or_read(name: str) -> None:
    text = (resources.files("job") / "specs" / name).read_bytes()
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        chance = random.Random(case)
        _, damaged = damage(text, chance)
        if chance.random() < 0.5:  # damage that leaves valid YAML more often
            lines = text.decode().splitlines(keepends=True)
            at = chance.randrange(len(lines))
            lines[at : at + 1] = chance.choice([
                [],
                [lines[at]] * 2,
                ["  " + lines[at]],
                [chance.choice(lines)],
            ])  # fmt: skip
            damaged = "".join(lines).encode()
        if damaged is None:
            continue
        try:
            spec = parse_spec(damaged.decode("utf-8", "replace"), name)
        except SpecError as error:
            assert error.problems
            assert all(str(problem).startswith(name) for problem in error.problems), case
            assert "pydantic" not in str(error)
            outcomes["refused"] += 1
            continue
        assert parse_spec(spec_text(spec), "again") == spec, case
        outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] / 10 > 0, outcomes
