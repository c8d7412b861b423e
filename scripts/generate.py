"""Run a World model: continue a prompt, answer a question or a file of them, or chat.

    python scripts/generate.py --model merged.pth --ask "What is RWKV?"
    python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth --prompt "Once upon" \\
        --temperature 0.8
    python scripts/generate.py --model merged.pth --prompts questions.jsonl --output answers.jsonl
    # begin with a tuned state (scripts/state.py)
    python scripts/generate.py --model base.pth --state out/state/rwkv-0.pth --ask "What is RWKV?"
    # the answers of the base model and of the tuned one
    python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth --compare true \\
        --ask "What is RWKV?"
    # chat: /help lists the commands, /exit or Ctrl-D quits
    python scripts/generate.py --model merged.pth
"""

import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rwkv.cli import parse, report_errors
from rwkv.config import GenerateConfig
from rwkv.errors import UserError

if TYPE_CHECKING:
    import torch

    from rwkv.models import RWKV
    from rwkv.sampling import Sampling

_CACHE = 256 << 20  # bytes for the states after prefixes that prompts share


def main(config: GenerateConfig) -> None:
    from rwkv import compat
    from rwkv.sampling import Sampling, check_sampling
    from rwkv.serve import served

    check_flags(config)
    sampling = Sampling(
        config.temperature, config.top_p, config.presence_penalty, config.frequency_penalty, config.penalty_decay
    )
    check_sampling(sampling, config.max_tokens, config.seed)
    compat.enable_mkl_avx2()
    device, dtype = served.device_and_dtype(config.model, config.accelerator, config.dtype)
    if config.compare and config.seed < 0:
        config = dataclasses.replace(config, seed=random.randrange(1 << 31))  # the same for both models
    if config.prompts:
        answer_file(config, sampling, device, dtype)
        return
    for name, model in models(config, device, dtype):
        if config.compare:
            print(f"[{name}]")
        answer(config, model, sampling, dtype)


def models(config: GenerateConfig, device: str, dtype: "torch.dtype | None") -> Iterator[tuple[str, "RWKV"]]:
    """The model with its adapter and state, and its name; with --compare first the model alone."""
    from rwkv import adapter_files, checkpoint

    if config.lora and config.state:
        adapter_files.check_one_state(config.lora, config.state)
    if config.compare:
        yield config.model, checkpoint.load_model(config.model, device, matrices=dtype)
    if config.lora:
        model, _ = adapter_files.load_tuned(config.model, config.lora, config.lora_alpha or None, matrices=dtype)
        model.to(device)
    else:
        model = checkpoint.load_model(config.model, device, matrices=dtype)
    if config.state:
        adapter_files.attach_state(config.state, model, config.model)
    yield " + ".join(filter(None, (config.model, config.lora, config.state))), model


def answer(config: GenerateConfig, model: "RWKV", sampling: "Sampling", dtype: "torch.dtype | None") -> None:
    """Continue --prompt, answer --ask, or chat, on the terminal."""
    import torch

    from rwkv.generate import Chat, Session
    from rwkv.serve import served
    from rwkv.terminal import Conversation, cut_note, decodable

    tokenizer = served.world_tokenizer(model, config.model)
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


def answer_file(config: GenerateConfig, sampling: "Sampling", device: str, dtype: "torch.dtype | None") -> None:
    """Answer all prompts of a file."""
    from rwkv.files import atomic_write
    from rwkv.serve import prompts_file, served
    from rwkv.serve.engine import Engine

    answers = []
    with atomic_write(config.output) as temporary:  # fails before the work if the file cannot be written
        for name, model in models(config, device, dtype):
            tokenizer = served.world_tokenizer(model, config.model)
            engine = Engine(
                {name: served.Served(name, model)}, tokenizer, dtype, max_batch=config.batch, cache_bytes=_CACHE
            )
            prompts = prompts_file.read(config.prompts, engine, name, config.think)
            answers.append(
                prompts_file.answer(prompts, engine, name, sampling, config.max_tokens, config.seed, config.think)
            )
        prompts_file.write(temporary, prompts, *reversed(answers))
    cut = sum(answer.reason == "length" for each in answers for answer in each)
    note = f"; {cut:,} cut off at --max_tokens {config.max_tokens}" if cut else ""
    print(f"{sum(map(len, answers)):,} answers in {config.output}{note}")


def check_flags(config: GenerateConfig) -> None:
    """Raise UserError for flags that are missing, or contradict each other."""
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
    if config.compare and not (config.prompt or config.ask or config.prompts):
        raise UserError(
            "--compare is not for chats: pass --ask, --prompt or --prompts; scripts/serve.py has a page for it"
        )
    if config.compare and not (config.lora or config.state):
        raise UserError("--compare shows answers with and without an adapter or a state: pass --lora or --state")


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


if __name__ == "__main__":
    with report_errors():
        main(parse(GenerateConfig, __doc__))
