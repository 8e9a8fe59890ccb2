"""How fast the trainer is, and how well it does in that time: scripts that print tables."""
