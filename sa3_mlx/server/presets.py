"""Suggest prompts: those of a list whose words a model knows."""

from __future__ import annotations

from sa3_mlx.common.text.tokenizer import Tokenizer

_PROMPTS = (
    "piano note A4",
    "organ chord C major",
    "violin note G3",
    "marimba note E4",
    "vibraphone note B3",
    "guitar chord A minor",
    "flute note D4",
    "trumpet note C4",
    "snare drum",
    "kick drum",
    "closed hihat",
    "crash cymbal",
    "pink noise",
    "slow piano in a large hall, 70 bpm",
    "warm analog synth pad, evolving, 90 bpm",
    "dusty drum break with brushed snare, 88 bpm",
    "deep dub techno with tape echo, 122 bpm",
    "finger-picked acoustic guitar, close and dry, 100 bpm",
    "string quartet, slow and dark, 60 bpm",
    "funk bass line with a clean guitar, 108 bpm",
    "rain on a tin roof, distant thunder",
    "footsteps on gravel, slow, close",
    "an old door creaks open in an empty room",
    "waves on a pebble beach",
)
_SUGGESTED = 13


def known_prompts(tokenizer: Tokenizer) -> list[str]:
    """Return prompts of which the model knows every word; for one that knows all words, the longer ones first."""
    known = [prompt for prompt in _PROMPTS if not tokenizer.unknown(prompt)]
    return known if tokenizer.closed_vocabulary() else known[_SUGGESTED:]
