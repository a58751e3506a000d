"""A journal as text that people read, at any moment of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

Event = dict[str, Any]

FAILURES = 40
"""Failures that are told: two screens. The journal has all."""

HEAD = (
    *("device", "capability", "driver", "cuda", "torch", "triton", "python", "commit"),
    *("pack", "built here", "cpu library", "cuda library"),
)
"""Facts at the top."""


def succeeded(events: Sequence[Event]) -> bool:
    """Whether everything ran to its end, and passed; nothing is no success."""
    lines = list(_groups(events))
    return bool(lines) and not any(line.startswith(("!", "?")) for line in lines)


def text(
    journal: tuple[Sequence[Event], int], elapsed: float, seconds: float, brief: bool = False
) -> str:
    """All of it, or without the long tables; lines fit a terminal but for messages.

    Args: what journal.read returns, and seconds that have passed, of those that there are.
    """
    events, broken = journal
    lines = [f"{elapsed:.0f} of {seconds:.0f} s", "", *_facts(events), ""]
    if broken:
        lines += [f"! {broken} lines of the journal cannot be read", ""]
    lines += ["groups (ok, ! something failed, ? not all was reached)", *_groups(events)]
    for title, found in (
        ("failed", list(_failures(events))),
        ("measured", list(_figures(events))),
        ("where the device's time goes", [] if brief else list(_times(events))),
        ("the driver on row kernels", [] if brief else list(_resources(events))),
    ):
        if found:
            lines += ["", title, *found]
    return "\n".join(lines) + "\n"


def _facts(events: Sequence[Event]) -> Iterator[str]:
    known = {event["fact"]: event["value"] for event in events if "fact" in event}
    for name in HEAD:
        if name in known:
            yield f"  {name:<12}{known[name]}"


def _names(events: Sequence[Event]) -> list[str]:
    return list(dict.fromkeys(event["group"] for event in events))


def _groups(events: Sequence[Event]) -> Iterator[str]:
    for name in _names(events):
        own = [event for event in events if event["group"] == name]
        yield _group(name, own)


def _group(name: str, own: Sequence[Event]) -> str:
    selected = max((event["selected"] for event in own if "selected" in event), default=0)
    checks = [event for event in own if "check" in event]
    passed = sum(event["outcome"] == "passed" for event in checks)
    skipped = sum(event["outcome"] == "skipped" for event in checks)
    bad = len(checks) - passed - skipped
    figures = [event for event in own if "figure" in event]
    unmeasured = sum(not _measured(event) for event in figures)
    missed = sum(event.get("met") is False for event in figures)
    said = []
    if selected:
        said.append(f"{passed} of {selected} passed")
    said += [
        f"{count} {what}"
        for count, what in (
            (bad, "failed"),
            (skipped, "skipped"),
            (selected - len(checks), "not reached"),
            (len(figures), "measured"),
            (unmeasured, "could not be measured"),
            (missed, "missed the bar"),
            (sum(event.get("computed", 0) for event in own), "truths computed here"),
        )
        if count > 0
    ]
    ends = [event for event in own if "status" in event or "cut" in event or "missing" in event]
    end = ends[-1] if ends else {}
    if "cut" in end:
        said.append(f"cut off at {end['cut']} s")
    if "missing" in end:
        said.append(str(end["missing"]))
    if end.get("status", 0) not in (0, 1):
        said.append(f"exit status {end['status']}")
    failed = bad or unmeasured or missed or "missing" in end or end.get("status", 0) != 0
    failed = failed or (skipped > 0 and skipped == len(checks) == selected)
    reached = "status" in end and selected <= len(checks)
    sign = "!" if failed else "ok" if reached else "?"
    return f"{sign:<3}{name:<26}{', '.join(said)}"


def _measured(event: Event) -> bool:
    """Whether a figure has a value that is one."""
    return event["value"] is not None and math.isfinite(event["value"])


def _failures(events: Sequence[Event]) -> Iterator[str]:
    """Alike ones once, with their number."""
    found = [e for e in events if "check" in e and e["outcome"] not in ("passed", "skipped")]
    found += [e for e in events if "figure" in e and not _measured(e)]
    found += [e for e in events if "lost" in e]
    alike: dict[tuple[str, str], list[str]] = {}
    for event in found:
        name = str(event.get("check", event.get("figure", "the device"))).rpartition("::")[2]
        said = event.get("message") or event.get("lost") or event.get("outcome", "")
        what = f"{event['group']}: {name.partition('[')[0]}"
        # Numbers in a message differ from case to case.
        alike.setdefault((what, re.sub(r"[\d.]+(e[-+]\d+)?", "#", said)), []).append(
            f"{name.partition('[')[2].rstrip(']')}: {said}"
        )
    for (what, _), cases in list(alike.items())[:FAILURES]:
        more = f" (and {len(cases) - 1} more alike)" if len(cases) > 1 else ""
        yield f"  {what} {cases[0]}{more}"
    if len(alike) > FAILURES:
        yield f"  and {len(alike) - FAILURES} other kinds"


def _figures(events: Sequence[Event]) -> Iterator[str]:
    for event in events:
        if "figure" in event and _measured(event):
            bar = f"  {event['bar']}{'' if event['met'] else '  MISSED'}" if "bar" in event else ""
            value = f"{event['value']:.3g} {event['unit']}"
            yield f"  {event.get('backend', ''):<8}{event['figure']:<52}{value:>12}{bar}"


def _times(events: Sequence[Event]) -> Iterator[str]:
    for event in events:
        if "time" not in event:
            continue
        yield f"  {event.get('backend', '')}, {event['time']}"
        for name, milliseconds, launches in event["kernels"]:
            yield f"    {milliseconds:9.3f} ms {launches:4d} x  {name[:56]}"


def _resources(events: Sequence[Event]) -> Iterator[str]:
    for event in events:
        if str(event.get("fact", "")).startswith(("rows ", "soft_rank ")):
            yield f"  {event['fact']}: {event['value']}"
