"""Files in and out: audio, pictures, tensors; every write is whole or not there."""
