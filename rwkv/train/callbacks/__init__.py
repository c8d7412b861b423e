"""What happens around a step: metrics, checkpoints, signals, memory."""
