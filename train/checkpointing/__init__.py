"""How no work is lost: checkpoints, signals, losses that are no numbers, and whose folder it is."""
