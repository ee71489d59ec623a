"""Finish a sound for where it goes: its ends, rate, loudness and peaks, in one order."""
