"""The table of ``python -m benchmarks few-steps``: distances, shares and differences with intervals by prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sa3_torch.evaluate.measures.diversity import diversity
from sa3_torch.evaluate.measures.frechet import frechet
from sa3_torch.evaluate.measures.paired import paired_difference
from sa3_torch.train.run.random import Purpose, generator

from .rows import Float, Row

RESAMPLES = 200
HALVES = 10
NEAR = 0.05  # share of real held-out clips that lie so near to a training clip

Interval = dict[str, float]


def frechet_intervals(row: Row, first: Row, real: Row) -> tuple[Interval, Interval]:
    """Return the distance of a row to the real clips, and what it is more than that of ``first``, with 95 % intervals.

    Prompts are drawn again, the same for both and for the real clips, so that what is asked for stays alike. Sounds
    repeat in a draw, which moves distances; intervals are moved so that their middle is what was measured.
    """
    ours, theirs, target = row.space, first.space, real.space
    names = sorted(set(row.prompts) & set(real.prompts))
    members = [[np.flatnonzero(np.asarray(each.prompts) == name) for each in (row, real)] for name in names]
    rng, drawn = generator(0, Purpose.BOOTSTRAP), []
    for _ in range(RESAMPLES):
        chosen = [members[i] for i in rng.integers(0, len(names), len(names))]
        made, wanted = (np.concatenate(side) for side in zip(*chosen, strict=True))
        drawn.append([frechet(space[made], target[wanted]) for space in (ours, theirs)])
    values, others = np.array(drawn).T
    own, other = frechet(ours, target), frechet(theirs, target)
    distance = _moved(own, values)
    return {**distance, "low": max(0.0, distance["low"])}, _moved(own - other, values - others)


def _moved(value: float, drawn: Float) -> Interval:
    low, high = np.percentile(drawn - np.median(drawn), [2.5, 97.5]) + value
    return {"value": value, "low": float(low), "high": float(high)}


def equal_halves(row: Row, real: Row) -> float:
    """Return the distance of half of the sounds to the real clips of the others: at the floor's number of clips.

    Of the real clips themselves it is the floor.
    """
    ours, target, rng, found = row.space, real.space, generator(0, Purpose.HALVES), []
    half = min(len(ours), len(target)) // 2
    for _ in range(HALVES):
        order = rng.permutation(len(target))
        found.append(frechet(ours[order[:half]], target[order[half:]]))
    return float(np.mean(found))


def share(row: Row, name: str, first: Row | None = None) -> Interval | None:
    """Return the share of sounds that a judge finds right, or its difference to ``first``, with its 95 % interval; None
    where less than two prompts were judged so."""
    chosen = [i for i, verdict in enumerate(row.verdicts) if name in verdict]
    prompts = [row.prompts[i] for i in chosen]
    if len(set(prompts)) < 2:
        return None
    other = [0 if first is None else first.verdicts[i][name] for i in chosen]
    found = paired_difference([row.verdicts[i][name] for i in chosen], other, prompts)
    return {"value": found.value, "low": found.low, "high": found.high}


def by_class(row: Row, real: Row) -> dict[str, dict[str, float]]:
    """Return how much louder tails and brighter attacks are than those of real clips, in dB by class."""
    found = {}
    for label in sorted(set(row.labels) & set(real.labels)):
        ours, theirs = ([i for i, other in enumerate(each.labels) if other == label] for each in (row, real))
        pairs = {"tail": (row.tail, real.tail), "attack": (row.attack, real.attack)}
        found[label] = {
            name: float(np.mean([a[i] for i in ours]) - np.mean([b[i] for i in theirs]))
            for name, (a, b) in pairs.items()
        }
    return found


def summary(rows: Sequence[Row], rebuilt: Row, real: Row) -> list[dict[str, Any]]:
    """Return the table's rows as JSON values: real and rebuilt clips, then all others, compared with the first of
    these."""
    first, threshold = rows[0], float(np.quantile(real.nearest, NEAR))
    usual = max(float(np.median(real.nearest)), 1e-12)
    table = []
    for row in (real, rebuilt, *rows):
        made = row is not real and row is not rebuilt
        distance, more = frechet_intervals(row, first if made else row, rebuilt)
        names = sorted({name for verdict in row.verdicts for name in verdict})
        table.append(
            {
                "model": row.name,
                "setting": row.setting,
                "evaluations": row.evaluations,
                "sounds": len(row.prompts),
                "seconds": row.seconds,
                "frechet": distance,
                "frechet_to_first": more if made else None,
                "frechet_halves": equal_halves(row, rebuilt),
                "shares": {name: share(row, name) for name in names},
                "shares_to_first": {name: share(row, name, first) for name in names} if made else {},
                "clap": row.clap,
                "diversity": diversity(row.space, row.prompts, rebuilt.space, rebuilt.prompts).ratio,
                "copies": float(np.mean(np.array(row.nearest) < threshold)),
                "nearest": float(np.median(row.nearest)) / usual,
                "by_class": by_class(row, rebuilt),
            }
        )
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Lay the table out in Markdown; differences to the first model whose interval leaves zero out have a star."""
    names = [name for name in table[-1]["shares"] if table[-1]["shares"][name] is not None]
    head = ["", "evaluations", "FD to rebuilt (95 %)", "of halves", *(f"{name} %" for name in names)]
    lines = [[*head, "CLAP cosine", "diversity", "near copies %", "nearest", "s a sound"]]
    lines.append(["---"] * len(lines[0]))
    for row in table:
        found, more = row["frechet"], row["frechet_to_first"]
        cells = [f"{row['model']} {row['setting']}".strip(), str(row["evaluations"] or "")]
        cells.append(f"{found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f}){_star(more)}")
        cells.append(f"{row['frechet_halves']:.1f}")
        for name in names:
            value, difference = row["shares"].get(name), row["shares_to_first"].get(name)
            cells.append("" if value is None else f"{100 * value['value']:.0f}{_star(difference)}")
        cells += ["" if row["clap"] is None else f"{row['clap']:.3f}"]
        cells += ["" if row["diversity"] is None else f"{row['diversity']:.2f}", f"{100 * row['copies']:.0f}"]
        lines.append([*cells, f"{row['nearest']:.2f}", f"{row['seconds']:.3f}" if row["seconds"] else ""])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    labels = sorted({label for row in table for label in row["by_class"]})
    classes = [["tail / attack, dB", *labels], ["---"] * (len(labels) + 1)]
    for row in table:
        each = [row["by_class"].get(label) for label in labels]
        cells = ["" if found is None else f"{found['tail']:+.1f} / {found['attack']:+.1f}" for found in each]
        classes.append([f"{row['model']} {row['setting']}".strip(), *cells])
    return text + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in classes)


def _star(difference: Interval | None) -> str:
    return " *" if difference is not None and (difference["low"] > 0 or difference["high"] < 0) else ""
