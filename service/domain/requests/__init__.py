"""Parsing of request bodies: one table of fields (fields.py), the checks it is made of, and the messages."""
