"""OpenAI's images API; `routes.add_routes` is the door."""
