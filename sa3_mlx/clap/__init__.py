"""Tell how well a text describes latents."""
