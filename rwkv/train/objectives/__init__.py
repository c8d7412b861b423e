"""What a run minimises: one module per objective (--objective), and what they share."""
