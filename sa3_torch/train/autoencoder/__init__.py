"""Stage 0: the SAME autoencoder."""
