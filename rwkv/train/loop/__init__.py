"""The training step: loss, optimizer, learning-rate schedule, validation."""
