"""Commands between audio and latents."""
