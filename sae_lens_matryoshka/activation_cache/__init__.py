"""Activations of a language model on disk, computed once for many SAEs.

A run says what they are made from (``made_from``); they lie in ``shards``, listed in a ``manifest``; ``cache`` is the
folder as a whole, checked, and ``batches`` the order in which training reads it. :mod:`training.caching` writes one.
"""
