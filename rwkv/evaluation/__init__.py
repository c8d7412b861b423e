"""Evaluate models: losses on documents, and lm-evaluation-harness."""
