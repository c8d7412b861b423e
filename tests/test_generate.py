"""Generation carries the state; sampling parameters work as documented; stop texts are removed."""

import pytest
import torch

from rwkv import checkpoint
from rwkv.config import ConvertConfig
from rwkv.data.binidx import Dataset
from rwkv.data.convert.pipeline import convert
from rwkv.data.tokenizer import WorldTokenizer
from rwkv.errors import UserError
from rwkv.generate import Chat, Sampling, Session, matrices_dtype, question, sample_token
from rwkv.models.version import VERSIONS

GREEDY = Sampling(temperature=0)


class ByteTokenizer:
    """A byte-level tokenizer for a model with a vocabulary of 257; 0 is EOD."""

    eod = 0

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def decode_bytes(self, ids):
        return bytes(i - 1 for i in ids if i)


class ScriptedModel(torch.nn.Module):
    """A fake model that writes a given text: the token count determines the next byte."""

    def __init__(self, text: str, skip: int):
        super().__init__()
        self.ids, self.skip = [*ByteTokenizer().encode(text), 0], skip
        self.emb = torch.nn.Embedding(1, 1)
        self.seen = []

    def hidden(self, tokens, state):
        count = (state or 0) + tokens.shape[1]
        self.seen.append(tokens[0].tolist())
        return torch.full((1, 1, 1), float(count)), count

    def head(self, hidden):
        logits = torch.zeros(257)
        logits[self.ids[min(int(hidden) - self.skip, len(self.ids) - 1)]] = 10
        return logits


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_greedy_matches_parallel_model(make_model, version):
    model = make_model(version=version, vocab_size=257).eval()
    session = Session(model, ByteTokenizer())
    session.read("abc")
    text = "".join(session.write(GREEDY, 12))
    ids = [0, *ByteTokenizer().encode("abc")]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
            if ids[-1] == 0:
                break
    assert text == ByteTokenizer().decode_bytes(ids[4:]).decode("utf-8", errors="replace")


def test_each_token_computed_once():
    model = ScriptedModel("hello", skip=3)
    session = Session(model, ByteTokenizer())
    session.read("ab")
    assert "".join(session.write(GREEDY, 50)) == "hello"  # ends at EOD
    assert [len(ids) for ids in model.seen] == [1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("version", VERSIONS)
def test_constant_cost_per_token(make_model, version):
    model = make_model(version=version, vocab_size=257)
    session = Session(model, ByteTokenizer())
    tokens = []
    hidden = model.hidden
    model.hidden = lambda ids, state: tokens.append(ids.numel()) or hidden(ids, state)
    with torch.no_grad():
        model.head.weight[0] = 0  # EOD is never the most likely token
    for _ in session.write(GREEDY, 100):
        pass
    assert tokens == [1] * 100  # earlier tokens are not read again
    # the state does not grow: two shifts, and WKV's 3 vectors or one matrix by head
    assert sum(x.numel() for block in session.state for x in block) == 2 * (
        16 + (3 if version == "4" else 16) * 16 + 16
    )


@pytest.mark.parametrize("text", ["Yes.\n\nUser: no", "你好。\n\nUser:", "a\n\nUse\n\nUser: x", "\n\nUser: x"])
def test_stop_text_removed(text):
    model = ScriptedModel(text, skip=1)
    session = Session(model, ByteTokenizer())
    answer = "".join(session.write(GREEDY, 100, stop=("\n\nUser:",)))
    assert answer == text[: text.index("\n\nUser:")]
    assert session.state == 1 + len(answer.encode())  # the state after the answer, without the stop text


def test_streams_complete_characters():
    chunks = list(Session(ScriptedModel("a好b", skip=1), ByteTokenizer()).write(GREEDY, 50))
    assert chunks == ["a", "好", "b"]


def test_incomplete_character_replaced():
    assert "".join(Session(ScriptedModel("好", skip=1), ByteTokenizer()).write(GREEDY, 2)) == "\ufffd"


class AnsweringModel(torch.nn.Module):
    """A fake model whose state is the ids read so far, and which writes the given answers after
    each "Assistant:".
    """

    def __init__(self, *answers: str):
        super().__init__()
        self.answers, self.tokenizer = answers, WorldTokenizer()
        self.emb = torch.nn.Embedding(1, 1)

    def hidden(self, tokens, state):
        self.state = [*(state or []), *tokens[0].tolist()]
        return torch.zeros(1, 1, 1), self.state

    def head(self, hidden):
        before, _, now = self.tokenizer.decode_bytes(self.state).decode().rpartition("Assistant:")
        text = self.answers[before.count("Assistant:") % len(self.answers)]
        logits = torch.zeros(65536)
        logits[[*self.tokenizer.encode(text[len(now) :]), 0][0] if text.startswith(now) else 0] = 10
        return logits


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n\n\n", "\n\nUser: and then", " \n\n"])
def test_chat_tokens_match_converter(tmp_path, write_jsonl, end):
    # an answer is followed by two line breaks in both; a chat used to append four
    turns = [("What is\r\n\r\nthis? ", "Blue.\nSky"), ("你好", "你好！"), ("\n1+1?", "2")]
    session = Session(AnsweringModel(*(f" {answer}{end}" for _, answer in turns)), WorldTokenizer())
    chat = Chat(session)
    shown = ["".join(chat.ask(text, GREEDY, 50)) for text, _ in turns]
    assert shown == [answer for _, answer in turns]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    data = Dataset(convert(ConvertConfig(input=str(write_jsonl({"messages": messages})), workers=1)).pairs[0][0])
    assert session.state == [0, *data.document(0).tolist()[:-1]]


@pytest.mark.parametrize(
    ("think", "written", "answer"),
    [
        ("full", " <think>\none and\none</think>\n2", "<think>\none and\none</think>\n2"),
        ("fast", " <think>\n</think>\n> quoted\n> 2", "> quoted\n> 2"),
        ("fast", " <think>\n</think> 2", "2"),
        ("none", " <think>hm</think>\n2", "<think>hm</think>\n2"),
    ],
)
def test_thoughts(tmp_path, write_jsonl, think, written, answer):
    """The tokens are those of a conversation with these answers, converted."""
    session = Session(AnsweringModel(written), WorldTokenizer())
    chat = Chat(session, think)
    assert ["".join(chat.ask("1+1?", GREEDY, 50)) for _ in range(2)] == [answer] * 2
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": answer}] * 2
    data = Dataset(convert(ConvertConfig(input=str(write_jsonl({"messages": messages})), workers=1)).pairs[0][0])
    assert session.state == [0, *data.document(0).tolist()[:-1]]


def test_thoughts_of_earlier_turns_match_g1_data(tmp_path, write_jsonl):
    """With empty thoughts, the model reads the tokens before the last answer of converted data."""
    model, states = AnsweringModel(" <think>\n</think>\n2"), []
    hidden = model.hidden
    model.hidden = lambda ids, state: (states.append(hidden(ids, state)[1]), (torch.zeros(1, 1, 1), model.state))[1]
    chat = Chat(Session(model, WorldTokenizer()), "fast")
    assert ["".join(chat.ask("1+1?", GREEDY, 50)) for _ in range(3)] == ["2"] * 3
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}] * 3
    config = ConvertConfig(input=str(write_jsonl({"messages": messages})), workers=1, chat_template="g1")
    data = Dataset(convert(config).pairs[0][0])
    tokens, answer = data.document(0).tolist(), WorldTokenizer().encode(">\n2\n\n")
    assert tokens[-1 - len(answer) : -1] == answer
    assert [0, *tokens[: -1 - len(answer)]] in states


