"""The process, its devices and its peers: Lightning trainer, strategies, ranks."""
