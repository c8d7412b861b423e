"""Predict, measure and search the memory that a run needs."""
