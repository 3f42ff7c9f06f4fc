"""Onto the Hub: what may be sent of a folder, and sending it. No torch."""
