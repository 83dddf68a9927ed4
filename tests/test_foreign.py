"""The list of reasons for what other libraries' test suites give (`make test-foreign`) stays true."""

from pathlib import Path

import pytest
from foreign.bookkeeping import (
    Reason,
    Result,
    counts,
    doors_table,
    judge,
    read_reasons,
    read_results,
    reasons_table,
)

PASSED = Result("TestNano", "test_a[LoRA-nano]", "passed")
FAILED = Result("TestNano", "test_b[LoRA-nano]", "failed", "AssertionError: no")
SKIPPED = Result("TestNano", "test_c", "skipped", "needs a GPU")
RESULTS = [PASSED, FAILED, SKIPPED]


def reason(outcome: str, *patterns: str) -> Reason:
    return Reason(outcome, [*patterns], "not applicable", "There is none.")


@pytest.fixture
def fitting():
    return [reason("failed", "TestNano::test_b[LoRA*"), reason("skipped", "needs a *")]


def test_a_reason_for_each_is_enough(fitting):
    assert judge(RESULTS, fitting) == []
    assert [each.results for each in fitting] == [[FAILED], [SKIPPED]]


def test_what_has_no_reason(fitting):
    (fault,) = judge(RESULTS, fitting[1:])
    assert "TestNano::test_b[LoRA-nano] failed" in fault and "AssertionError: no" in fault
    (fault,) = judge(RESULTS, fitting[:1])
    assert "TestNano::test_c skipped" in fault


def test_a_listed_test_that_passes(fitting):
    faults = judge(RESULTS, [reason("failed", "TestNano::test_*[LoRA-nano]"), fitting[1]])
    assert len(faults) == 1 and "test_a[LoRA-nano] passes" in faults[0]


@pytest.mark.parametrize("more", [reason("failed", "*::test_c"), reason("skipped", "*::test_c")])
def test_a_pattern_that_nothing_fits(fitting, more):
    (fault,) = judge(RESULTS, [*fitting, more])
    assert "'*::test_c'" in fault


def test_a_class_name_and_brackets_are_plain_text():
    assert not reason("failed", "TestNano::test_b.LoRA-nano.").fits(FAILED)
    assert reason("failed", "TestNano::test_b[LoRA-nano]").fits(FAILED)


def test_results_of_pytest(tmp_path):
    """The file that the runner reads, as pytest writes it."""
    junit = tmp_path / "junit.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.foreign.suite.TestNano" name="test_a[LoRA-nano]"/>'
        '<testcase classname="tests.foreign.suite.TestNano" name="test_b[LoRA-nano]">'
        '<failure message="AssertionError: no">trace</failure></testcase>'
        '<testcase classname="tests.foreign.suite.TestNano" name="test_c">'
        '<skipped type="pytest.skip" message="needs a GPU">where</skipped></testcase>'
        "</testsuite></testsuites>"
    )
    assert read_results(junit) == RESULTS
    assert counts(RESULTS, "TestNano") == {"collected": 3, "passed": 1, "failed": 1, "skipped": 1}


def test_what_a_door_recorded(tmp_path):
    """The last property of a name counts: a door records its worst numbers after each comparison."""
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.foreign.doors_suite" name="test_x"><properties>'
        '<property name="door" value="`x`: a.md"/><property name="installed" value="x 1.0"/>'
        '<property name="worst" value="[]"/><property name="worst" value="[{&quot;note&quot;: &quot;&quot;, '
        "&quot;allowed&quot;: 1e-4, &quot;worst&quot;: 2.34e-6}, {&quot;note&quot;: &quot;half&quot;, "
        '&quot;allowed&quot;: 0.05, &quot;worst&quot;: 0.01}]"/>'
        '</properties></testcase><testcase classname="tests.foreign.doors_suite" name="test_y"/>'
        "</testsuite></testsuites>"
    )
    first, second = doors_table(read_results(junit))[2:]
    assert first == "| `x`: a.md | x 1.0 | 2.3e-06 (0.0001), half 1.0e-02 (0.05) | passed |"
    assert second == "| test_y | - | - | passed |"


def test_a_table_of_reasons(fitting):
    judge(RESULTS, fitting)
    assert reasons_table(fitting, "failed")[2:] == ["| 1 | `test_b` | There is none. | not applicable |"]
    assert reasons_table([], "failed") == ["None."]


@pytest.mark.parametrize("library", ["transformers", "peft", "doors"])
def test_the_listed_reasons_are_whole(library):
    listed = read_reasons(Path(__file__).parent / "foreign" / "reasons.yaml", library)
    assert bool(listed) == (library != "doors")  # no door may fail, nor be left out
    for each in listed:
        assert each.patterns and each.whose and each.reason.endswith("."), each
        assert (each.outcome, each.whose) != ("failed", "ours"), "mend it, or say in docs/faults.md why it stays"
