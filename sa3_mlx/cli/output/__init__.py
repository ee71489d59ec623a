"""Where finished audio goes, and what is printed about it."""
