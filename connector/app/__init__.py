"""L5 the process: command line, configuration, life cycle of edge connections, health, logs."""
