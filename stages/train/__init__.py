"""Stage two: a LoRA on the transformer, from the store alone. In reading order:

blocks.py       the two kinds of block as pure functions
base.py         weights as a checkpoint has them
transformer.py  weights, and the forward pass
kinds.py        what may be attached to a linear, and plain LoRA
dora.py         DoRA
lokr.py         LoKr
cuts.py         arrays in pieces
lora.py         the adapters of a transformer
dropout.py      the share of their input that is left out
adapter_names.py what LoRA files call the linears
adapter_sizes.py the model that one is for, from its shapes
adapter_file.py LoRA files of any naming
adapter_parts.py what the tensors of a module stand for
updates.py      what a file does to one linear, and plain LoRA
dora_update.py  DoRA
lokr_update.py  LoKr
visits.py       the base's matrices one after another
init.py         starting from one
objective.py    noise, sigma, loss
backprop.py     gradients block by block
step.py         the gradients of a whole step
turns.py        several passes taken block by block together
beside.py       LoRAs of several runs at one linear
shared_base.py  the base under several trainings at once
many.py         the stage for several runs together
optimizer.py    the update
prodigy.py      one that finds its step size
ema.py          a running mean of the adapter
randomness.py   draws as functions of (seed, step, item)
contexts.py     stored entries to arrays
batches.py      which items make up which step, read ahead
ranks.py        several processes that train one adapter
agreement.py    what they must have in common
loop.py         the stage: step by step
course.py       what is timed to know how long a step takes
pace.py         how long it takes, on noise
job.py          what it is given, and whom it tells
running.py      a run under way
acceptance.py   whether the store holds what the transformer was trained on
trial.py        the same, and a training on trial
validation.py   the loss on what is held out
warnings.py     what a night may be lost on
wishes.py       files that ask a run for something
sample.py       from noise to latents
mixing.py       several adapter files, each at a strength
drawing.py      pictures on demand, from the store and adapter files
step_work.py    what a step of training holds in memory
layout.py       how that fits the memory budget
forward_work.py what a forward pass holds
forward_layout.py how that fits the memory budget
previews.py     when, and which
checkpoint.py   to go on from
resume.py       whether one can, under another config
adapter_formats.py how other programs want an adapter
adapter_card.py what its file says of itself
adapter_proof.py whether two adapters are the same update
export.py       the adapter for other programs, read back and compared
merge.py        base and adapters as one transformer
options.py      what it may be told
"""
