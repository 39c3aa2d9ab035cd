"""Publishing behind a short queue, so that the encoder never waits for the disk and memory stays bounded."""

import queue
import threading
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from flux2_relay.cache.keys import key_of
from flux2_relay.cache.store import Store


class Writer:
    """One thread that publishes what it is given, in order.

        with Writer(store) as writer:
            writer.put("text", key_object, array, made)

    Leaving the block waits until everything is committed, after Ctrl-C too. What goes wrong in the thread is
    raised by the next `put` or on leaving; from then on nothing more is written.
    """

    def __init__(self, store: Store, depth: int = 4) -> None:
        """`depth` entries may wait; one more `put` blocks."""
        self._store = store
        self._queue: queue.Queue[tuple[str, Mapping[str, object], np.ndarray, Mapping[str, object]] | None]
        self._queue = queue.Queue(depth)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cache-writer")

    def put(self, kind: str, key_object: Mapping[str, object], array: np.ndarray, made: Mapping[str, object]) -> str:
        """Hand over an entry -> its key. The array must not be changed afterwards."""
        self._raise_failure()
        key = key_of(key_object)
        self._queue.put((kind, key_object, array, made))
        return key

    def __enter__(self) -> "Writer":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until the queue is empty; raise what went wrong, or note it on what is already on its way."""
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise_failure()
        elif self._failure is not None and error is not self._failure:
            error.add_note(f"and the cache's writer failed: {self._failure}")

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    self._store.publish(*item)
                except BaseException as error:  # raised in the caller's thread
                    self._failure = error
            # after a failure the rest is only taken off the queue, so that `put` cannot block for ever

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
