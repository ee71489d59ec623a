"""Run jobs: the queue, the thread that owns the device, the models that stay loaded."""
