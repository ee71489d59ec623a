"""Write what was measured on a Mac as Markdown for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of one result."""
    machine, tests, kept = result["machine"], result["tests"], result["tuning"]["kept"]
    gpu = f", GPU with {machine['gpu_cores']} cores" if machine["gpu_cores"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    failed = f"; failed: {', '.join(tests['failed'])}" if tests["failed"] else ""
    lines = [
        f"**{machine['chip']}**, {machine['cpu_cores']} cores{gpu}, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{machine['system']}, {versions}; {result['model']['name']}"
        f"{' with random weights' if result['model']['weights'] == 'random' else ''}, {result['date']}",
        "",
        f"Tests of the GPU: {tests['passed']} passed, {tests['skipped']} skipped{failed}.",
        "",
        *_latency(result),
        "",
        f"Tuning: {_ways(kept)}.",
        "",
        *_memory(result["memory"]),
        "",
        *_operations(result["operations"]),
        "",
        _sustained(result["sustained"]),
    ]
    if result["short"]:
        lines.append("A dry run: these figures say nothing about speed.")
    if result["busy"]:
        lines.append("Other programs were running: the times are too long.")
    return "\n".join(lines) + "\n"


def _ways(kept: Mapping[str, Any]) -> str:
    ways = [f"{name} {way}" for name, way in {**kept["ways"], **kept["environment"]}.items()]
    gain = kept["before"] / kept["after"]
    return f"{', '.join(ways)}: {gain:.2f} times as fast" if ways else "the usual ways are the fastest"


def _latency(result: Mapping[str, Any]) -> list[str]:
    rows = [
        "| audio | ways | cold | warm | spread | per step | decode | memory | energy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for usual, tuned in zip(result["usual"], result["tuned"], strict=True):
        rows += [_row(usual, "usual"), _row(tuned, "tuned")]
    return rows


def _row(entry: Mapping[str, Any], ways: str) -> str:
    warm = entry["warm"]
    total, peak = warm["total"], warm["peak_memory_bytes"] or warm["peak_rss_bytes"]
    cells = [
        f"{entry['seconds']:g} s",
        ways,
        f"{entry['cold']['wall']['p50']:.2f} s",
        f"{total['p50']:.3f} s",
        f"{max(total['values']) - min(total['values']):.3f} s",
        f"{warm['sample']['p50'] / entry['steps'] * 1e3:.1f} ms",
        f"{warm['decode']['p50']:.3f} s",
        f"{peak / 1e9:.2f} GB",
        f"{entry['energy']['joules_each']:.0f} J" if entry["energy"] else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _memory(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| audio | weights for the | phase | measured | planned |", "|---|---|---|---:|---:|"]
    for entry in entries:
        for phase, peak in entry["measured"].items():
            sizes = f"{peak / 1e6:.0f} MB | {entry['predicted'][phase] / 1e6:.0f} MB"
            rows.append(f"| {entry['seconds']:g} s | {entry['residency']} | {phase} | {sizes} |")
    return rows


def _operations(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| operation | type | ways | ms | | second / first | error |", "|---|---|---|---:|---:|---:|---:|"]
    for each in found:
        first, second = each["milliseconds"]
        times = f"{first:.3f} | {second:.3f} | {second / first:.2f}"
        ways = " or ".join(each["ways"])
        rows.append(f"| {each['name']} | {each['dtype']} | {ways} | {times} | {each['error']:.0e} |")
    return rows


def _sustained(run: Mapping[str, Any]) -> str:
    energy = run["energy"]
    power = "" if energy is None else f", {energy['watts']:.1f} W, {energy['joules_each']:.0f} J a clip"
    return (
        f"Sustained: {run['runs']} clips of {run['seconds']:g} s in {run['minutes']:.1f} min, {run['first_p50']:.3f} s "
        f"at first, {run['last_p50']:.3f} s at last, {run['slowdown']:.2f} times as long{power}."
    )
