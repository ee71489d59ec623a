"""Train a CLAP on latents."""
