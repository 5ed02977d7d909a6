"""Labelled images and texts, from files, folders, tables and the hub."""
