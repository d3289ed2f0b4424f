"""The properties' counts, and nothing to collect where hypothesis is missing (on a GPU machine)."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("hypothesis") else ["test_*.py"]
COUNT = "examples"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    if call.when == "call" and getattr(item.function, "is_hypothesis_test", False):  # type: ignore[attr-defined]
        from tests.support.fuzzing.profile import ran

        item.user_properties.append((COUNT, ran[item.name.partition("[")[0]]))
    return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {
        report.nodeid.partition("::")[2]: dict(report.user_properties)[COUNT]
        for reports in terminalreporter.stats.values()
        for report in reports
        if any(name == COUNT for name, _ in getattr(report, "user_properties", ()))
    }
    if not counts:
        return
    terminalreporter.section("examples of each property")
    for name, count in counts.items():
        terminalreporter.line(f"{count:6} {name}")
    terminalreporter.line(f"{sum(counts.values()):6} together")
