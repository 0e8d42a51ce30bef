"""L1 bytes <-> values: pure functions; every decoder takes untrusted bytes and raises only WireError."""
