"""Replicas behind a router: who gets the next request, decided from what a router knows in life."""
