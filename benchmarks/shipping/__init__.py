"""Make what ships: the models inside of the package, and the gallery of what they make."""
