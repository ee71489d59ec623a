"""Read and write the .npz files of the official MLX port."""
