"""Stages 2 and 3: ODE warm-up and adversarial post-training."""
