"""L3 sockets: owns the engines and hides them behind links; knows nothing of origins."""
