"""A budget is not passed, whatever requests cost and however many are under way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.evals.api_client import MARGIN, Budget


def test_without_a_cap_everything_goes() -> None:
    budget = Budget(None)
    assert [budget.reserve() for _ in range(100)] == [None] * 100
    budget.settle(1e9)
    assert budget.reserve() is None
    assert not budget.refused


def test_the_first_request_goes_alone_to_learn_its_cost() -> None:
    budget = Budget(1.0)
    assert budget.reserve() is None
    entered = threading.Event()

    def second() -> str | None:
        entered.set()
        return budget.reserve()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        assert entered.wait(5)
        time.sleep(0.05)
        assert not waiting.done()
        budget.settle(0.1)
        assert waiting.result(5) is None


def test_what_does_not_fit_is_refused_and_says_the_way_out() -> None:
    budget = Budget(0.5, spent=0.4, most=0.1)
    assert budget.reserve() == "the budget of 0.5 USD is used up; raise reference.max_usd"
    assert budget.refused
    assert Budget(0.5, spent=0.5).reserve() is not None
    assert Budget(0.5, spent=0.3, most=0.1).reserve() is None


def test_a_lost_reply_counts_as_the_dearest() -> None:
    budget = Budget(1.0)
    budget.reserve()
    budget.settle(0.3)
    budget.reserve()
    budget.settle(None, lost=True)
    assert budget.reserve() is not None


def test_an_endpoint_that_names_no_price_is_asked_once() -> None:
    budget = Budget(1.0)
    budget.reserve()
    budget.settle(None, answered=True)
    reason = budget.reserve()
    assert reason is not None
    assert "does not say what a request cost" in reason
    assert budget.refused


def test_a_free_model_is_asked_everything() -> None:
    budget = Budget(0.01)
    for _ in range(50):
        assert budget.reserve() is None
        budget.settle(0.0, answered=True)


@given(
    st.floats(0.5, 100),
    st.lists(st.floats(0.01, 0.01 * MARGIN), min_size=30, max_size=60),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=30)
def test_the_cap_is_not_passed_where_no_request_costs_over_twice_the_dearest_before(
    hundredths: float, costs: list[float], workers: int
) -> None:
    cap = hundredths / 100
    budget = Budget(cap)
    spent, most_left = 0.0, iter(costs)
    lock = threading.Lock()

    def work() -> None:
        nonlocal spent
        while (cost := next_cost()) is not None:
            if budget.reserve() is not None:
                return
            with lock:
                spent += cost
            budget.settle(cost)

    def next_cost() -> float | None:
        with lock:
            return next(most_left, None)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result(10)
    first_alone = max(costs)
    assert spent <= max(cap, first_alone) + 1e-9
    if sum(costs) + workers * MARGIN * max(costs) <= cap:
        assert spent == pytest.approx(sum(costs))
