"""Training through Lightning: schedule and optimizer as pure functions, the Lightning module, callbacks, and fit, which joins them."""

from rwkv import unused

unused.leave_out_compiler()  # before Lightning and the first optimizer