def test_stopped_answer_is_a_turn():
    session = Session(AnsweringModel(" one two three four"), WorldTokenizer())
    part = next(answer := Chat(session).ask("count", GREEDY, 50))
    answer.close()  # Ctrl-C
    assert session.tokenizer.decode_bytes(session.state).decode() == f"User: count\n\nAssistant: {part}\n\n"


def test_temperature_zero_and_penalties():
    logits = torch.tensor([1.0, 3.0, 2.5])
    assert sample_token(logits, GREEDY, {}) == 1
    assert sample_token(logits, Sampling(0, presence_penalty=0.6), {1: 1.0}) == 2
    assert sample_token(logits, Sampling(0, frequency_penalty=0.3), {1: 1.0}) == 1
    assert sample_token(logits, Sampling(0, frequency_penalty=0.3), {1: 2.0}) == 2
    assert logits.tolist() == [1.0, 3.0, 2.5]


def test_tiny_temperature_is_greedy():
    for temperature in (1e-3, 1e-40, 5e-324):
        assert sample_token(torch.tensor([1.0, 3.0, 2.0]), Sampling(temperature), {}) == 1


def test_top_p_and_temperature():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    def share(sampling, n=4000):
        drawn = torch.tensor([sample_token(logits, sampling, {}, generator) for _ in range(n)])
        return torch.bincount(drawn, minlength=4) / n

    # 4000 draws: standard deviation at most 0.008
    torch.testing.assert_close(share(Sampling(1.0, 0.7)), torch.tensor([0.625, 0.375, 0, 0]), rtol=0, atol=0.03)
    torch.testing.assert_close(share(Sampling(1.0, 1.0)), torch.tensor([0.5, 0.3, 0.15, 0.05]), rtol=0, atol=0.03)
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(share(Sampling(0.5, 1.0)), sharp / sharp.sum(), rtol=0, atol=0.03)
    torch.set_flush_denormal(True)  # as in a process that has trained
    try:
        assert share(Sampling(1.0, 0.0))[0] == 1
    finally:
        torch.set_flush_denormal(False)


def test_same_seed_same_text(make_model):
    model = make_model(vocab_size=257)
    texts = [
        "".join(Session(model, ByteTokenizer()).write(Sampling(), 30, generator=torch.Generator().manual_seed(s)))
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_example_uses_world_format(root):
    line = (root / "data/example.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert question("What is RWKV?") in line.replace("\\n", "\n")
    assert WorldTokenizer().eod == 0


def test_matrices_keep_stored_dtype(make_base):
    assert matrices_dtype("auto", torch.bfloat16, gpu=False) is None
    assert matrices_dtype("bf16", torch.float32, gpu=False) is torch.bfloat16
    with pytest.raises(UserError, match="--dtype fp16 needs a GPU"):
        matrices_dtype("fp16", torch.float16, gpu=False)
    base = make_base(vocab_size=257)
    full, half = (checkpoint.load_model(base, matrices=dtype) for dtype in (None, torch.bfloat16))
    assert {half.emb.weight.dtype, half.blocks[0].att.key.weight.dtype} == {torch.bfloat16}
    assert half.blocks[0].att.time_decay.dtype == torch.float32
    full_session, half_session = Session(full, ByteTokenizer()), Session(half, ByteTokenizer(), torch.bfloat16)
    full_session.read("hello")
    half_session.read("hello")
    assert half_session.logits.dtype == torch.float32
    # bf16 keeps 8 significant bits; two layers
    torch.testing.assert_close(full_session.logits, half_session.logits, rtol=0.05, atol=0.05)


def test_nan_logits(make_model):
    model = make_model(vocab_size=257)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(UserError, match="NaN or Inf; use --dtype fp32"):
        Session(model, ByteTokenizer())
