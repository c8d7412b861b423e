"""Text and chats to binidx."""
