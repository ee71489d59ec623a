"""Evaluate generative models: a library of measures, and what ``sa3 evaluate`` does with them.

Measures are functions of arrays. Sounds come from a pipeline of either twin; only the flow-matching loss and the latent
CLAP need PyTorch.
"""
