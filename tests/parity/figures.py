"""The worst figures of the parity tests, told in a table at the end of a run.

Tests run in several processes: each hands what it kept to the one that prints.
"""

import pytest

from jaxtc.tap.sites import SITES

# By row of the table, then by figure: the value, and where it was.
FIGURES: dict[str, dict[str, tuple[float, str]]] = {}


def note(figure: str, row: str, value: float, where: str) -> float:
    """Keep ``value`` for the closing table if it is the worst so far, and give it back."""
    worst = FIGURES.setdefault(row, {})
    if figure not in worst or not value <= worst[figure][0]:
        worst[figure] = (float(value), where)
    return value


def pytest_sessionfinish(session):
    """In a process that was given a part of the tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """In the one that gave it."""
    for row, worst in getattr(node, "workeroutput", {}).get("figures", {}).items():
        for figure, (value, where) in worst.items():
            note(figure, row, value, where)


def pytest_terminal_summary(terminalreporter):
    """The worst figure of each site, over oracles, cases and layers."""
    if not FIGURES:
        return
    names = [site.name for site in SITES]
    width = max(map(len, FIGURES)) + 1
    rows = sorted(FIGURES, key=lambda row: (names.index(row) if row in names else len(names), row))
    terminalreporter.section("parity with PyTorch: worst figures")
    terminalreporter.write_line(
        f"{'':<{width}} {'rel L2, float32':>15}  {'where':<28} {'bf16 error / HF':>15}  where"
    )
    for row in rows:
        parts = [f"{row:<{width}}"]
        for figure, form in (("float32", ".1e"), ("bfloat16", ".3f")):
            value, where = FIGURES[row].get(figure, (None, ""))
            shown = "" if value is None else format(value, form)
            parts.append(f"{shown:>15}  {where:<28}")
        terminalreporter.write_line(" ".join(parts).rstrip())
