"""What the suites gave, against the reasons in reasons.yaml, and the page of both."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import yaml

OUTCOMES = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Result:
    """One test: `suite` is its class, `name` its function with parameters, `message` why it failed or was skipped.

    properties: what it recorded of itself, by pytest's `record_property`; the last one of a name.
    """

    suite: str
    name: str
    outcome: str
    message: str = ""
    properties: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        return f"{self.suite}::{self.name}"


@dataclass
class Reason:
    """Why the results that match one of `patterns`, in which * stands for anything, are as they are.

    Patterns of failures are compared with "class::test", those of skips with the message. whose: as in
    reasons.yaml.
    """

    outcome: str
    patterns: list[str]
    whose: str
    reason: str
    results: list[Result] = field(default_factory=list)

    def fits(self, result: Result) -> bool:
        text = result.title if self.outcome == "failed" else result.message
        return any(re.fullmatch(as_regex(pattern), text, re.DOTALL) for pattern in self.patterns)


def as_regex(pattern: str) -> str:
    """The * of a pattern is its only special character: names of tests have brackets and dots."""
    return ".*".join(re.escape(part) for part in pattern.split("*"))


def read_reasons(file: Path, library: str) -> list[Reason]:
    """The reasons for one library's suites."""
    entries = yaml.safe_load(file.read_text())[library]
    return [Reason(outcome, **entry) for outcome in ("failed", "skipped") for entry in entries[outcome] or []]


def read_results(junit: Path) -> list[Result]:
    """The results in a file that pytest's --junitxml wrote."""
    results = []
    for case in ElementTree.parse(junit).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, message = "failed", child.get("message", "")
            elif child.tag == "skipped":
                outcome, message = "skipped", child.get("message", "")
        suite, properties = case.get("classname", "").split(".")[-1], case.iterfind("properties/property")
        found = {each.get("name", ""): each.get("value", "") for each in properties}
        results.append(Result(suite, case.get("name", ""), outcome, message, found))
    return results


def judge(results: Iterable[Result], reasons: Sequence[Reason]) -> list[str]:
    """Gives each reason its results; what is wrong with the list of reasons, one sentence each.

    These are failures and skips without a reason, tests that pass although a reason says that they fail, and patterns
    that nothing matches any longer.
    """
    faults = []
    results = list(results)
    for result in results:
        if result.outcome == "passed":
            for reason in reasons:
                if reason.outcome == "failed" and reason.fits(result):
                    faults.append(f"{result.title} passes, but is listed as failing: take it off the list.")
            continue
        fitting = [reason for reason in reasons if reason.outcome == result.outcome and reason.fits(result)]
        if fitting:
            fitting[0].results.append(result)
        else:
            faults.append(f"{result.title} {result.outcome} and no reason is listed: {result.message[:300]}")
    for reason in reasons:
        for pattern in reason.patterns:
            alone = Reason(reason.outcome, [pattern], reason.whose, reason.reason)
            if not any(result.outcome == reason.outcome and alone.fits(result) for result in results):
                faults.append(f"No test {reason.outcome} that fits {pattern!r}: take it off the list.")
    return faults


def counts(results: Sequence[Result], suite: str) -> dict[str, int]:
    """How many tests of a suite there were, and how many of each outcome."""
    outcomes = Counter(result.outcome for result in results if result.suite == suite)
    return {"collected": outcomes.total(), **{outcome: outcomes[outcome] for outcome in OUTCOMES}}


def reasons_table(reasons: Sequence[Reason], outcome: str) -> list[str]:
    """The reasons of one outcome as a table in Markdown, the most frequent first."""
    rows = sorted((reason for reason in reasons if reason.outcome == outcome), key=lambda reason: -len(reason.results))
    if not rows:
        return ["None."]
    lines = ["| tests | which | reason | whose |", "|---|---|---|---|"]
    for row in rows:
        names = sorted({f"`{result.name.partition('[')[0]}`" for result in row.results})
        shown = ", ".join(names) if outcome == "failed" or len(names) <= 3 else f"{', '.join(names[:3])} and others"
        lines.append(f"| {len(row.results)} | {shown} | {row.reason} | {row.whose} |")
    return lines


def doors_table(results: Iterable[Result]) -> list[str]:
    """What the tests of doors_suite.py recorded as a table in Markdown, one row for each."""
    lines = ["| call | installed | furthest from ours (allowed) | |", "|---|---|---|---|"]
    for result in results:
        found = result.properties
        worst = [
            f"{each['note']}{' ' if each['note'] else ''}{each['worst']:.1e} ({each['allowed']:g})"
            for each in json.loads(found.get("worst", "[]"))
        ]
        title, installed = found.get("door", result.name), found.get("installed", "-")
        lines.append(f"| {title} | {installed} | {', '.join(worst) or '-'} | {result.outcome} |")
    return lines
