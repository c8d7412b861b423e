"""Convert text to binidx, the format that training reads.

    # writes mine_text_document.bin and .idx next to the input
    python scripts/convert.py --input mine.jsonl
    python scripts/convert.py --input "data/*.jsonl.zst,more.parquet" --output-prefix out/all
    # messages, ShareGPT, alpaca, …: also writes a loss mask, chats_text_mask.bin
    python scripts/convert.py --input chats.jsonl
    # plain texts "User: …", blank line, "Assistant: …": train on the answers only
    python scripts/convert.py --input mine.jsonl --mask answers
    # another tokenizer; the text is under the key "content"
    python scripts/convert.py --input mine.jsonl --jsonl-keys content \\
        --tokenizer-type HFTokenizer --vocab 20B_tokenizer.json

Every record is one document, such as the line {"text": "..."} of a jsonl file. A bad record stops
the conversion with an error that names file and line, and nothing is written; --on-error skip skips
bad records. Output files are written atomically. On several machines:

    # and 1/4, 2/4, 3/4 on the others
    python scripts/convert.py --input big.jsonl --output-prefix out/big --shard 0/4
    # when all have finished
    python scripts/convert.py --output-prefix out/big --merge
    # or on a Ray cluster of which this machine is a node (make ray)
    python scripts/convert.py --input big.jsonl --output-prefix out/big --ray auto
"""

from rwkv.cli import parse, report_errors
from rwkv.commands import flags
from rwkv.config import ConvertConfig
from rwkv.errors import UserError

if __name__ == "__main__":
    with report_errors():
        config = parse(ConvertConfig, __doc__)
        if config.merge:
            if not config.output_prefix:
                raise UserError("--merge needs the --output-prefix of the shards")
            from rwkv.data.convert.shards import merge

            for prefix, documents, tokens in merge(config.output_prefix, config.force):
                print(
                    f"{prefix}.bin and .idx: {documents:,} documents, {tokens:,} tokens. Train with {flags('--data_file', prefix)}"
                )
        else:
            from rwkv.data.convert.pipeline import convert

            done = convert(config)
            if done.rejects:
                print(f"{done.rejects:,} bad records were skipped; see {done.rejects_file}")
            for line in done.report:
                print(line)
            for prefix, documents, tokens in done.pairs:
                end = "" if config.shard else f" Train with {flags('--data_file', prefix)}"
                print(
                    f"{prefix}.bin and .idx{', and a loss mask' if done.masked else ''}: {documents:,} documents, {tokens:,} tokens.{end}"
                )
