"""Make the sounds that the demo model is trained on."""
