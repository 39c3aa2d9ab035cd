"""A file system that fails: stands in for `os` where the store writes."""

import os

CALLS = ("mkdir", "open", "write", "fsync", "close", "rename")


class FailingOs:
    """Stands in for `os` inside durable.py; call number `at` fails, before or after doing its work."""

    def __init__(self, at: int, error: BaseException, after: bool = False, from_then_on: bool = False):
        self.at, self.error, self.after, self.from_then_on = at, error, after, from_then_on
        self.calls: list[str] = []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*arguments, **options):
            self.calls.append(name)
            number = len(self.calls) - 1
            fails = number == self.at or (self.from_then_on and number > self.at)
            if fails and not self.after and name != "close":
                raise self.error
            result = real(*arguments, **options)
            if fails:
                raise self.error
            return result

        return call
