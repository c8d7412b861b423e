"""Datasets: convert/ turns files into a binidx of tokens; binidx → token_stream → dataset → batches
reads it for training.
"""
