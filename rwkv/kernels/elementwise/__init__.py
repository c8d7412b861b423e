"""The elementwise operations of a block."""
