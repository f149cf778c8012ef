"""What results must reach, said line by line: for demo_bars.py, language_model_page.py and tables_page.py."""

from collections.abc import Iterable


def report(checks: Iterable[tuple[str, bool]]) -> int:
    """Print each bar and whether it is met; the number of those that are not."""
    missed = 0
    for what, good in checks:
        print("met   " if good else "MISSED", what)
        missed += not good
    return missed
