"""Three steps of an optimizer, `sys.argv[1]`, on two ranks with different data: prints "equal" if
the weights and the optimizer's state are. Started with the fixture `two_ranks`.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from rwkv.config import TrainConfig
from rwkv.models import RWKV
from rwkv.models.v7 import Sizes
from rwkv.train.loop import optimizer
from rwkv.train.runtime import strategy

kind = sys.argv[1]
dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
torch.manual_seed(dist.get_rank())
model = RWKV(Sizes(2, 64, 70, head_size=32))
model.initialise(emb_scale=1e-4, frozen=False)
for name, p in model.named_parameters():
    if kind == "adamw8bit" and name.endswith(".weight") and p.dim() == 2:
        p.data = p.data.bfloat16()
wrapped = torch.nn.parallel.DistributedDataParallel(model)
opt = optimizer.make(model, TrainConfig(optimizer=kind, precision="bf16", random_seed=1, weight_decay=0.1))
for _ in range(3):
    wrapped(torch.randint(70, (2, 8)))[0].logsumexp(2).mean().backward()
    if kind == "adamw8bit":
        opt.set_clip(1.0)
    opt.step()
    opt.zero_grad(set_to_none=True)
for p in model.parameters():
    for mine in (p.data, *(x for x in opt.state[p].values() if torch.is_tensor(x))):
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs)
print("equal")
# Without this, processes sometimes hung at their end, where the last reference to the group is
# deleted.
del wrapped
strategy.leave_process_group()
