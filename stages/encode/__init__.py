"""Stage one: captions and pictures into the store. In reading order:

dataset.py          what the user gives: folders, listings
captions.py         where captions stand and how they are cleaned
sidecars.py         captions beside pictures
companions.py       masks and references that go with a picture, by their names
images.py           from a file to pixels, and where they are cut
masks.py            the same for masks
templates.py        how each family of encoder is asked
encoder_weights.py  which tensors of the encoder are needed
layers.py           its decoder layers, from mlx-lm
sequences.py        what goes through the layers: prefix, pads, captions
spill.py            a pass's hidden states in a file instead of in memory
layout.py           how it all fits into the memory budget
text.py             captions to contexts
entries.py          every entry that a data set needs, with its key
notes.py            what is worth a sentence before encoding
survey.py           what becomes of the pictures: buckets, crops, small ones
forecast.py         what the stage would do, for the plan
sharing.py          how several processes divide the work
claims.py           what each of them is at
stage.py            the stage: what is missing, encoded, one model at a time
options.py          what it may be told
"""
