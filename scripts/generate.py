"""Run a World model: continue a prompt, answer a question or a file of them, or chat.

    python scripts/generate.py --model merged.pth --ask "What is RWKV?"
    python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth --prompt "Once upon" \\
        --temperature 0.8
    python scripts/generate.py --model merged.pth --prompts questions.jsonl --output answers.jsonl
    # begin with a tuned state (scripts/state.py)
    python scripts/generate.py --model base.pth --state out/state/rwkv-0.pth --ask "What is RWKV?"
    # chat: /help lists the commands, /exit or Ctrl-D quits
    python scripts/generate.py --model merged.pth
"""

import os
import sys
from typing import TYPE_CHECKING

from rwkv.cli import parse, report_errors
from rwkv.config import GenerateConfig
from rwkv.errors import UserError

if TYPE_CHECKING:
    import torch

    from rwkv.data.tokenizer import WorldTokenizer
    from rwkv.sampling import Sampling
    from rwkv.serve import served

_CACHE = 256 << 20  # bytes for states after beginnings that prompts share


def main(config: GenerateConfig) -> None:
    import torch

    from rwkv import adapter_files, checkpoint, compat
    from rwkv.generate import Chat, Session
    from rwkv.sampling import Sampling, check_sampling
    from rwkv.serve import served
    from rwkv.terminal import Conversation, cut_note, decodable

    if not config.model:
        raise UserError("--model is missing: the checkpoint to run")
    if sum(map(bool, (config.prompt, config.ask, config.prompts))) > 1:
        raise UserError(
            "--prompt continues a text, --ask answers a question and --prompts a file: pass only one of them, or none to chat"
        )
    check_file_flags(config)
    if config.prompt and config.think != "none":
        raise UserError("--think is for --ask and chats: omit it, or write the beginning of the thoughts into --prompt")
    if config.lora_alpha and not config.lora:
        raise UserError("--lora_alpha needs an adapter: pass --lora, or omit --lora_alpha")
    sampling = Sampling(
        config.temperature, config.top_p, config.presence_penalty, config.frequency_penalty, config.penalty_decay
    )
    check_sampling(sampling, config.max_tokens, config.seed)
    compat.enable_mkl_avx2()
    device, dtype = served.device_and_dtype(config.model, config.accelerator, config.dtype)
    if config.lora:
        model, _ = adapter_files.load_tuned(config.model, config.lora, config.lora_alpha or None, matrices=dtype)
        model.to(device)
    else:
        model = checkpoint.load_model(config.model, device, matrices=dtype)
    if config.state:
        adapter_files.attach_state(config.state, model, config.model)
    tokenizer = served.world_tokenizer(model, config.model)
    if config.prompts:
        answer_file(config, served.Served("model", model), tokenizer, sampling, dtype)
        return
    generator = torch.Generator(model.emb.weight.device)
    generator.manual_seed(config.seed) if config.seed >= 0 else generator.seed()

    def begin() -> Session:
        return Session(model, tokenizer, dtype)

    if not (config.prompt or config.ask):
        Conversation(begin, sampling, config.max_tokens, generator, config.think).run()
        return
    session = begin()
    if config.prompt:
        prompt = decodable(config.prompt)
        session.read(prompt)
        print(prompt, end="")
        texts = session.write(sampling, config.max_tokens, (), generator)
    else:
        texts = Chat(session, config.think).ask(decodable(config.ask), sampling, config.max_tokens, generator)
    for part in texts:
        print(part, end="", flush=True)
    print(flush=True)
    if config.ask and session.ended == "length":
        print(cut_note(config.max_tokens), file=sys.stderr)


def check_file_flags(config: GenerateConfig) -> None:
    """Check --prompts and the flags that belong to it."""
    if bool(config.prompts) != bool(config.output):
        raise UserError("--prompts and --output belong together: the file of prompts, and the file for the answers")
    if config.batch < 1:
        raise UserError(f"--batch {config.batch}: it must be at least 1")
    if config.output:
        if not os.path.isfile(config.prompts):
            raise UserError(f"{config.prompts}: no such file of prompts")
        if os.path.isdir(config.output):
            raise UserError(f"{config.output}: a folder; pass a file name, such as answers.jsonl")
        if os.path.exists(config.output) and os.path.samefile(config.prompts, config.output):
            raise UserError(f"{config.output}: the file of prompts itself; use another --output")
        if os.path.exists(config.output) and not config.force:
            raise UserError(f"{config.output} exists; use another --output, or --force true to replace it")


def answer_file(
    config: GenerateConfig,
    model: "served.Served",
    tokenizer: "WorldTokenizer",
    sampling: "Sampling",
    dtype: "torch.dtype | None",
) -> None:
    """Answer all prompts of a file."""
    from rwkv.serve import prompts_file
    from rwkv.serve.engine import Engine

    engine = Engine({model.name: model}, tokenizer, dtype, max_batch=config.batch, cache_bytes=_CACHE)
    prompts = prompts_file.read(config.prompts, engine, model.name, config.think)
    found = prompts_file.answer(
        prompts, config.output, engine, model.name, sampling, config.max_tokens, config.seed, config.think
    )
    cut = f"; {found['length']:,} cut off at --max_tokens {config.max_tokens}" if "length" in found else ""
    print(f"{len(prompts):,} answers in {config.output}{cut}")


if __name__ == "__main__":
    with report_errors():
        main(parse(GenerateConfig, __doc__))
