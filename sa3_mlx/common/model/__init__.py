"""Models as data: configurations, presets, tensors of a checkpoint, lengths, chunks."""
