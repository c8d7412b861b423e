"""Train, tune and run RWKV language models. Importing compiles nothing, prints nothing and downloads nothing."""

__version__ = "0.1.0"
