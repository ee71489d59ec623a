"""What training reads: caches, folders, shards, crops, latents."""
