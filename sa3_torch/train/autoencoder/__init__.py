"""Train the SAME autoencoder (stage 0)."""
