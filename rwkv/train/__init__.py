"""Training through Lightning: schedule and optimizer as pure functions, the Lightning module, callbacks, and fit, which joins them."""
