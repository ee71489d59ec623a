"""Sounds to latents: what can be encoded, the encoder of a folder, and the public layout of latents."""
