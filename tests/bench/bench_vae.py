"""What the VAE takes at full size in strips, above its weights: `python tests/bench/bench_vae.py --size 2048`.

Random weights, float32, each half in a process of its own. A picture of 1024 x 1024 takes minutes on a CPU, one of
2048 x 2048 half an hour and more.
"""

import argparse
import subprocess
import sys
import time

LIMITS = {1024: 1.3e9, 2048: 4.7e9}
"""Size -> bytes above the weights that strips are chosen for."""


def measure(half: str, size: int) -> str:
    """Child process: one picture through one half -> a line."""
    import flux2_relay.stages  # noqa: F401 - loads a BLAS before MLX

    # isort: split
    import mlx.core as mx

    from flux2_relay.stages import vae_blocks, vae_strips
    from flux2_relay.stages.measure import in_words, peak_resident_bytes, resident_bytes
    from flux2_relay.stages.sizes import VaeSpec

    spec = VaeSpec()
    layers = vae_blocks.encoder_layers(spec) if half == "encode" else vae_blocks.decoder_layers(spec)
    shape = (1, size, size, 3) if half == "encode" else (1, size // 8, size // 8, spec.latent_channels)
    weights = {}
    for name, sides in vae_blocks.tensor_shapes(layers).items():
        value = 0.05 * mx.random.normal(sides, key=mx.random.key(len(name)))
        weights[name] = mx.contiguous(value.transpose(0, 2, 3, 1)) if value.ndim == 4 else value
    x = mx.random.normal(shape, key=mx.random.key(0))
    mx.eval(weights, x)
    mx.clear_cache()
    arrays, resident, started = mx.get_active_memory(), resident_bytes(), time.perf_counter()
    mx.reset_peak_memory()
    rows = vae_strips.rows_for(layers, shape, int(LIMITS[size])) or size
    foretold = vae_strips.strips_bytes(layers, shape, rows)
    y = vae_strips.walk_strips(layers, x, weights, spec.norm_num_groups, rows)
    mx.eval(y)
    assert mx.isfinite(y).all()
    return (
        f"{half} {size} x {size}, strips of {rows} rows: arrays {in_words(mx.get_peak_memory() - arrays)} (predicted "
        f"{in_words(foretold)}), process {in_words(peak_resident_bytes() - resident)}, "
        f"{time.perf_counter() - started:.0f} s"
    )


def main() -> None:
    """Both halves in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=LIMITS, default=1024)
    parser.add_argument("--only", choices=("encode", "decode"))
    parser.add_argument("--child", choices=("encode", "decode"))
    arguments = parser.parse_args()
    if arguments.child:
        print(measure(arguments.child, arguments.size), flush=True)
        return
    for half in (arguments.only,) if arguments.only else ("encode", "decode"):
        subprocess.run([sys.executable, __file__, "--size", str(arguments.size), "--child", half], check=True)


if __name__ == "__main__":
    main()
