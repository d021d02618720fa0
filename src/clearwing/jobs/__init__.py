"""One function a command; the only place that knows all rooms."""
