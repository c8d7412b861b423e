"""From text to batches: jsonl → tokenizer → binidx → sampling → dataset; convert drives the first three."""
