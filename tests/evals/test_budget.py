"""A budget is not exceeded, whatever requests cost and however many are in flight."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.evals.budget import COST_MARGIN, Budget


def test_without_a_limit_every_request_is_sent() -> None:
    budget = Budget(None)
    assert [budget.reserve() for _ in range(100)] == [None] * 100
    budget.settle(1e9)
    assert budget.reserve() is None
    assert not budget.exhausted


def test_the_first_request_runs_alone() -> None:
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


def test_a_request_that_does_not_fit_is_refused() -> None:
    budget = Budget(0.5, spent=0.4, max_cost=0.1)
    assert budget.reserve() == "the budget of 0.5 USD is used up; raise reference.max_usd"
    assert budget.exhausted
    assert Budget(0.5, spent=0.5).reserve() is not None
    assert Budget(0.5, spent=0.3, max_cost=0.1).reserve() is None


def test_a_lost_reply_counts_as_the_most_expensive() -> None:
    budget = Budget(1.0)
    budget.reserve()
    budget.settle(0.3)
    budget.reserve()
    budget.settle(None, lost=True)
    assert budget.reserve() is not None


def test_an_endpoint_without_prices_gets_one_request() -> None:
    budget = Budget(1.0)
    budget.reserve()
    budget.settle(None, answered=True)
    reason = budget.reserve()
    assert reason is not None
    assert "does not report the cost of requests" in reason
    assert budget.exhausted


def test_a_free_model_has_no_limit() -> None:
    budget = Budget(0.01)
    for _ in range(50):
        assert budget.reserve() is None
        budget.settle(0.0, answered=True)


@given(
    st.floats(0.5, 100),
    st.lists(st.floats(0.01, 0.01 * COST_MARGIN), min_size=30, max_size=60),
    st.integers(1, 8),
)
@settings(deadline=None, max_examples=30)
def test_the_limit_holds_if_costs_vary_within_the_margin(
    hundredths: float, costs: list[float], workers: int
) -> None:
    cap = hundredths / 100
    budget = Budget(cap)
    spent, left = 0.0, iter(costs)
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
            return next(left, None)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result(10)
    assert spent <= max(cap, max(costs)) + 1e-9
    if sum(costs) + workers * COST_MARGIN * max(costs) <= cap:
        assert spent == pytest.approx(sum(costs))
