"""The oracle as a pytest fixture.

    def test_mine(oracle):
        oracle.check("attention", mine, dtypes=("bfloat16",))

Each case is a subtest of its own where pytest has them (9 and later), one failure with all of them
else. Installed, the plugin is found by itself; from a checkout, `-p
gaugeblock.reference.pytest_plugin`.
"""

from __future__ import annotations

import pytest


class Oracle:
    """`check` with its results as test results."""

    def __init__(self, subtests=None):
        self.subtests = subtests

    def check(self, op, fn, **settings):
        """`gaugeblock.reference.oracle.check`; fails the test for each wrong case. The report."""
        from .oracle import check
        from .oracle.result import describe

        report = check(op, fn, **settings)
        failures = []
        for (case, dtype, layout), results in report.cases().items():
            wrong = [describe(r) for r in results if not r.passed]
            if self.subtests is None:
                failures += wrong
                continue
            with self.subtests.test(f"{case}-{dtype}-{layout}"):
                if wrong:
                    pytest.fail("\n".join(wrong), pytrace=False)
        if failures or not report.results:
            pytest.fail("\n".join(failures) or f"{report.op}: no case was checked", pytrace=False)
        return report


@pytest.fixture
def oracle(request):
    """Check a candidate against the reference: `oracle.check(op, fn, …)`."""
    try:
        return Oracle(request.getfixturevalue("subtests"))
    except pytest.FixtureLookupError:
        return Oracle()
