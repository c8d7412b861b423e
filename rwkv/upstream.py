"""Flags of the upstream programs that are called otherwise here, or are not here, and what to use instead."""

# Flags of the upstream programs that have no counterpart here: (the value that means "off" there, what to do instead).
# Off, they are passed over, as upstream's README commands carry them; else they are refused by name.
NOT_SUPPORTED = {
    "my_pile_version": ("1", "it reads a list of datasets: convert them to one, and prime sampling takes it with --magic_prime -1"),
    "my_qa_mask": ("0", "give --chatml_mask 1, or a mask file beside the data: P_text_mask.bin"),
    "my_testing": ("", "it chooses experimental models: leave it out"),
    "head_qk": ("0", "leave it out: models with a head_q and head_k are not supported"),
    "tiny_att_dim": ("0", "leave it out: models with tiny attention are not supported"),
    "tiny_att_layer": ("-999", "leave it out: models with tiny attention are not supported"),
    "my_sample_len": ("0", "it belongs to --data_type uint16: documents of a binidx and --doc_training 1 do the same"),
    **{
        name: (off, "leave it out: it belongs to image models")
        for name, off in {
            "my_img_version": "0", "my_img_size": "0", "my_img_bit": "0", "my_img_clip": "x", "my_img_clip_scale": "1", "my_img_l1_scale": "0",
            "my_img_encoder": "x", "my_ffn_shift": "1", "my_att_shift": "1", "my_pos_emb": "0",
        }.items()
    },
    # the converter's
    "dataset_impl": ("mmap", "leave it out: the memory-mapped format is the one that is read"),
    "merge_file": ("", "leave it out: neither World nor 20B has one"),
}  # fmt: skip
# Flags that are taken with any value, and change nothing: documents are counted on the way, and there is a progress bar.
PASSED_OVER = ("num_docs", "log_interval", "enable_progress_bar")
ALIASES = {
    "vocab": "vocab_file",
    "seq_data": "doc_training_seq",  # as m8than's README calls it
    "seq_data_sep": "doc_sep",
}
LISTS = ("jsonl_keys",)  # several words after the flag are as good as one with commas
