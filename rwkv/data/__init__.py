"""Files to tokens: jsonl, inputs, chat → tokenizer → binidx, driven by convert; tokens to batches: binidx → sampling → dataset."""
