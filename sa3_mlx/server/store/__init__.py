"""Keep jobs and sounds: a database and files beside it, whole at any moment."""
