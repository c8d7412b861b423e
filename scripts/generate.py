"""Run an RWKV-4 World model: continue a prompt, answer a question, or chat.

python scripts/generate.py --model merged.pth --ask "What is RWKV?"
python scripts/generate.py --model base.pth --lora out/lora/rwkv-0.pth --prompt "Once upon a time" --temperature 0.8
python scripts/generate.py --model merged.pth                      # chat; /reset forgets, /quit or Ctrl-D ends
"""

import sys

from rwkv.cli import parse, sentences
from rwkv.config import GenerateConfig
from rwkv.errors import UserError


def main(config: GenerateConfig) -> None:
    import torch

    from rwkv import checkpoint, compat
    from rwkv.data.tokenizer import WorldTokenizer
    from rwkv.generate import STOP, Chat, Sampling, Session, question

    compat.wake_mkl()
    if not config.model:
        raise UserError("--model is missing: the checkpoint to run")
    gpu = torch.cuda.is_available() and config.accelerator != "cpu"
    if config.accelerator == "gpu" and not gpu:
        raise UserError("--accelerator gpu: torch sees no GPU; check nvidia-smi, or use --accelerator cpu")
    if config.lora:
        model, _ = checkpoint.load_tuned(config.model, config.lora, config.lora_alpha or None)
        model.to("cuda" if gpu else "cpu")
    else:
        model = checkpoint.load_model(config.model, "cuda" if gpu else "cpu")
    if model.sizes.vocab_size != WorldTokenizer.vocab_size:
        raise UserError(
            f"{config.model}: {model.sizes.vocab_size} words, not the World vocabulary of 65536; only World models can be run as text"
        )
    tokenizer, generator = WorldTokenizer(), torch.Generator(model.emb.weight.device)
    generator.manual_seed(config.seed) if config.seed >= 0 else generator.seed()
    sampling = Sampling(config.temperature, config.top_p, config.presence_penalty, config.frequency_penalty, config.penalty_decay)

    def write(session: Session, stop: tuple[str, ...] = ()) -> None:
        for text in session.write(sampling, config.max_tokens, stop, generator):
            print(text, end="", flush=True)
        print()

    session = Session(model, tokenizer)
    if config.prompt or config.ask:
        session.read(_text(config.prompt or question(config.ask)))
        if config.prompt:
            print(_text(config.prompt), end="")
        write(session, () if config.prompt else STOP)
        return
    print("Chat. /reset forgets the conversation, /quit or Ctrl-D ends.", file=sys.stderr)
    chat = Chat(session)
    while (line := _input()) is not None:
        if line == "/reset":
            chat = Chat(Session(model, tokenizer))
        elif line:
            print("Assistant:", end=" ", flush=True)
            for text in chat.ask(line, sampling, config.max_tokens, generator):
                print(text, end="", flush=True)
            print()


def _text(typed: str) -> str:
    """What was typed, with bytes that are not UTF-8 as U+FFFD."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _input() -> str | None:
    try:
        line = _text(input("User: ").strip())
    except EOFError:
        return None
    return None if line == "/quit" else line


if __name__ == "__main__":
    with sentences():
        main(parse(GenerateConfig, __doc__))
