#!/usr/bin/env bash
# Print the tags of a built image, one per line, computed from its content: tags.sh IMAGE
# STACK, VERSION-STACK, VERSION-STACK-torchX, and kernels-HASH-STACK (12 digits of the kernel source hash).
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
