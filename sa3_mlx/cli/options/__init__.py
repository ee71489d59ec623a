"""Declare the options that several commands share, as dataclasses whose fields carry them.

A command of class ``TypedCommand`` (typed.py) takes a group of options as one parameter: ``output: OutputOptions`` in
the signature of its function adds ``--out``, ``--format``, ... and hands them over together.
"""
