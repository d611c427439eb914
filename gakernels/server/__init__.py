"""An HTTP server for contexts, and for completions under their adapters (extra `serve`)."""
