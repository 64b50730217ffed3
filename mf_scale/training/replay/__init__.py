"""One step of a run again, outside it: the same global batch, cut as the run cut it, with a look at every value."""
