"""Parts and first weights that networks of several stages share."""
