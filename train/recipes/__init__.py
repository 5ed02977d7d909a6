"""Runnable recipes: whole experiments in one command."""
