"""Serve a World model and its adapters over an OpenAI-compatible HTTP API, with a chat page.

    python scripts/serve.py --model base.pth --lora tuned=out/lora/rwkv-0.pth
    # then open http://127.0.0.1:8000, or:
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "tuned", "messages": [{"role": "user", "content": "What is RWKV?"}]}'

Stop it with Ctrl-C.
"""

import os

from rwkv.cli import parse, report_errors
from rwkv.config import ServeConfig
from rwkv.errors import UserError


def main(config: ServeConfig) -> None:
    from rwkv import compat
    from rwkv.sampling import Sampling, check_sampling
    from rwkv.serve import app, output, served, server
    from rwkv.serve.engine import Engine
    from rwkv.serve.protocol import Limits
    from rwkv.serve.worker import Worker

    if not config.model:
        raise UserError("--model is missing: the checkpoint to serve")
    sampling = Sampling(config.temperature, config.top_p, penalty_decay=config.penalty_decay)
    check_sampling(sampling, config.max_tokens, 0)
    for name in ("max_prompt", "max_body_kb", "max_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: it must be at least 1")
    for name in ("max_queue", "cache_mb", "shutdown_seconds"):
        if getattr(config, name) < 0:
            raise UserError(f"--{name} {getattr(config, name)}: it must be at least 0")
    if not 0 <= config.port < 1 << 16:
        raise UserError(f"--port {config.port}: it must be from 0 to 65535")
    adapters, states = served.named_files("lora", config.lora), served.named_files("state", config.state)
    served.check_names(config.name, adapters, states)
    if config.lora_alpha and not adapters:
        raise UserError("--lora_alpha needs an adapter: pass --lora, or omit --lora_alpha")
    key = config.api_key or os.environ.get("RWKV_API_KEY", "")
    compat.enable_mkl_avx2()
    device, dtype = served.device_and_dtype(config.model, config.accelerator, config.dtype)
    with server.listen(config.host, config.port) as listening:  # before the model is loaded
        if not (server.is_local(listening) or key):
            print(f"warning: {config.host} is reachable from other machines; set RWKV_API_KEY to require a key")
        models = served.load(
            config.model, config.name, adapters, states, alpha=config.lora_alpha or None, device=device, matrices=dtype
        )
        engine = Engine(
            models,
            served.world_tokenizer(models[config.name].model, config.model),
            dtype,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            cache_bytes=config.cache_mb << 20,
        )
        settings = app.Settings(
            Limits(
                config.max_tokens,
                config.max_prompt,
                config.temperature,
                config.top_p,
                config.penalty_decay,
                config.think,
            ),
            config.max_body_kb << 10,
            key,
            server.accepted_hosts(listening, config.host, key),
            [origin.strip() for origin in config.cors_origins.split(",") if origin.strip()],
            output.say,
        )
        server.run(listening, Worker(engine), settings, config.shutdown_seconds)


if __name__ == "__main__":
    with report_errors():
        main(parse(ServeConfig, __doc__))
