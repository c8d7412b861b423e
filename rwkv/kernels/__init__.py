"""Compiled kernels: building, loading, and all operators except WKV."""
