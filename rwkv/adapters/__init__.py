"""Adapters: small sets of parameters trained on top of a frozen model."""
