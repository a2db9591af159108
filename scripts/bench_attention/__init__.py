"""What each attention variant is worth, measured: exactness, time, memory, behaviour, quality; into docs/attention/.

make attention                                               # all of it: some hours
make attention ARGS="speed --lengths 1024 --lengths 4096 --variant sliding_window"       # shown, not written
make attention ARGS="quality --task classification --seeds 5 --write docs/attention"
"""
