"""All paired tests of one page as one family: p-values corrected, findings by the corrected ones.

Ten tests at 5 % find something four times in ten where there is nothing. Every `PairedTest`
in a record takes part, wherever in it it stands.
"""

from collections.abc import Callable
from typing import Any

from job.evals.stats import ALPHA, holm
from job.results import PairedTest, Record

Change = Callable[[PairedTest], PairedTest]


def paired_tests(record: Record) -> list[PairedTest]:
    """The tests in a record, in the order of its fields."""
    found: list[PairedTest] = []

    def note(test: PairedTest) -> PairedTest:
        found.append(test)
        return test

    _replaced(record, note)
    return found


def corrected[R: Record](record: R) -> R:
    """The same record with `p_holm` and `finding` of each test in it set for all of them."""
    values = iter(holm([test.p_value for test in paired_tests(record)]))

    def correct(test: PairedTest) -> PairedTest:
        p_holm = next(values)
        # A correction takes findings away and makes none.
        finding = test.finding if p_holm < ALPHA else "no measurable change"
        return test.model_copy(update={"p_holm": p_holm, "finding": finding})

    changed: R = _replaced(record, correct)
    return changed


def _replaced(value: Any, change: Change) -> Any:
    if isinstance(value, PairedTest):
        return change(value)
    if isinstance(value, Record):
        names = type(value).model_fields
        return value.model_copy(
            update={name: _replaced(getattr(value, name), change) for name in names}
        )
    if isinstance(value, dict):
        return {key: _replaced(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, change) for item in value]
    return value
