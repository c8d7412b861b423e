"""Lightning callbacks: metrics, checkpoints, signals, memory."""
