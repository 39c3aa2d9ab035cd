"""The conductor: what runs, in which order, and what it tells the user (not the `pipeline` of diffusers).

config.py      the config file: nests the options that each component declares
schema.py      YAML into dataclasses, a line number for every fault
"""
