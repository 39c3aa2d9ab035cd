"""What is computed. Two stages are the product, a third is for previews; they meet only in the store.

encode/       stage one: captions and images into the store
train/        stage two: a LoRA from the store
decode/       previews: latents to pictures
folders.py    where the parts of a model lie                  shared by all three, like the next
hub.py        the same for the local Hugging Face cache
catalogue.py  the models that are known by name
sizes.py      what a model is
spec.py       the same, read from a checkpoint's configs
infer.py      the same, from shapes where there is no config
names.py      other tools' layouts under our names
fp8.py        8-bit floats in them
weights.py    safetensors in: checked, lazy, mapped by name
identity.py   what a set of weights is: hashes
packed.py     models that MLX has quantized before
quantize.py   a weight matrix as it stands in memory
kernels.py    the one door to kernels of our own
context.py    a caption's context, from the rows that are stored
memory.py     what a stage may take, from the device or the config
measure.py    what it took
one_model.py  one model at a time
figures.py    how fast this machine was
files.py      safetensors and JSON out, whole or not at all
shards.py     safetensors out that are larger than memory
model_folder.py  a folder in the layout of diffusers: its small files
device_errors.py  what a GPU's errors mean, in plain words
vae.py        the autoencoder; its halves load apart          shared by encode and decode
vae_blocks.py     its layers
vae_strips.py     the same layers over strips of rows
blas.py       fast float32 products on Linux CPUs; has to come before MLX, hence the call below
"""

from flux2_relay.stages import blas

blas.load()
