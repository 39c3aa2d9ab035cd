"""Stage two: a LoRA on the transformer, from the store alone. In reading order:

blocks.py       the two kinds of block as pure functions
transformer.py  weights, and the forward pass
lora.py         adapters
objective.py    noise, sigma, loss
backprop.py     gradients block by block
optimizer.py    the update
randomness.py   draws as functions of (seed, step, item)
contexts.py     stored entries to arrays
batches.py      which items make up which step, read ahead
loop.py         the stage: step by step
sample.py       previews
checkpoint.py   to go on from
export.py       the adapter for other programs
files.py        bytes first, name last
options.py      what it may be told
"""
