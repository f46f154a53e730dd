"""The result of a quantisation: the folder that engines load."""
