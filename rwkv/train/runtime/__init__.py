"""Lightning trainer, parallel strategies, ranks and process settings."""
