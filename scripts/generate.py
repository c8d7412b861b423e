"""Run a World model: continue a prompt, answer a question, or chat.

    python scripts/generate.py --model merged.pth --ask "What is RWKV?"
    python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth --prompt "Once upon" \\
        --temperature 0.8
    # begin with a tuned state (scripts/state.py)
    python scripts/generate.py --model base.pth --state out/state/rwkv-0.pth --ask "What is RWKV?"
    # chat: /help lists the commands, /exit or Ctrl-D quits
    python scripts/generate.py --model merged.pth
"""

import sys

from rwkv.cli import parse, report_errors
from rwkv.config import GenerateConfig
from rwkv.errors import UserError


def main(config: GenerateConfig) -> None:
    import torch

    from rwkv import adapter_files, checkpoint, compat
    from rwkv.data.tokenizer import WorldTokenizer
    from rwkv.generate import Chat, Sampling, Session, matrices_dtype
    from rwkv.memory import machine
    from rwkv.terminal import Conversation, check_sampling, cut_note, decodable

    if not config.model:
        raise UserError("--model is missing: the checkpoint to run")
    if config.prompt and config.ask:
        raise UserError(
            "--prompt continues a text and --ask answers a question: pass only one of them, or neither to chat"
        )
    if config.prompt and config.think != "none":
        raise UserError("--think is for --ask and chats: omit it, or write the beginning of the thoughts into --prompt")
    if config.lora_alpha and not config.lora:
        raise UserError("--lora_alpha needs an adapter: pass --lora, or omit --lora_alpha")
    sampling = Sampling(
        config.temperature, config.top_p, config.presence_penalty, config.frequency_penalty, config.penalty_decay
    )
    check_sampling(sampling, config.max_tokens, config.seed)
    compat.enable_mkl_avx2()
    gpu = machine.use_gpu(config.accelerator)
    if config.accelerator == "gpu" and not gpu:
        raise UserError("--accelerator gpu: torch sees no GPU; check nvidia-smi, or use --accelerator cpu")
    dtype = matrices_dtype(
        config.dtype, checkpoint.read_tensors(config.model).get("head.weight", torch.empty(0)).dtype, gpu
    )
    if config.lora:
        model, _ = adapter_files.load_tuned(config.model, config.lora, config.lora_alpha or None, matrices=dtype)
        model.to("cuda" if gpu else "cpu")
    else:
        model = checkpoint.load_model(config.model, "cuda" if gpu else "cpu", matrices=dtype)
    if config.state:
        adapter_files.attach_state(config.state, model, config.model)
    if model.sizes.vocab_size != WorldTokenizer.vocab_size:
        raise UserError(
            f"{config.model}: {model.sizes.vocab_size} tokens, not the World vocabulary of 65536; only World models can generate text"
        )
    tokenizer, generator = WorldTokenizer(), torch.Generator(model.emb.weight.device)
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


if __name__ == "__main__":
    with report_errors():
        main(parse(GenerateConfig, __doc__))
