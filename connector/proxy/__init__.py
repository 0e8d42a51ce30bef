"""L4 request -> origin -> answer; knows streams only through `connector.protocol.ports`."""
