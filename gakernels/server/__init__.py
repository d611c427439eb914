"""An HTTP server of contexts and completions under their adapters (extra `serve`)."""
