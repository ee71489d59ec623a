"""Judge sounds of the set "music": pitch, chord, key, tempo, instrument, drum, effect, noise, style."""
