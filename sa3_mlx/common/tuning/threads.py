"""Name the numbers of threads that are worth a try."""

from __future__ import annotations


def thread_counts(most: int) -> dict[str, int]:
    """Return the threads of each way: all, half of them where that is more than one, and one."""
    counts = {"all": most, "half": most // 2, "one": 1}
    least = {"all": 1, "half": 2, "one": 1}
    return {way: count for way, count in counts.items() if way == "all" or least[way] <= count < most}
