"""Flags of the server."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class RequestLimits:
    """Limits, and values of parameters that a request omits."""

    max_tokens: int = 1024
    """Largest number of tokens that a request may generate; also the default of chats."""
    max_prompt: int = 16384
    """Largest number of prompt tokens."""
    max_body_kb: int = 1024
    """Largest body of a request, in KiB."""
    temperature: float = 1.0
    """Sampling temperature of requests without one. 0: always the most likely token."""
    top_p: float = 0.85
    """Nucleus sampling of requests without top_p (0 < top_p ≤ 1)."""
    penalty_decay: float = 0.996
    """Decay of the counts behind frequency_penalty, per generated token (0 to 1). OpenAI's API has
    no such parameter; 1 gives its penalty."""
    think: Literal["none", "fast", "full"] = "none"
    """Chats of RWKV-7 G1 models, as in generate; a request may have another value as "think"."""


@dataclass
class ServeConfig(RequestLimits):
    """Serving."""

    model: str = ""
    """Checkpoint of the base model, with the World vocabulary."""
    name: str = "base"
    """Name of the base model in requests."""
    lora: str = ""
    """LoRA adapters on the base: NAME=FILE, separated by commas. They share the base's weights in
    memory. Without NAME= the file's name is used."""
    lora_alpha: float = 0
    """lora_alpha of adapters without a manifest. Omitted: from the manifests."""
    state: str = ""
    """Tuned states of the base, NAME=FILE, separated by commas; NAME:ADAPTER=FILE is a state for an
    adapter."""
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: only programs of this machine can connect; 0.0.0.0: all that
    reach this machine. Use an API key then."""
    port: int = 8000
    """Port to listen on. 0: any free port."""
    api_key: str = ""
    """API key that requests must contain, as OpenAI's clients send it. Prefer the environment
    variable RWKV_API_KEY, as other users of the machine can see command lines. Omitted: no key is
    needed."""
    cors_origins: str = ""
    """Origins of web pages of other servers that may use this one, such as https://example.com,
    separated by commas. Omitted: none."""
    max_batch: int = 32
    """Sequences that are decoded at a time."""
    max_queue: int = 128
    """Requests that may wait for a place in the batch; others are answered with status 429."""
    cache_mb: int = 512
    """Memory in MiB for states after earlier prompts and answers, on the model's device: a prompt
    that begins like one of them is not read again from its start. 0: none."""
    shutdown_seconds: int = 10
    """Time for running requests to finish after Ctrl-C or SIGTERM, before they are cancelled."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the matrices and matmuls. auto: on a GPU that of the checkpoint, on a CPU
    fp32."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
