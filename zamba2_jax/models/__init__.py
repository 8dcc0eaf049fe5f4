"""Families of models, and what all of them are to the floors above."""
