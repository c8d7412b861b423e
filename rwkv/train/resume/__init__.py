"""Files of a run and resuming from them: manifest, metrics, training states."""
