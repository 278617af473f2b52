"""The part of the API of AUTOMATIC1111's web UI that its clients use; `routes.add_routes` is the door."""
