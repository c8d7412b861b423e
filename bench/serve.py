"""Tokens per second of the server at several numbers of clients, relative to one Session after the
other.

    python bench/serve.py [--version 7] [--sizes 12,768,65536] [--clients 1,8,64] [--tokens 32]

Every client sends one chat request (its own question, greedy, streamed) to the real server through
the `openai` client, all at once, in another process. The model has random weights; "the engine"
is batched decoding without HTTP. Everything is measured --rounds times; the best counts.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Callable

import torch

from rwkv import compat
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.generate import Session
from rwkv.models import RWKV
from rwkv.models.version import named
from rwkv.sampling import Sampling
from rwkv.serve import messages
from rwkv.serve.engine import Engine
from rwkv.serve.requests import Event, Request
from rwkv.serve.served import Served
from tests.serve.models import serving

GREEDY = Sampling(temperature=0)


def question(number: int) -> str:
    """A question of about 20 tokens."""
    return f"Please answer question {number}: what is the meaning of the number {number * 37}, and why?"


def chat(number: int) -> list[dict[str, str]]:
    """The messages of a client."""
    return [{"role": "user", "content": question(number)}]


def in_sessions(model: RWKV, tokenizer: WorldTokenizer, clients: int, tokens: int) -> int:
    """Generate for one client after the other; returns the number of tokens."""
    for number in range(clients):
        session = Session(model, tokenizer)
        for part in messages.prompt(chat(number)):
            session.read(part)
        for _ in session.write(GREEDY, tokens):
            pass
        assert session.ended == "length", session.ended
    return clients * tokens


def in_engine(served: Served, tokenizer: WorldTokenizer, clients: int, tokens: int) -> int:
    """Generate for all clients in one batch, without HTTP; returns the number of tokens."""
    engine = Engine({served.name: served}, tokenizer, max_batch=64)

    def emit(event: Event) -> None:
        assert event.finish != "error", event.error

    requests = [
        Request("base", messages.tokens_of(tokenizer, messages.prompt(chat(i))), GREEDY, tokens, emit)
        for i in range(clients)
    ]
    engine.submit(requests)
    while not engine.idle():
        engine.step()
    return sum(request.generated for request in requests)


def clients_of(commands, results) -> None:
    """The process of the clients: (URL, number of clients, tokens) → (tokens, seconds)."""
    import openai

    async def ask(client: openai.AsyncOpenAI, number: int, tokens: int) -> int:
        stream = await client.chat.completions.create(
            model="base",
            messages=chat(number),  # type: ignore[arg-type]
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        used = 0
        async for chunk in stream:
            used = chunk.usage.completion_tokens if chunk.usage else used
        return used

    async def everyone(url: str, clients: int, tokens: int) -> tuple[int, float]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            await client.models.list()
            begun = time.perf_counter()
            used = await asyncio.gather(*(ask(client, number, tokens) for number in range(clients)))
            return sum(used), time.perf_counter() - begun

    while command := commands.get():
        results.put(asyncio.run(everyone(*command)))


def timed(run: Callable[[], int | tuple[int, float]]) -> float:
    """Tokens per second."""
    begun = time.perf_counter()
    found = run()
    tokens, seconds = found if isinstance(found, tuple) else (found, time.perf_counter() - begun)
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="7")
    parser.add_argument("--sizes", default="12,768,65536", help="layers, width, vocabulary (at least 65536)")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    compat.enable_mkl_avx2()
    torch.manual_seed(0)
    layers, width, vocabulary = map(int, flags.sizes.split(","))
    model = RWKV(named(flags.version).Sizes(n_layer=layers, n_embd=width, vocab_size=vocabulary))
    model.initialise(1e-4, frozen=True)
    model = model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    served, tokenizer = Served("base", model), WorldTokenizer()
    context = multiprocessing.get_context("spawn")
    commands, results = context.Queue(), context.Queue()
    process = context.Process(target=clients_of, args=(commands, results), daemon=True)
    process.start()

    def over_http(url: str, clients: int) -> tuple[int, float]:
        commands.put((url, clients, flags.tokens))
        return results.get(timeout=600)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, RWKV-{flags.version} {flags.sizes}")
    print("| clients | sessions, tokens/s | server, tokens/s | ratio | engine, tokens/s | ratio |")
    print("|---|---|---|---|---|---|")
    with serving(Engine({"base": served}, tokenizer, max_batch=64)) as url:
        over_http(url, 1)  # the first run allocates
        for count in map(int, flags.clients.split(",")):
            runs: list[Callable[[], int | tuple[int, float]]] = [
                lambda: in_sessions(model, tokenizer, 2, flags.tokens),
                lambda count=count: over_http(url, count),  # type: ignore[misc]
                lambda count=count: in_engine(served, tokenizer, count, flags.tokens),  # type: ignore[misc]
            ]
            # in turn, as other programs may slow some down
            rates = [[timed(run) for run in runs] for _ in range(flags.rounds)]
            alone, server, engine = map(max, zip(*rates, strict=True))
            ratios = f"| {server:.1f} | {server / alone:.2f} | {engine:.1f} | {engine / alone:.2f} |"
            print(f"| {count} | {alone:.1f} {ratios}", flush=True)
    commands.put(None)
    process.join(60)


if __name__ == "__main__":
    main()
