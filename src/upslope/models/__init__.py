"""The networks, their heads, their weights and where those come from."""
