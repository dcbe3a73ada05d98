"""What the rows of ``tldm.py`` say: against the own run, the best tuned solver, and 250-step DDIM.

"As good" allows a distance of 1.05 times the other's and .95 of its R@10: with some hundred captions, R@10 has a
standard error of about .02.
"""

from __future__ import annotations

FD, R10 = 1.05, 0.95


def as_good(row: dict, other: dict) -> bool:
    """Whether ``row`` is as good as ``other`` by distance and by alignment."""
    return row["fd"] <= FD * other["fd"] and row["r10"] >= R10 * other["r10"]


def groups(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Ours by (prior, objective), fewest evaluations first."""
    out: dict[tuple[str, str], list[dict]] = {}
    for row in sorted((r for r in rows if r["arm"] == "tdpm"), key=lambda r: r["nfe"]):
        out.setdefault((row["prior"], row["objective"]), []).append(row)
    return out


def headline(rows: list[dict]) -> dict:
    """Our row at (or next to) 4 evaluations that is shown: of those that keep alignment, the one of least distance."""
    own = rows[0]
    near = [min(group, key=lambda r: abs(r["nfe"] - 4)) for group in groups(rows).values()]
    kept = [r for r in near if r["r10"] >= R10 * own["r10"]] or [max(near, key=lambda r: r["r10"])]
    return min(kept, key=lambda r: r["fd"])


def verdicts(rows: list[dict], chance: dict, latency: dict | None) -> list[dict]:
    """One for each prior and objective; see the schema."""
    own = rows[0]
    ddim = next((r for r in rows if r["arm"] == "ddim"), None)
    tuned = [r for r in rows if r["arm"] == "rival"]
    out = []
    for (prior, objective), group in groups(rows).items():
        at = min(group, key=lambda r: abs(r["nfe"] - 4))
        found = {
            "prior": prior,
            "objective": objective,
            "nfe": at["nfe"],
            "fd_over_own": at["fd"] / own["fd"],
            "r10_over_own": at["r10"] / own["r10"] if own["r10"] else None,
            "r10_over_chance": at["r10"] / chance["r10"],
            "coverage_over_own": at["coverage"] / own["coverage"] if own["coverage"] else None,
            "recall_over_own": at["recall"] / own["recall"] if own["recall"] else None,
            "saved": _saved(group, tuned),
            "ddim": None if ddim is None or latency is None else _against_ddim(group, ddim, latency),
        }
        out.append(found)
    return out


def _saved(group: list[dict], tuned: list[dict]) -> dict | None:
    """The best tuned solver at its best count, and the fewest evaluations with which ours is as good."""
    if not tuned:
        return None
    aligned = R10 * max(r["r10"] for r in tuned)
    best = min((r for r in tuned if r["r10"] >= aligned), key=lambda r: r["fd"])
    best = min((r for r in tuned if as_good(r, best)), key=lambda r: r["nfe"])  # the count where it is good enough
    ours = next((r["nfe"] for r in group if as_good(r, best)), None)
    ratio = None if ours is None else best["nfe"] / ours
    return {"sampler": best["sampler"], "rival_nfe": best["nfe"], "nfe": ours, "ratio": ratio}


def _against_ddim(group: list[dict], ddim: dict, latency: dict) -> dict:
    """Pictures made while DDIM makes one, at the fewest evaluations with which ours is as good (None: it never is).

    ``pictures``: a new prompt for every picture; ``pictures_of_one_prompt``: the prompt's encoding shared by a batch.
    """
    ms = latency["ms_per_picture"]
    timed = [r for r in group if f"tdpm_{r['budget']}" in ms]
    ours = next((r for r in timed if as_good(r, ddim)), None)
    if ours is None:
        return {"nfe": None, "pictures": None, "pictures_of_one_prompt": None}
    text, long, short = ms.get("text", 0.0), ms["ddim_250"], ms[f"tdpm_{ours['budget']}"]
    shared = text / latency["batch"]
    return {
        "nfe": ours["nfe"],
        "pictures": (text + long) / (text + short),
        "pictures_of_one_prompt": (shared + long) / (shared + short),
    }
