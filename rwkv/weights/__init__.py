"""Weight files: identified by content, and read without executing code from them."""
