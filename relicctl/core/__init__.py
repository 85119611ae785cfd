"""What every command shares: models, loss, loop, optimiser, checkpoints."""
