"""Dollars that requests to a remote model may cost together."""

import threading

MARGIN = 2.0
"""A request in flight is taken to cost this many times the most that one cost so far."""


class Budget:
    """Lets a request go only where it fits; safe to use from several threads.

    What a request costs is known afterwards. The first is sent alone, to learn what one costs;
    from then on each in flight has dollars reserved for it, and one that does not fit waits
    for others to end, or is refused where none is under way.
    """

    def __init__(self, cap: float | None, spent: float = 0.0, most: float | None = None) -> None:
        """Args: spent: so far; most: what the dearest request cost, None where none is known."""
        self.cap = cap
        self._spent = spent
        self._most = most
        self._in_flight = 0
        self._unpriced = False
        self.refused = False
        """Whether a request was refused."""
        self._changed = threading.Condition()

    def reserve(self) -> str | None:
        """Wait until a request may be sent; the reason where it may not."""
        if self.cap is None:
            return None
        with self._changed:
            while not self._unpriced and not self._fits() and self._in_flight:
                self._changed.wait()
            if self._unpriced or not self._fits():
                self.refused = True
            if self._unpriced:
                return (
                    "the endpoint does not say what a request cost, so reference.max_usd cannot "
                    "be kept; remove it"
                )
            if not self._fits():
                return f"the budget of {self.cap:g} USD is used up; raise reference.max_usd"
            self._in_flight += 1
            return None

    def _fits(self) -> bool:
        assert self.cap is not None
        if self._most is None:
            return self._in_flight == 0 and self._spent < self.cap
        reserved = (self._in_flight + 1) * MARGIN * self._most
        return self._spent + reserved <= self.cap

    def settle(self, cost: float | None, *, lost: bool = False, answered: bool = False) -> None:
        """A request that was let go has ended.

        Args:
            cost: in dollars; None where the reply does not say.
            lost: its reply was lost, so it may have been billed: it counts as the dearest.
            answered: it was answered, so that a price was to be expected.
        """
        if self.cap is None:
            return
        with self._changed:
            self._in_flight -= 1
            if cost is not None:
                self._spent += cost
                self._most = max(self._most or 0.0, cost)
            elif lost:
                self._spent += self._most or 0.0
            elif answered:
                self._unpriced = True
            self._changed.notify_all()
