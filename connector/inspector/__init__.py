"""The debugging tool: taps, decoders, captures, and the page that shows them."""
