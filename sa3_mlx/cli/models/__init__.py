"""Hold the commands about models and this machine."""
