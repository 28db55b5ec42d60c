"""The commands of `python -m flash_attn`, a module each: `info`, `verify`, `bench`, `demo`.

They share `devices` (what is built and present), `correctness` (against the float64 reference), `invariance` (bits, as
SHA-256), `measure` (time and memory), `text` and `model` (the demo's language model), and `terminal` (tables, a bar).
"""
