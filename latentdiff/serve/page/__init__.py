"""A page to draw on, by gradio: one more door to the same desk, with the same limits; `mount.mount_page` opens it."""
