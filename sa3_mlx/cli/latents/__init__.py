"""Hold the commands between audio and latents."""
