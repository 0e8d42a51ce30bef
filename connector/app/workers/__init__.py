"""More than one core: one process that leads, and workers that serve the HA connections.

Owns: everything that `--workers` adds. In: a run (`process.serve`). Out: the same run, spread over processes.
Never: is loaded without the flag.

`crew.py` leads; `child.py` is what a worker runs; `messages.py` is all that they say to each other.
"""
