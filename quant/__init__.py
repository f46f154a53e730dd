"""Checkpoint -> quantised checkpoint, with the real msmodelslim, one decoder layer at a time."""
