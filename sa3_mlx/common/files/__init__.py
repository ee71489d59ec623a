"""Read and write files: audio, pictures, tensors; every write is whole or not there."""
