"""The scheduler over HTTP: OpenAI's images API, the web UI's, and jobs; `app.make_app` is the door."""
