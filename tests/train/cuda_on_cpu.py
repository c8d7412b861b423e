"""A fake GPU and NCCL, with which DeepSpeed 0.7.0 trains on a CPU. DeepSpeed, Lightning and this
project run unmodified.

Tensors stay on the CPU: streams and events do nothing, and the current CUDA device is the CPU.
Collectives use gloo, extended by what only NCCL supports. Nothing is restored, so install it in a
separate process (run_trainings.py), or in all processes of a command through PYTHONPATH
(fake_gpu/sitecustomize.py).
"""

import contextlib
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv import compat

CPU = torch.device("cpu")


def install() -> None:
    """Make runs with `--accelerator cpu` use the GPU code of DeepSpeed and of this project."""
    _cuda()
    _fp16()
    _nccl()
    compat.why_deepspeed_unavailable = lambda on_gpu: None
    compat.import_deepspeed(on_gpu=True)
    _deepspeed()
    _lightning()


class _Stream:
    """torch.cuda.Stream and Event; all work is complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    wait_event = record = wait_stream

    def synchronize(self) -> None:
        _wait("synchronize")

    def query(self) -> bool:
        return True


waits_on: Any = None
"""A FakeDevice (host_sync.py) that counts the waits, or None."""


def _wait(operation: str) -> None:
    if waits_on:
        waits_on.wait(operation)


def _copied(make: Any) -> Any:
    """Constructor of a tensor on the GPU from a list: the host waits for the copy."""

    def copy(values: list) -> Tensor:
        _wait("copy from the host")
        tensor = make(values)
        if waits_on:
            waits_on.place(tensor)
        return tensor

    return copy


def _cuda() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *_: _Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.current_device = lambda: CPU
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.synchronize = lambda *_: _wait("synchronize")
    cuda.memory_stats = lambda *_: {"num_alloc_retries": 0}
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_: 0)
    cuda.FloatTensor, cuda.ByteTensor = _copied(torch.FloatTensor), _copied(torch.ByteTensor)
    tensor: Any = Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.pin_memory = lambda self, *_: self
    tensor.record_stream = lambda *_: None
    for name in ("empty", "zeros"):  # CPU builds of torch cannot pin memory
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make: Any) -> Any:
    return lambda *size, pin_memory=False, **options: make(*size, **options)


def _fp16() -> None:
    """Run operations that this torch supports in fp16 on GPUs only in fp32, rounding the result
    once.
    """
    module, tensor = torch, Tensor
    module.mm, module.relu = _widened(torch.mm), _widened(torch.relu)  # type: ignore[assignment]
    module.addmm = _widened(torch.addmm)  # type: ignore[assignment]
    tensor.__matmul__, tensor.addmm_ = _widened(Tensor.__matmul__), _widened(Tensor.addmm_)  # type: ignore[assignment]


def _widened(operation: Any) -> Any:
    """Run `operation` with fp16 arguments converted to fp32. The result goes to `out`, or in place
    for addmm_.
    """

    def run(*arguments: Any, out: Tensor | None = None, **options: Any) -> Tensor:
        if not any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in arguments):
            return operation(*arguments, **options) if out is None else operation(*arguments, out=out, **options)
        result = operation(*(x.float() if isinstance(x, Tensor) else x for x in arguments), **options).half()
        place = arguments[0] if operation.__name__ == "addmm_" else out
        return result if place is None else place.copy_(result)

    return run


class _Done:
    def wait(self) -> None: ...


def _nccl() -> None:
    """Collectives of 16-bit tensors in fp32, rounded once, as NCCL's for two ranks; gloo has no
    bf16.
    """
    for name in ("broadcast", "all_reduce", "reduce"):
        setattr(dist, name, _in_place(getattr(dist, name)))
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> _Done:
        whole = [torch.empty_like(part, dtype=_sendable(part.dtype)) for part in tensor_list]
        gather(whole, tensor.to(_sendable(tensor.dtype)).contiguous(), group=group)
        for part, value in zip(tensor_list, whole, strict=True):
            part.copy_(value)
        return _Done()

    def all_gather_base(
        output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> _Done:
        return all_gather(list(output_tensor.chunk(dist.get_world_size(group))), input_tensor, group)

    def reduce_scatter_base(
        output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> _Done:
        whole = input.clone()
        reduce(whole, op=op, group=group)
        output.copy_(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)])
        return _Done()

    module: Any = dist
    module.all_gather = all_gather
    module.distributed_c10d._all_gather_base = module._all_gather_base = all_gather_base
    module._reduce_scatter_base = reduce_scatter_base


def _sendable(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _in_place(collective: Any) -> Any:
    def send(tensor: Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> _Done:
        value = tensor.to(_sendable(tensor.dtype))
        collective(value, *arguments, **options)
        if value is not tensor:
            tensor.detach().copy_(value)  # detach: parameters are broadcast when training starts
        return _Done()

    return send


class _Torch(types.ModuleType):
    """The torch module, with the CPU in place of every device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*_: Any) -> torch.device:
        return CPU

    @staticmethod
    def tensor(value: Any, *, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(value, **options)


def _deepspeed() -> None:
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero import partition_parameters, stage_1_and_2, utils

    partition_parameters.torch = utils.torch = _Torch("torch")

    def set_distributed_vars(self: Any, _: Any) -> None:
        self.device, self.world_size, self.global_rank = CPU, dist.get_world_size(), dist.get_rank()

    engine.DeepSpeedEngine._set_distributed_vars = set_distributed_vars

    def split_by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:  # DeepSpeed's compares names of CUDA types
        found: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            found.setdefault(tensor.dtype, []).append(tensor)
        return list(found.values())

    stage_1_and_2.split_half_float_double = split_by_dtype


def _lightning() -> None:
    import pytorch_lightning.strategies.deepspeed as lightning
    from pytorch_lightning.accelerators.cpu import CPUAccelerator

    from rwkv.train.runtime import strategy

    lightning.CUDAAccelerator = CPUAccelerator
    make = strategy.make
    strategy.make = lambda config, gpu: make(config, True)
    strategy.ZeroStrategy.root_device = property(lambda self: CPU)
    strategy.ZeroStrategy._get_process_group_backend = lambda self: "gloo"
