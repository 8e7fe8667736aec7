"""The dollars that requests to a paid service may cost."""

import threading

COST_MARGIN = 2.0
"""A request in flight reserves this many times the cost of the most expensive one so far."""


class Budget:
    """A spending limit for concurrent requests; thread-safe.

    The cost of a request is known only after its reply. The first request runs alone, to learn a
    cost; from then on each request in flight reserves dollars. One that does not fit waits for
    others to end, and is refused if none is in flight.
    """

    def __init__(
        self,
        max_usd: float | None,
        spent: float = 0.0,
        max_cost: float | None = None,
        key: str = "reference.max_usd",
    ) -> None:
        """Resume with the dollars spent and the cost of the most expensive request, if known.

        `key` names `max_usd` in messages.
        """
        self._key = key
        self.max_usd = max_usd
        self._spent = spent
        self._max_cost = max_cost
        self._in_flight = 0
        self._has_no_prices = False
        self.exhausted = False
        """Whether a request was refused."""
        self._changed = threading.Condition()

    def reserve(self) -> str | None:
        """Wait until a request may be sent; return the reason if it may not."""
        if self.max_usd is None:
            return None
        with self._changed:
            while not self._has_no_prices and not self._fits(self.max_usd) and self._in_flight:
                self._changed.wait()
            if self._has_no_prices:
                self.exhausted = True
                return (
                    f"the endpoint does not report the cost of requests, so {self._key} "
                    "cannot be enforced; remove it"
                )
            if not self._fits(self.max_usd):
                self.exhausted = True
                return f"the budget of {self.max_usd:g} USD is used up; raise {self._key}"
            self._in_flight += 1
            return None

    def _fits(self, max_usd: float) -> bool:
        if self._max_cost is None:
            return self._in_flight == 0 and self._spent < max_usd
        reserved = (self._in_flight + 1) * COST_MARGIN * self._max_cost
        return self._spent + reserved <= max_usd

    def settle(self, cost: float | None, *, lost: bool = False, answered: bool = False) -> None:
        """End the reservation of a request.

        Args:
            cost: in dollars; None if the reply does not report it.
            lost: the reply was lost and may have been billed: it counts as the most expensive.
            answered: the request was answered, so the reply should report a cost.
        """
        if self.max_usd is None:
            return
        with self._changed:
            self._in_flight -= 1
            if cost is not None:
                self._spent += cost
                self._max_cost = max(self._max_cost or 0.0, cost)
            elif lost:
                self._spent += self._max_cost or 0.0
            elif answered:
                self._has_no_prices = True
            self._changed.notify_all()
