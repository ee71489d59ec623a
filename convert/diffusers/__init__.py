"""Read pipelines of the diffusers library."""
