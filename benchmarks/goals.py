"""What is asked of the native rows, and which of it a row reaches."""

from __future__ import annotations

from typing import Any

from workloads import GOALS, Workload

NEAR_CEILING = 0.9  # of dense FLOPs / present FLOPs, against the faster dense layout
UNMASKED = 0.9  # of the faster dense layout, where nothing is masked
THREADS = 1.85  # two over one, compute bound


def conv_goals(work: Workload, row: dict[str, Any]) -> dict[str, float]:
    """Goals of one native row: share of the roof, and ratios to halo, peers and dense."""
    goals = {}
    share = GOALS[work.kind].get(row["dtype"])
    if share is not None:
        goals["roof_share"] = share
    if row["hidden"] == 0:
        return goals | {"vs_dense": UNMASKED}
    goals["vs_dense"] = NEAR_CEILING * row["ceiling"]
    if work.kind == "3x3x3, blocks 32 to 8":
        goals["vs_halo"] = 1.15
    if work.kind == "3x3x3, blocks 4":
        goals["vs_halo"] = 2.0
    goals["vs_peer"] = 5.0 if (work.channels_in, work.channels_out) == (32, 32) else 2.0
    return goals


def missed(row: dict[str, Any], goals: dict[str, float]) -> list[str]:
    """The goals that a row does not reach, as text; what was not measured is not missed."""
    found = []
    for name, goal in goals.items():
        value = row.get(name)
        if value is not None and value < goal:
            found.append(f"{name} {value:.2f} < {goal:.2f}")
    return found


def judge(row: dict[str, Any], goals: dict[str, float]) -> None:
    """Writes the goals and what is missed into a row, and one cell for tables."""
    row["goals"] = goals
    row["missed"] = missed(row, goals)
    measured = any(row.get(name) is not None for name in goals)
    row["short"] = "; ".join(row["missed"]) or ("met" if measured else "")
