"""L2 sans-I/O state machines: no loop, socket, clock, random or logging; time arrives as `now` (seconds)."""
