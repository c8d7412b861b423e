"""Compiled kernels: how they are built, whether they are usable here, and operators other than WKV."""
