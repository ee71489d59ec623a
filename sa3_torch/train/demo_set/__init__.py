"""What the demo model is trained on."""
