"""Count, on a CPU, the operations of torch that launch a kernel on a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}
VIEWS = {"view", "_unsafe_view", "detach", "alias", "unbind", "select", "unsqueeze", "transpose", "t", "slice", "expand", "squeeze",
         "as_strided", "_reshape_alias", "is_same_size", "split", "permute", "lift_fresh"}  # fmt: skip
NO_KERNEL = ALLOCATIONS | VIEWS


class Launches(TorchDispatchMode):
    """Names of torch's operations that launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name not in NO_KERNEL:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
