#!/usr/bin/env bash
# The tags of a built image, one a line, computed from what is in it: tags.sh IMAGE
# STACK, VERSION-STACK, VERSION-STACK-torchX, and the first twelve digits of the kernels' source hash.
set -euo pipefail
image=${1:?usage: tags.sh IMAGE}
docker run --rm --network none -e RWKV_DEVICE=cpu "$image" python -c '
import rwkv, torch
from rwkv import compat
from rwkv.kernels import build
stack = compat.stack()
torch_version = torch.__version__.split("+")[0]
print(stack, f"{rwkv.__version__}-{stack}", f"{rwkv.__version__}-{stack}-torch{torch_version}", "kernels-" + build.manifest()["source_hash"][:12] + f"-{stack}", sep="\n")
'
