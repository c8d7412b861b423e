"""What happens in a step: loss, optimizer, schedule, validation."""
