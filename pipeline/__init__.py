"""The conductor: what runs, in which order, and what it tells the user (not the `pipeline` of diffusers).

cli.py         the command line
commands.py    what each command does: the config taken apart and handed to one stage
cache_*.py     `relay cache`: its command line, what it does, why an entry is stale, one entry whole for others
models.py      `relay models`: what is known, what is found where
plan*.py       `relay plan`: what both stages would do and take, for one run or several, and how it is told
sweep.py       the configs of several runs from one
together.py    those runs trained at once, each with its folder
lacking.py     which entries a store lacks for a config, and why
start_cli.py   the command line of somebody who begins: init, import, bench
init*.py       `relay init`: a config for a data set on this machine, and why it is what it is
import*.py     `relay import`: tables of other trainers' keys and ours
bench.py       `relay bench`: one line on how fast this machine is
commented.py   a config as text, with a comment beside every value
adapter_cli.py the command line of export and merge
export.py      `relay export`: an adapter for another program
merge.py       `relay merge`: base and adapters as a folder of diffusers
card.py        what the adapter of a run says of itself
sampling*.py   `relay sample`: pictures with or without adapters, its command line, and what each picture is
wish.py        what it is asked for
apart.py       work in a process of its own
check.py       `relay check`: the acceptance test
labels.py      labels and wrapped sentences on a terminal
place.py       which store such a command is about
config.py      the config file: nests the options that each component declares
config_page.py docs/config.md: every key, from the code
schema.py      YAML into dataclasses, a line number for every fault
request.py     what names a set: the part of a config that stage one obeys
run_folder.py  one run's folder: config, metrics, log
events.py      the metrics for TensorBoard
origin.py      what a run was made from, kept in its folder for its report
report*.py     a run as one HTML page: its verdict, charts, previews, data
held_out.py    what it says of the held-out loss
comparison.py  several runs on one page
charts.py      curves as SVG
page*.py       the frame of both, their looks and their one script
live.py        the page while training goes on
closing.py     the last line of a stage
signals.py     Ctrl-C and SIGTERM
launch.py      a training on several hosts: its ranks, and how they ended
rank.py        one of them
"""
