"""Published models: which there are, and fetching them from the Hugging Face Hub."""
