"""Read what models are trained on: caches, folders, shards, crops, latents."""
