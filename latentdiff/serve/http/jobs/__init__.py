"""Our own API of jobs, which outlive the request that hands them in; `routes.add_routes` is the door."""
