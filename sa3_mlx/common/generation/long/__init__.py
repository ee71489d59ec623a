"""Make pieces of any length: windows that overlap in latents, each a continuation of what is there."""
