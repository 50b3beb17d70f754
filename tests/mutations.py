"""How long the tests that try mutations go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings

MINUTES = float(os.environ.get("MUTATION_MINUTES", "0.5"))


def many(test: Callable[[], None], number: int | None) -> None:
    """A test of hypothesis's with so many examples, always the same; or for MINUTES with others each time."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    test = settings(max_examples=number or 500, derandomize=number is not None, **options)(test)
    until = time.monotonic() + (60 * MINUTES if number is None else 0)
    test()
    while time.monotonic() < until:
        test()
