"""HOW it is learned: batches, the only loop, optimizer, precision, checkpoints, adapters, tracking."""
