"""Make the set "music": hours of captioned stereo notes, chords, lines, loops, arrangements and effects."""
