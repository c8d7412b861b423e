"""Serving: batched recurrent decoding (engine.py), behind an OpenAI-compatible HTTP API (app.py) or
for a file of prompts (prompts_file.py).
"""
