"""Describe models as data: configurations, presets, tensors of a checkpoint, lengths, chunks."""
