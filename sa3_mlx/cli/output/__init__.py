"""Write finished audio, and print what there is to say about it."""
