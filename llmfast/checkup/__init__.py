"""`llmfast doctor --full`: everything worth knowing about llmfast on one GPU, in a given number of minutes.

| file | what is in it |
|---|---|
| `record.py` | cases, findings, and the file in which a section's process tells what it does |
| `sections.py` | the sections, in order of worth, each with its share of the time |
| `here.py`, `numerics.py`, `behaviour.py`, `memory.py`, `speed.py`, `training.py` | one section each |
| `tuning.py` | a section for `--tune`: times of every tile |
| `worker.py` | a section's process: runs its cases one after the other |
| `runner.py` | the parent: starts workers, watches them, writes results after each |
| `page.py` | results as a page, of one machine or of two |
| `clock.py`, `shapes.py`, `ways.py` | times, sizes and other libraries' ways; `benchmarks/` uses the same |
| `command.py` | the command line |
"""
