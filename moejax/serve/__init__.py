"""Serving: from a request to tokens; knows no command line."""
