"""Proxy blocks: the bank that holds them, their closed-form starts and the losses that train them."""
