"""An exported folder on the Hub: checked for secrets, listed by checksums, uploaded."""
