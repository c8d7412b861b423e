"""Weight files: recognised by their content and read without executing anything from them."""
