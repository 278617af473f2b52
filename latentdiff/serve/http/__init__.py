"""The scheduler over HTTP: OpenAI's images API; `app.make_app` is the door."""
