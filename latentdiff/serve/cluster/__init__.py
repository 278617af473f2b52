"""The HTTP server as an application of Ray Serve: replicas that draw, and a door that shares requests out to them."""
