"""Looking over the entries of a job: quickly before anything is encoded, in full once something has been.

The full look is the last moment at which the models are at hand. Where nothing was missing it is left out: it reads the
whole store, every read in training checks the bytes anyway, and `relay cache verify` does the same when asked.
"""

from collections.abc import Callable, Collection, Mapping

from tqdm import tqdm

from flux2_relay.cache import Store, audit


def look_over(
    store: Store, wanted: Mapping[str, Collection[str]], say: Callable[[str], None], full: bool = False
) -> bool:
    """Take what is damaged out of sight, so that it is missing and is made again -> was there any?

    Quick: metadata and sizes. Full: also decode, crc32c, sha256, finite values.
    """
    quiet = None if full else True  # None: shown where there is a terminal
    with tqdm(desc="reading back", unit="entry", dynamic_ncols=True, leave=False, disable=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        damaged = audit.mend(store, wanted, full=full, progress=progress)
    if damaged:
        key, reason = damaged[0].key, damaged[0].reason
        say(f"{store.name}: {len(damaged)} damaged entries are made again, {key[:12]} among them ({reason})")
    return bool(damaged)
