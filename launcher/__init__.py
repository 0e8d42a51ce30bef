"""Runs a broker and a connector side by side, as processes. Shares no code with `connector`."""
