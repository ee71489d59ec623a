"""Commands about models and this machine."""
