"""Long runs by `make soak`; `make test` holds a bounded smoke of each."""
