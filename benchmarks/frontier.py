"""What measured points say: who is ahead at each budget, who is on the frontier, what is saved at equal quality.

A point is a dict of a record of ``pareto.py``: family, nfe, measures with mean and deviation over blocks of seeds.
"""

from __future__ import annotations

import math

import numpy as np

from benchmarks import metrics

OURS = "tdpm"
RIVALS = ("k-diffusion", "diffusers")
OUTCOMES = {-1: "ahead", 0: "tie", 1: "behind"}


def estimate(point: dict, measure: str = "fd") -> metrics.Estimate:
    value = point["measures"][measure]
    return metrics.Estimate(value["mean"], math.nan if value["sd"] is None else value["sd"])


def best_within(points: list[dict], budget: int) -> dict | None:
    """The point with the lowest mean distance that costs at most ``budget`` evaluations."""
    return min((p for p in points if p["nfe"] <= budget), key=lambda p: estimate(p).value, default=None)


def frontier(points: list[dict]) -> list[tuple[int, metrics.Estimate]]:
    """(evaluations, distance), each better than everything cheaper."""
    out: list[tuple[int, metrics.Estimate]] = []
    for nfe in sorted({p["nfe"] for p in points}):
        value = estimate(best_within(points, nfe))
        if not out or value.value < out[-1][1].value:
            out.append((nfe, value))
    return out


def evaluations_for(curve: list[tuple[int, metrics.Estimate]], distance: float) -> float | None:
    """Evaluations at which the frontier ``curve`` reaches ``distance``: linear between points in log distance.

    None if it never does; its cheapest point's evaluations if that is already as good.
    """
    if not curve or curve[-1][1].value > distance:
        return None
    if curve[0][1].value <= distance:
        return float(curve[0][0])
    for (n, a), (m, b) in zip(curve[:-1], curve[1:], strict=True):
        if b.value <= distance:
            logs = [math.log(max(v, 1e-12)) for v in (a.value, b.value, distance)]
            return n + (m - n) * (logs[0] - logs[2]) / (logs[0] - logs[1])
    return None


def saved(points: list[dict], budgets) -> dict[int, float | None]:
    """The rivals' evaluations over those at which ours reach their distance, at each budget; None: ours never do."""
    ours, rivals = ([p for p in points if p["family"] in side] for side in ((OURS,), RIVALS))
    curve, out = frontier(ours), {}
    for budget in budgets:
        best = best_within(rivals, budget)
        needed = best and evaluations_for(curve, estimate(best).value)
        out[budget] = best["nfe"] / needed if needed else None
    return out


def verdict(points: list[dict], budgets) -> list[dict]:
    """One row per budget that both sides can meet: see the schema of "tdpm-frontier/1".

    ``outcome`` calls differences under the noise ties (``metrics.compare``); ``on_frontier``: not worse than the best
    rival by more than one standard deviation of their difference; ``saved``: the rival's evaluations divided by those
    at which ours reach the rival's distance.
    """
    ours, rivals = ([p for p in points if p["family"] in side] for side in ((OURS,), RIVALS))
    gained, rows = saved(points, budgets), []
    for budget in budgets:
        mine, theirs = best_within(ours, budget), best_within(rivals, budget)
        if mine is None or theirs is None:
            continue
        a, b = estimate(mine), estimate(theirs)
        rows.append({
            "budget": budget, "ours": mine["arm"], "ours_fd": mine["measures"]["fd"],
            "rival": theirs["arm"], "rival_fd": theirs["measures"]["fd"],
            "outcome": OUTCOMES[metrics.compare(a, b)],
            "on_frontier": bool(a.value - b.value <= np.hypot(a.error, b.error)),
            "saved": gained[budget],
        })  # fmt: skip
    return rows


FEW = range(3, 9)  # the budgets at which tdpm claims the frontier


def standing(rows: list[dict]) -> str:
    """One plain sentence on a verdict: is tdpm on the frontier at every few evaluations, and where is it not."""
    asked = [row for row in rows if row["budget"] in FEW]
    off = [str(row["budget"]) for row in asked if not row["on_frontier"]]
    budgets = ", ".join(str(row["budget"]) for row in asked)
    if not asked:
        return "No budget from 3 to 8 was measured."
    if off:
        return f"tdpm is NOT on the frontier at {', '.join(off)} evaluations (of {budgets}): a rival is better there."
    return f"tdpm is on the frontier, within one standard deviation, at {budgets} evaluations."


def show(record: dict) -> str:
    """The verdict as text, one line per budget."""
    reference, floor = record["reference"]["measures"]["fd"], record["floor"]
    lines = [
        f"{record['name']}, {record['judge']}, {record['blocks']} blocks of {record['per_block']}: "
        f"own 60-evaluation run {reference['mean']:.3f}, floor {floor['mean']:.3f}",
        "budget | tdpm (sd)                                     | best rival (sd)                               | "
        "verdict | evaluations saved",
    ]
    for row in record["verdict"]:
        fds = [(row[f"{who}_fd"], row[who][:28]) for who in ("ours", "rival")]
        sides = [f"{fd['mean']:8.3f} ({fd['sd']:.3f}) {arm:28}" for fd, arm in fds]
        saved = "never as good" if row["saved"] is None else f"{row['saved']:.2f}x"
        second = f"; by the second judge {row['second']['outcome']}" if row.get("second") else ""
        lines.append(f"{row['budget']:6d} | {sides[0]} | {sides[1]} | {row['outcome']:7} | {saved}{second}")
    return "\n".join([*lines, standing(record["verdict"])])
