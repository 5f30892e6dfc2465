"""Checkpoints that are whole or absent; `store.Store` saves and finds them, `loading` reads them back."""
