"""Judge sounds of the set "music": does a clip have all that its caption asks for?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_torch.evaluate.judge.pitch import pitch_of
from sa3_torch.train.data.clip_cache import CachedClip
from sa3_torch.train.demo_set.music.instruments import INSTRUMENTS

from .classifier import WEIGHTS, JudgeNetworks, class_of
from .tempo import keeps_tempo
from .tonality import chord_name, key_of

LOWEST_HZ, HIGHEST_HZ, FRAME = 36.0, 2400.0, 8192  # of the set's notes: E1 to C7
_CERTAIN = 0.3
Verdict = dict[str, bool]


class MusicJudge:
    """Compare clips with what was asked for."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        """Open the networks. Raises FileNotFoundError where they have no weights."""
        self.networks = JudgeNetworks(path)

    def check(self, audio: NDArray[np.floating], clip: CachedClip) -> Verdict:
        """Return a verdict for each thing that was written of the clip, of ``ASKED`` by its kind."""
        found: Verdict = {}
        named = class_of(clip)
        if named is not None:
            network, wanted = named
            name = self.networks.name(audio, network, float(clip.fields.get("bpm", 120)))
            kind = wanted.partition(":")[0]
            found[{"instrument": "instrument", "loop": "style", "music": "style"}.get(kind, kind)] = name == wanted
            if kind == "instrument":
                instrument = INSTRUMENTS.get(name.partition(":")[2])
                found["family"] = instrument is not None and instrument.family == INSTRUMENTS[wanted[11:]].family
        if clip.kind == "note" and clip.midi is not None:
            pitch = pitch_of(audio, lowest_hz=LOWEST_HZ, highest_hz=HIGHEST_HZ, frame=FRAME)
            found["pitch"] = pitch.confidence >= _CERTAIN and abs(pitch.midi - clip.midi) <= 0.5
        if clip.kind == "chord":
            found["chord"] = chord_name(audio) == clip.fields["chord"]
        if "bpm" in clip.fields:
            found["tempo"] = keeps_tempo(audio, float(clip.fields["bpm"]))
        if clip.kind in ("line", "music"):
            found["key"] = key_of(audio) == clip.fields["key"]
        return found


def shares(verdicts: Iterable[tuple[CachedClip, Verdict]]) -> dict[str, Any]:
    """Return the share of right verdicts by kind of clip and what was judged: {"loop": {"tempo": 0.95, ...}, ...}.

    A line is of the kind "melody", "arpeggio" or "bass"; every kind has "clips" and "all", everything right.
    """
    found: defaultdict[str, list[Verdict]] = defaultdict(list)
    for clip, verdict in verdicts:
        if verdict:
            found[clip.label if clip.kind == "line" else clip.kind].append(verdict)
    return {kind: _shares(each) for kind, each in sorted(found.items())}


def _shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    names = list(verdicts[0])
    judged = {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in names}
    return {"clips": len(verdicts), "all": float(np.mean([all(verdict.values()) for verdict in verdicts])), **judged}
