"""Experiments that are run once and described in docs/, on the page of their subject."""
