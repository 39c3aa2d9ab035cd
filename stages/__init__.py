"""What is computed. Two stages are the product, a third is for previews; they meet only in the store.

encode/       stage one: captions and images into the store
train/        stage two: a LoRA from the store
decode/       previews: latents to pictures
spec.py       what a model is, read from its checkpoint       shared by all three
weights.py    safetensors in: checked, lazy, mapped by name   shared by all three
vae.py        the autoencoder; its halves load apart          shared by encode and decode
blas.py       fast float32 products on Linux CPUs; has to come before MLX, hence the call below
"""

from flux2_relay.stages import blas

blas.load()
