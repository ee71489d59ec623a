"""Latent CLAP."""
