"""The errors of the house, one small tree.

    RelayError            anything this program says in a plain sentence (exit status 1)
    └── InputError        the user's config, data, checkpoint or store is wrong (exit status 2)
        └── StoreError    a store, or one entry of it, cannot be used

They live in the lowest room because every room above raises them.
"""


class RelayError(Exception):
    """Something went wrong that a plain sentence explains; the command line prints it without a traceback."""

    exit_status = 1


class InputError(RelayError):
    """The user's input is wrong: the message says what, where (file, key, line) and what to do."""

    exit_status = 2


class StoreError(InputError):
    """A store or an entry is missing, damaged, of another version, or not a store at all."""
