"""Describe places with several ways to the same result, time them and keep what was found fastest."""
